//! What a hostile user on the same machine, a child that is trusted less, or crafted input can do: `docs/security.md` has the promises.

mod common;

use common::*;
use std::path::Path;
use std::process::Command;

#[test]
fn a_copy_of_the_process_cannot_act_on_it_however_it_was_made() {
    let program = compile("forge", &[]);
    // Each way, with one thread and beside others that miss.
    for how in (0..=8).chain(10..=18) {
        let how = how.to_string();
        for more in [&[][..], &["--compat"]] {
            let data = scratch().join(format!("forge.{how}.data"));
            let data = data.to_str().expect("a plain path");
            let alone = plain(&program, &[&how, data]);
            assert!(
                alone.status.success(),
                "{how}: {}",
                String::from_utf8_lossy(&alone.stderr)
            );
            let options = [&["--min-size", "1M", "--memory", "64M"], more].concat();
            let served = served(&options, &program, &[&how, data]);
            assert!(served.output.status.success(), "{how}: {}", served.told());
            served.same_as(&alone).taken_over();
        }
    }
}
#[test]
fn nothing_stays_in_shared_memory_and_a_process_that_changes_its_user_shares_the_budget() {
    let mine = |dir: &std::fs::DirEntry| {
        dir.file_name()
            .to_string_lossy()
            .starts_with("faultless-run-")
    };
    let there = || -> std::collections::BTreeSet<_> {
        let all = std::fs::read_dir("/dev/shm")
            .expect("there is one")
            .flatten();
        all.filter(mine).map(|d| d.file_name()).collect()
    };
    // Others run at the same time: what this run makes has a name that it is told.
    let settings =
        "import json, os; print(json.loads(os.environ['FAULTLESS_RUN'])['tree']['path'])";
    let data = once("shared-budget.data", |path| {
        std::fs::write(path, vec![7; 8 << 20]).expect("written");
    });
    let source = format!(
        "{settings}\n\
         import mmap, sys\n\
         if os.getuid() == 0:\n    os.chmod(sys.argv[1], 0o644)\n    os.setresuid(65534, 65534, 65534)\n\
         f = os.open(sys.argv[1], os.O_RDONLY); n = os.fstat(f).st_size\n\
         m = mmap.mmap(f, n, mmap.MAP_SHARED, mmap.PROT_READ)\n\
         print(sum(m[i] for i in range(0, n, 4096)), flush=True)"
    );
    let served = served(
        &["--memory", "64M", "--trust", "*"],
        // The first process stays what it is, and can remove the file.
        Path::new("/bin/sh"),
        &[
            "-c",
            "/usr/bin/python3 -c \"$1\" \"$2\"; exit $?",
            "sh",
            &source,
            data.to_str().expect("a plain path"),
        ],
    );
    assert!(served.output.status.success(), "{}", served.told());
    let stdout = served.stdout();
    let (path, sum) = stdout.split_once('\n').expect("two lines");
    assert_eq!(sum, "14336\n");
    assert!(
        !served.stderr().contains("cannot share"),
        "{}",
        served.stderr()
    );
    let name = Path::new(path)
        .parent()
        .and_then(Path::file_name)
        .expect("a directory");
    assert!(!there().contains(name), "{path} is left behind");
}

#[test]
fn a_program_with_privileges_obeys_no_variable_of_ours() {
    // Only root can make a program set-user-id for somebody else.
    if !possible(
        "a_program_with_privileges_obeys_no_variable_of_ours",
        root(),
    ) {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let open = |path: &Path, mode| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("own");
    };
    open(dir.path(), 0o777);
    let library_dir = dir.path().join("lib");
    std::fs::create_dir(&library_dir).expect("made");
    std::fs::copy(library(), library_dir.join("libfaultless_preload.so")).expect("copied");
    // It links the library, and finds it by a path that the loader believes.
    let source = dir.path().join("privileged.c");
    std::fs::write(
        &source,
        "#include <stdio.h>\n#include <unistd.h>\nint faultless_forget(void *);\n\
         const char *faultless_error(void);\n\
         int main(void) { printf(\"%d %d\\n\", getuid() != geteuid(), faultless_error() != NULL); return 0; }",
    )
    .expect("written");
    let program = dir.path().join("privileged");
    let status = Command::new("cc")
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .arg(format!("-L{0}", library_dir.display()))
        .arg(format!("-Wl,-rpath,{0}", library_dir.display()))
        .arg("-lfaultless_preload")
        .status()
        .expect("a C compiler");
    assert!(status.success());
    open(&program, 0o4755);
    for path in [&library_dir, &library_dir.join("libfaultless_preload.so")] {
        open(path, 0o755);
    }
    let report = dir.path().join("report.json");
    let settings = r#"{"memory":67108864,"min_size":4096,"stats":true,"stats_json":"REPORT","stats_file":[0,0],"eager":true,"tree":{"path":"","owner":0,"first":1}}"#
        .replace("REPORT", report.to_str().expect("a plain path"));
    use std::os::unix::process::CommandExt as _;
    let run = |uid| {
        Command::new(&program)
            .env("FAULTLESS_RUN", &settings)
            .env("FAULTLESS_BACKEND", "mmap")
            .uid(uid)
            .gid(uid)
            .output()
            .expect("it starts")
    };
    let output = run(65534);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "1 1\n",
        "it has privileges"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "",
        "and says nothing of ours"
    );
    assert!(!report.exists());
}

