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
        "#include <stdio.h>\n#include <unistd.h>\n#include \"faultless.h\"\n\
         int main(void) { faultless_pool *pool; if (faultless_pool_open(16 << 20, &pool)) return 3;\n\
         printf(\"%d %s\\n\", getuid() != geteuid(), faultless_pool_backend(pool)); return 0; }",
    )
    .expect("written");
    let program = dir.path().join("privileged");
    let status = Command::new("cc")
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .arg(format!(
            "-I{}/../faultless-preload/include",
            env!("CARGO_MANIFEST_DIR")
        ))
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
    // A file of reports that both could write to, as the command would have made it.
    let report = dir.path().join("report.json");
    std::fs::write(&report, "").expect("written");
    open(&report, 0o666);
    let id = std::fs::metadata(&report).expect("written");
    use std::os::unix::fs::MetadataExt as _;
    let settings = format!(
        r#"{{"memory":67108864,"min_size":4096,"stats_json":"{}","stats_file":[{},{}],"eager":true,"tree":{{"path":"","owner":0,"first":1}}}}"#,
        report.display(),
        id.dev(),
        id.ino()
    );
    use std::os::unix::process::CommandExt as _;
    let run = |program: &Path, uid| {
        let output = Command::new(program)
            .env("FAULTLESS_RUN", &settings)
            .env("FAULTLESS_BACKEND", "mmap")
            .uid(uid)
            .gid(uid)
            .output()
            .expect("it starts");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let written = std::fs::read(&report).expect("there").len();
        (told, written)
    };
    assert_eq!(run(&program, 65534), ("1 full\n".to_owned(), 0));
    // Without privileges the same program obeys both.
    let (told, written) = run(&program, 0);
    assert!(
        told.starts_with("0 mmap") && written > 0,
        "{told}, {written}"
    );
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

// ---- crafted input

#[test]
fn crafted_traces_end_soon_and_in_a_sentence() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/crafted");
    for name in ["panics.trace", "slow.trace"] {
        let trace = dir.join(name);
        for command in [&["whatif"][..], &["observe", "--from"]] {
            let output = Command::new("timeout")
                .args(["--signal=KILL", "300", FAULTLESS])
                .args(command)
                .arg(&trace)
                .output()
                .expect("it starts");
            let stderr = String::from_utf8_lossy(&output.stderr);
            let told = format!("{name}, {command:?}: {}: {stderr}", output.status);
            assert!(matches!(output.status.code(), Some(0 | 1)), "{told}");
            assert!(
                !stderr.contains("panicked") && !stderr.contains("invariant"),
                "{told}"
            );
            // Of another version, a trace would be refused at its beginning.
            assert!(!stderr.contains("format version"), "{told}");
        }
    }
}

#[test]
fn more_memory_than_there_is_is_a_usage_error() {
    for memory in ["18446744073709551615", "1000000T"] {
        let output = Command::new(FAULTLESS)
            .args(["run", "--memory", memory, "--", "true"])
            .env("FAULTLESS_LIBRARY", library())
            .output()
            .expect("it starts");
        assert_eq!(output.status.code(), Some(2), "{memory}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--memory"));
    }
}

// ---- the C interface

