//! Compiles the plain C program that the benchmark runs by itself and under `faultless run`.

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=src/unmodified.c");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("unmodified");
    let compiler = cc::Build::new().opt_level(2).get_compiler();
    let status = compiler
        .to_command()
        .args(["-O2", "-Wall", "-Wextra", "-pthread", "-o"])
        .arg(&out)
        .arg("src/unmodified.c")
        .status();
    match status {
        Ok(status) if status.success() => {}
        other => panic!(
            "cannot compile src/unmodified.c with {}: {other:?}; install a C compiler",
            compiler.path().display()
        ),
    }
}