fn root() -> Result<(), String> {
    #[allow(unsafe_code, reason = "geteuid(2)")]
    // SAFETY: no arguments.
    match unsafe { libc::geteuid() } {
        0 => Ok(()),
        _ => Err("it takes root".to_owned()),
    }
}

#[test]
fn a_file_of_reports_is_written_to_as_itself_alone() {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let report = dir.path().join("report.json");
    let victim = dir.path().join("victim");
    std::fs::write(&victim, "precious").expect("written");
    // While the program runs, somebody puts a pipe, or a link, in the place of the file.
    for swap in ["mkfifo", "ln -s victim"] {
        let script = format!("rm {0} && {swap} {0}", report.display());
        let status = Command::new("timeout")
            .args(["--signal=KILL", "60", FAULTLESS, "run", "--stats-json"])
            .arg(&report)
            .args(["--", "/bin/sh", "-c", &script])
            .current_dir(dir.path())
            .env("FAULTLESS_LIBRARY", library())
            .status()
            .expect("it starts");
        assert!(status.success(), "{swap}: {status}");
        assert_eq!(
            std::fs::read(&victim).expect("there"),
            b"precious",
            "{swap}"
        );
        std::fs::remove_file(&report).expect("the swapped one");
    }
}

#[test]
fn names_of_files_act_on_no_terminal_and_forge_no_line() {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let name = "a\x1b[2J\u{9b}31m\u{202e}\nfaultless: forged";
    let data = dir.path().join(name);
    std::fs::write(&data, vec![7; 1 << 20]).expect("written");
    let source = "import mmap, os, sys\n\
        f = os.open(sys.argv[1], os.O_RDONLY); n = os.fstat(f).st_size\n\
        m = mmap.mmap(f, n, mmap.MAP_SHARED, mmap.PROT_READ)\n\
        print(sum(m[i] for i in range(0, n, 4096)))";
    let served = served(
        &["--min-size", "64K", "--stats"],
        Path::new("/usr/bin/python3"),
        &["-c", source, data.to_str().expect("UTF-8")],
    );
    served.printed("1792\n").taken_over();
    let stderr = served.stderr();
    assert!(stderr.contains("forged"), "it is named: {stderr:?}");
    harmless(&stderr);
    assert!(
        !stderr.lines().any(|l| l.starts_with("faultless: forged")),
        "{stderr:?}"
    );
    // An error of the command, and a workload.
    let toml = dir.path().join("bad.toml");
    std::fs::write(&toml, "\"\\u001b[31m\\u202e\" = 1\n").expect("written");
    for args in [
        vec!["run", "--", data.to_str().expect("UTF-8")],
        vec!["whatif", toml.to_str().expect("UTF-8")],
        vec!["observe", "--from", data.to_str().expect("UTF-8")],
    ] {
        let output = Command::new(FAULTLESS)
            .args(&args)
            .output()
            .expect("it starts");
        assert!(!output.status.success(), "{args:?}");
        harmless(&String::from_utf8_lossy(&output.stderr));
    }
}

/// Nothing in it acts on a terminal.
#[track_caller]
fn harmless(text: &str) {
    let acts = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!text.chars().any(acts), "{text:?}");
}

#[test]
fn an_input_that_is_a_pipe_is_refused_without_waiting() {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let pipe = dir.path().join("pipe");
    let made = Command::new("mkfifo")
        .args(["-m", "755"])
        .arg(&pipe)
        .status();
    assert!(made.expect("coreutils").success());
    let pipe = pipe.to_str().expect("a plain path");
    for args in [
        vec!["run", "--", pipe],
        vec!["run", "--stats-json", pipe, "--", "true"],
        vec!["whatif", pipe],
        vec!["whatif", "validate", "--from", pipe],
        vec!["whatif", "--machine", pipe],
        vec!["whatif", "quiet", "--html", pipe],
        vec!["observe", "--from", pipe],
        vec!["bench", "quiet", "--file", pipe, "--size", "64M"],
    ] {
        let output = Command::new("timeout")
            .args(["--signal=KILL", "60", FAULTLESS])
            .args(&args)
            .env("FAULTLESS_LIBRARY", library())
            .output()
            .expect("it starts");
        let code = output.status.code();
        assert!(
            code == Some(1) || code == Some(2),
            "{args:?}: {}",
            output.status
        );
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}