/// Compiles a program that calls the engine, runs it on a file of its own, and returns what it printed.
fn calls_the_engine(name: &str) -> Vec<u8> {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../faultless-preload/include");
    let libraries = library().parent().expect("in a directory");
    let program = compile(
        name,
        &[
            &format!("-I{}", include.display()),
            &format!("-L{}", libraries.display()),
            &format!("-Wl,-rpath,{}", libraries.display()),
            "-lfaultless_preload",
        ],
    );
    let data = scratch().join(format!("{name}.data"));
    let output = plain(&program, &[data.to_str().expect("a plain path")]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

#[test]
fn the_engine_can_be_called_when_a_threads_own_data_are_gone() {
    assert_eq!(calls_the_engine("last"), b"called\n");
}

#[test]
fn programs_in_c_can_ask_first_and_for_many_ranges() {
    assert_eq!(calls_the_engine("ask"), b"asked\n");
}

#[test]
fn no_page_that_makes_system_calls_lies_at_an_address_that_can_be_known() {
    let gates: Vec<String> = (0..3)
        .map(|_| {
            let served = served(
                &["--compat"],
                Path::new("/bin/sh"),
                &[
                    "-c",
                    "grep ' r-xp .* 00:00 0 *$' /proc/self/maps | cut -d- -f1",
                ],
            );
            assert!(served.output.status.success(), "{}", served.told());
            served.stdout()
        })
        .collect();
    assert!(!gates[0].is_empty(), "there is one");
    assert!(gates[0] != gates[1] || gates[0] != gates[2], "{gates:?}");
}

#[test]
fn a_run_inside_a_run_passes_the_same_filter() {
    let data = once("nested.data", |path| {
        std::fs::write(path, vec![7; 8 << 20]).expect("written");
    });
    let script = "\"$1\" run --eager --compat -- /usr/bin/python3 -c \"$2\" \"$3\"";
    let source = "import mmap, os, sys\n\
        f = os.open(sys.argv[1], os.O_RDONLY); n = os.fstat(f).st_size\n\
        m = mmap.mmap(f, n, mmap.MAP_SHARED, mmap.PROT_READ)\n\
        print(sum(m[i] for i in range(0, n, 4096)))";
    let args = [
        "-c",
        script,
        "sh",
        FAULTLESS,
        source,
        data.to_str().expect("a plain path"),
    ];
    let nested = served(&["--compat"], Path::new("/bin/sh"), &args);
    nested.printed("14336\n");
    // Where the variable is gone, it says so instead of looping.
    let script = format!("unset FAULTLESS_RUN; {script}");
    let args = [
        "-c",
        script.as_str(),
        "sh",
        FAULTLESS,
        source,
        data.to_str().expect("a plain path"),
    ];
    let nested = served(&["--compat"], Path::new("/bin/sh"), &args);
    assert_eq!(nested.output.status.code(), Some(1));
    assert!(
        nested.stderr().contains("FAULTLESS_RUN"),
        "{}",
        nested.stderr()
    );
}

// ---- observe

/// A process whose threads have names that would act on a terminal, and that are no text. It says when it is ready.
struct Hostile(std::process::Child);

impl Hostile {
    fn start() -> Hostile {
        use std::io::Read as _;
        let source = "import ctypes, mmap, os, sys, threading\n\
            c = ctypes.CDLL(None)\n\
            c.prctl(15, b'\\xff\\x1b]0;PWN\\x07\\n)(', 0, 0, 0)\n\
            def maps():\n\
            \x20   while True:\n\
            \x20       m = mmap.mmap(-1, 1 << 20); m[0] = 1; m.close()\n\
            threading.Thread(target=maps, daemon=True).start()\n\
            print('ready', flush=True); sys.stdin.read()";
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", source])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("python3 is installed");
        let mut ready = [0; 6];
        let out = child.stdout.as_mut().expect("piped");
        out.read_exact(&mut ready)
            .expect("it says that it is ready");
        Hostile(child)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_cannot_hide_from_observe_nor_act_on_its_terminal() {
    if !possible(
        "a_process_cannot_hide_from_observe_nor_act_on_its_terminal",
        root(),
    ) {
        return;
    }
    let hostile = Hostile::start();
    let pid = hostile.0.id().to_string();
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let trace = dir.path().join("trace");
    for more in [&["--json"][..], &[]] {
        let output = Command::new(FAULTLESS)
            .args(["observe", "-p", &pid, "--duration", "500ms", "--trace"])
            .arg(&trace)
            .args(more)
            .output()
            .expect("it starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        harmless(&stderr);
        harmless(&String::from_utf8_lossy(&output.stdout));
    }
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(&trace)
        .expect("written")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600, "a trace has addresses in it");
    // Locks have numbers, not addresses.
    let file = std::fs::File::open(&trace).expect("written");
    for event in faultless_trace::Reader::new(file).expect("a trace") {
        if let faultless_trace::Event::Hold(hold) = event.expect("whole") {
            assert!(hold.lock.0 < 1000, "{:#x}", hold.lock.0);
        }
    }
    let replayed = Command::new(FAULTLESS)
        .args(["whatif", "--design", "faultless"])
        .arg(&trace)
        .output()
        .expect("it starts");
    harmless(&String::from_utf8_lossy(&replayed.stdout));
    harmless(&String::from_utf8_lossy(&replayed.stderr));
    // The live view, on a terminal of its own.
    let command = format!("stty rows 40 cols 120; {FAULTLESS} observe -p {pid} --duration 2s");
    let screen = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(std::process::Stdio::null())
        .output()
        .expect("script(1) is a part of util-linux");
    let shown = String::from_utf8_lossy(&screen.stdout);
    assert!(shown.contains("PWN"), "the thread is shown: {shown:?}");
    assert!(!shown.contains("\x1b]0;PWN"), "{shown:?}");
}
