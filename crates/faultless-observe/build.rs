//! Compiles the part that runs in the kernel. Without clang the crate builds as well, and says so when it is asked to
//! watch something.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(have_bpf)");
    #[cfg(feature = "bpf")]
    with_clang::build();
    #[cfg(not(feature = "bpf"))]
    println!(
        "cargo::rustc-env=FAULTLESS_WITHOUT_BPF=this faultless was built without its feature \"bpf\"; build it with default features"
    );
}

#[cfg(feature = "bpf")]
mod with_clang {
    use std::path::PathBuf;
    use std::process::Command;

    pub(super) fn build() {
        for file in ["observe.bpf.c", "kernel.h", "records.h"] {
            println!("cargo::rerun-if-changed=src/bpf/{file}");
        }
        println!("cargo::rerun-if-env-changed=CLANG");
        println!("cargo::rerun-if-env-changed=PATH");
        let clang = std::env::var_os("CLANG").unwrap_or_else(|| "clang".into());
        let target = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
        let missing = if target != "x86_64" {
            Some(format!(
                "the kernel's tracepoints of page faults are on x86-64 alone, and this faultless was built for {target}"
            ))
        } else if Command::new(&clang).arg("--version").output().is_err() {
            Some(format!(
                "this faultless was built without clang ({} did not run), which compiles the part that runs in the kernel; install clang and build again",
                clang.display()
            ))
        } else {
            None
        };
        if let Some(why) = missing {
            println!("cargo::warning=`faultless observe` will not work: {why}");
            println!("cargo::rustc-env=FAULTLESS_WITHOUT_BPF={why}");
            return;
        }
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
        libbpf_cargo::SkeletonBuilder::new()
            .source("src/bpf/observe.bpf.c")
            .clang(&clang)
            .clang_args([
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
                "-O2",
                "-mcpu=v3",
            ])
            .obj(out.join("observe.bpf.o"))
            .build()
            .expect("the BPF programs compile");
        println!("cargo::rustc-cfg=have_bpf");
        println!("cargo::rustc-env=FAULTLESS_WITHOUT_BPF=");
    }
}
