//! What `faultless run` promises to a program, by programs that check it from within.

mod common;

use common::*;
use std::path::Path;
use std::process::Command;

#[test]
fn every_call_that_hands_the_kernel_memory_finds_it_there() {
    let served = both("calls", &["--memory", "64M"]);
    served.taken_over();
    let mended: Vec<_> = served.reports.iter().flat_map(|r| &r.efaults).collect();
    assert!(
        mended.iter().any(|e| e.call == "open") && mended.iter().any(|e| e.call == "getxattr"),
        "{}",
        served.told()
    );
}

#[test]
fn mappings_are_cut_replaced_protected_moved_locked_and_advised_as_the_kernels_are() {
    let served = both("shape", &["--memory", "64M"]);
    served
        .taken_over()
        .handed_back_because("MAP_FIXED")
        .handed_back_because("mprotect")
        .handed_back_because("mremap")
        .handed_back_because("mlock")
        .handed_back_because("opened for writing");
}

#[test]
fn signals_are_the_programs_own() {
    both("signals", &["--memory", "64M"]).taken_over();
    // A fault that is really the program's ends it, with a core dump's signal, and says so.
    let program = scratch().join("signals");
    let data = scratch().join("signals.end.data");
    let served = served(
        &["--memory", "64M"],
        &program,
        &[data.to_str().expect("a plain path"), "end"],
    );
    served.ended_by(libc::SIGBUS);
    assert!(
        served.stderr().contains("signals.end.data, offset"),
        "{}",
        served.stderr()
    );
    let _ = std::fs::remove_file(data);
}

#[test]
fn children_find_the_mappings_descriptors_are_not_seen_and_locks_not_lost() {
    let served = both("family", &["--memory", "64M"]);
    served.taken_over().left_because("POSIX locks for writing");
    // The executed children were served as well.
    let programs = served
        .reports
        .iter()
        .filter(|r| r.totals.misses > 0)
        .count();
    assert!(programs >= 4, "{}", served.told());
}

#[test]
fn a_storm_of_mappings_writers_and_forks_reads_the_right_bytes() {
    for _ in 0..3 {
        both("storm", &["--memory", "16M"])
            .taken_over()
            .handed_back_because("opened for writing");
    }
}

#[test]
fn calls_that_bypass_the_library_are_served_with_compat_and_told_without() {
    let program = compile("raw", &[]);
    let data = scratch().join("raw.data");
    let data = data.to_str().expect("a plain path");
    let compat = served(&["--memory", "64M", "--compat"], &program, &[data]);
    // The executed child prints what its call returned.
    compat.printed("100\ngood\n").taken_over();
    let without = served(&["--memory", "64M"], &program, &[data, "child"]);
    without.printed(&format!("{}\n", -libc::EFAULT));
    if without.reports.iter().all(|r| r.efaults_watched) {
        let told = without
            .reports
            .iter()
            .flat_map(|r| &r.efaults)
            .any(|e| e.call == "write" && !e.mended && e.count == 1);
        assert!(told, "{}", without.told());
    } else {
        possible(
            "EFAULT is counted",
            Err("it takes CAP_PERFMON, or root".into()),
        );
    }
    let _ = std::fs::remove_file(data);
}

#[test]
fn what_the_program_unmapped_stays_unmapped() {
    both("holes", &["--memory", "64M"]).taken_over();
}

#[test]
fn the_engine_s_threads_keep_out_of_the_holes_of_a_program_with_one_thread() {
    both("alone", &["--memory", "64M"]).taken_over();
    both("alone", &["--memory", "64M", "--compat"]).taken_over();
}

#[test]
fn all_that_holds_without_compat_holds_with_it() {
    for name in ["calls", "shape", "holes", "signals", "family", "storm"] {
        both(name, &["--memory", "64M", "--compat"]).taken_over();
    }
}

#[test]
fn a_ring_is_left_alone() {
    if !possible(
        "a_ring_is_left_alone",
        commands(&["/usr/include/liburing.h"]),
    ) {
        return;
    }
    let program = compile("ring", &["-luring"]);
    let data = scratch().join("ring.data");
    let data = data.to_str().expect("a plain path");
    let served = served(&[], &program, &[data]);
    if served.output.status.code() == Some(77) {
        possible(
            "a_ring_is_left_alone",
            Err(format!("io_uring is not permitted: {}", served.stdout())),
        );
        return;
    }
    served
        .printed("good\n")
        .left_alone("ring.data")
        .left_because("io_uring");
}

fn shell() -> &'static Path {
    Path::new("/bin/sh")
}

#[test]
fn status_signals_input_and_output_are_the_programs() {
    let sh = shell();
    assert_eq!(
        served(&[], sh, &["-c", "exit 7"]).output.status.code(),
        Some(7)
    );
    served(&[], sh, &["-c", "kill -TERM $$"]).ended_by(libc::SIGTERM);
    // SIGPIPE as it was: ignored, or not.
    for (before, status) in [("trap '' PIPE; ", "1"), ("", "141")] {
        let script = format!(
            "{before}exec {FAULTLESS} run -- sh -c '(yes; echo $? >&3) | head -n 1 >/dev/null' 3>&1 2>/dev/null"
        );
        let output = Command::new("sh")
            .args(["-c", &script])
            .env("FAULTLESS_LIBRARY", library())
            .output()
            .expect("it starts");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            status,
            "{before}"
        );
    }
    served(
        &[],
        sh,
        &["-c", "echo out; echo err >&2; echo $0 \"$1\"", "zero", "-x"],
    )
    .printed("out\nzero -x\n");
    // Its name, as it was called.
    served(
        &[],
        Path::new("sh"),
        &["-c", "tr '\\0' ' ' </proc/$$/cmdline | cut -c 1-5"],
    )
    .printed("sh -c\n");
    // What was preloaded before stays.
    let with = served_by(&[], sh, &["-c", "echo $LD_PRELOAD"], |c| {
        c.env("LD_PRELOAD", "libc.so.6");
    });
    assert!(
        with.stdout()
            .trim_end()
            .ends_with("libfaultless_preload.so:libc.so.6"),
        "{}",
        with.stdout()
    );
}

/// Runs the command itself, and gives status and stderr.
fn command(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(FAULTLESS)
        .args(args)
        .env("FAULTLESS_LIBRARY", library())
        .output()
        .expect("it starts");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn what_cannot_be_served_is_refused_in_one_sentence() {
    let (status, said) = command(&["run", "--", "no-such-program-anywhere"]);
    assert!(
        status == Some(1) && said.contains("no-such-program-anywhere") && said.lines().count() == 1,
        "{said}"
    );
    let source = scratch().join("static.c");
    std::fs::write(&source, "int main(void) { return 0; }\n").expect("writable");
    let program = scratch().join("static");
    let made = Command::new("cc")
        .args(["-static", "-o"])
        .arg(&program)
        .arg(&source)
        .status()
        .expect("a C compiler");
    if possible(
        "a static program is refused",
        made.success()
            .then_some(())
            .ok_or("cc cannot link statically".into()),
    ) {
        let (status, said) = command(&["run", "--", program.to_str().expect("a plain path")]);
        assert!(
            status == Some(1) && said.contains("statically linked") && said.lines().count() == 1,
            "{said}"
        );
    }
    let text = scratch().join("text");
    std::fs::write(&text, "hello\n").expect("writable");
    let (status, said) = command(&["run", "--", text.to_str().expect("a plain path")]);
    assert!(
        status == Some(1) && said.contains("not executable"),
        "{said}"
    );
    let (status, said) = command(&["run", "--memory", "1K", "--", "true"]);
    assert!(
        status == Some(2) && said.contains("1 KiB") && said.contains("at least"),
        "{said}"
    );
    let (status, said) = command(&["run", "--trust", "a[", "--", "true"]);
    assert!(status == Some(2) && said.contains("a["), "{said}");
    assert_eq!(command(&["run"]).0, Some(2));
    assert_eq!(
        command(&["run", "--no-such-option", "--", "true"]).0,
        Some(2)
    );
    let (status, said) = command(&["run", "--stats-json", "/no/such/directory/f", "--", "true"]);
    assert!(
        status == Some(1) && said.contains("/no/such/directory/f"),
        "{said}"
    );
    let output = Command::new(FAULTLESS)
        .args(["run", "--", "true"])
        .env("FAULTLESS_LIBRARY", "/no/such/library.so")
        .output()
        .expect("it starts");
    assert!(
        output.status.code() == Some(1)
            && String::from_utf8_lossy(&output.stderr).contains("/no/such/library.so")
    );
}

#[test]
fn a_setuid_program_is_refused_to_who_would_gain_by_it() {
    #[allow(unsafe_code, reason = "geteuid(2)")]
    // SAFETY: takes nothing.
    let root = unsafe { libc::geteuid() } == 0;
    if !possible(
        "a_setuid_program",
        root.then_some(()).ok_or("only root can make one".into()),
    ) {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let program = scratch().join("setuid");
    std::fs::copy("/bin/true", &program).expect("copied");
    std::os::unix::fs::chown(&program, Some(65534), None).expect("chown");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).expect("chmod");
    let (status, said) = command(&["run", "--", program.to_str().expect("a plain path")]);
    assert!(
        status == Some(1) && said.contains("setuid") && said.lines().count() == 1,
        "{said}"
    );
}

/// A program that reads a file through a mapping, once.
const READ_ONCE: &str = "import mmap,sys,hashlib\n\
    f = open(sys.argv[1], 'rb')\n\
    m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n\
    print(hashlib.sha256(m).hexdigest())\n\
    print(sys.argv[2:])";

/// A file of 8 MiB: each test that opens it for writing has one of its own.
fn some_file() -> std::path::PathBuf {
    eight_mib("some.file")
}

fn eight_mib(name: &str) -> std::path::PathBuf {
    once(name, |path| {
        let bytes: Vec<u8> = (0..8u32 << 20)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        std::fs::write(path, bytes).expect("writable");
    })
}

#[test]
fn options_choose_what_is_taken_over() {
    if !possible("options_choose", commands(&["/usr/bin/python3"])) {
        return;
    }
    let file = eight_mib("options.file");
    let file = file.to_str().expect("a plain path");
    let args = ["-c", READ_ONCE, file, "--memory"];
    let by_itself = plain(python(), &args);
    served(&[], python(), &args)
        .same_as(&by_itself)
        .taken_over_of("options.file");
    served(&["--skip", "options.*"], python(), &args)
        .same_as(&by_itself)
        .left_alone("options.file")
        .left_because("--skip");
    served(&["--only", "/no/*"], python(), &args)
        .same_as(&by_itself)
        .left_alone("options.file")
        .left_because("--only");
    served(&["--only", "*/options.file"], python(), &args)
        .same_as(&by_itself)
        .taken_over_of("options.file");
    served(&["--min-size", "9M"], python(), &args)
        .same_as(&by_itself)
        .left_alone("options.file");
    for reads in ["direct", "buffered"] {
        served(&["--reads", reads], python(), &args)
            .same_as(&by_itself)
            .taken_over_of("options.file");
    }
    // A dry run says what would be, and does nothing.
    let dry = served(&["--dry-run"], python(), &args);
    dry.same_as(&by_itself);
    let would = dry
        .reports
        .iter()
        .flat_map(|r| &r.files)
        .any(|f| f.path.ends_with("options.file"));
    assert!(
        would
            && dry
                .reports
                .iter()
                .all(|r| r.dry_run && r.totals.misses == 0),
        "{}",
        dry.told()
    );
    // While somebody has it open for writing, only who is trusted is taken over.
    let writer = std::fs::OpenOptions::new()
        .append(true)
        .open(file)
        .expect("ours");
    served(&[], python(), &args)
        .same_as(&by_itself)
        .left_alone("options.file")
        .left_because("open for writing");
    served(&["--trust", "options.file"], python(), &args)
        .same_as(&by_itself)
        .taken_over_of("options.file");
    drop(writer);
}

#[test]
fn a_file_in_memory_is_left_alone() {
    if !possible(
        "a_file_in_memory",
        commands(&["/usr/bin/python3", "/dev/shm"]),
    ) {
        return;
    }
    let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("writable");
    std::fs::copy(some_file(), file.path()).expect("copied");
    let args = ["-c", READ_ONCE, file.path().to_str().expect("a plain path")];
    served(&[], python(), &args)
        .same_as(&plain(python(), &args))
        .left_because("in memory");
}

#[test]
fn stats_are_told_on_stderr_at_the_end_and_on_sigusr2() {
    if !possible("stats_are_told", commands(&["/usr/bin/python3"])) {
        return;
    }
    let file = some_file();
    let text = "import mmap,sys,os,signal,time\n\
        f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); x = m[5000000]\n\
        os.kill(os.getpid(), signal.SIGUSR2)\n\
        while not os.path.getsize(sys.argv[2]): time.sleep(0.01)\n\
        print('still here')";
    let json = tempfile::NamedTempFile::new_in(scratch()).expect("a temporary file");
    let output = Command::new("timeout")
        .args([
            "--signal=KILL",
            "60",
            FAULTLESS,
            "run",
            "--eager",
            "--stats",
            "--stats-json",
        ])
        .arg(json.path())
        .args(["--"])
        .arg(python())
        .args(["-c", text])
        .arg(&file)
        .arg(json.path())
        .env("FAULTLESS_LIBRARY", library())
        .output()
        .expect("it starts");
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success() && out == "still here\n",
        "{out}{err}"
    );
    assert_eq!(err.matches("taken over: ").count(), 2, "{err}");
    assert!(err.contains("some.file (lease)"), "{err}");
    let reports = faultless_run::read_reports(json.path()).expect("JSON lines");
    let reasons: Vec<_> = reports.iter().map(|r| r.reason.as_str()).collect();
    assert_eq!(reasons, ["asked", "exit"]);
}

#[test]
fn a_tree_of_processes_shares_one_budget() {
    if !possible("a_tree_of_processes", commands(&["/usr/bin/python3"])) {
        return;
    }
    let file = once("tree.file", |path| {
        std::fs::write(path, vec![7u8; 96 << 20]).expect("writable");
    });
    // Four workers, forked before they map, read all of the file, again and again, concurrently. None ends before all have read, and
    // had time to tell each other of it, eight times over. Meanwhile each goes on to use the same 8 MiB, and ends with its mapping: so the
    // first one that ends has heard of all.
    let text = "import mmap,sys,os,time,select\n\
        f = open(sys.argv[1], 'rb'); done, go = os.pipe(), os.pipe()\n\
        def work():\n\
        \x20   os.close(go[1])\n\
        \x20   m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); end = time.time() + 3; n = 0\n\
        \x20   while time.time() < end or n < 2:\n\
        \x20       assert sum(m[i] for i in range(n % 4096, len(m), 4096)) == 7 * (len(m) // 4096); n += 1\n\
        \x20   os.write(done[1], b'x')\n\
        \x20   while not select.select([go[0]], [], [], 0.05)[0]: assert sum(m[i] for i in range(0, 8 << 20, 4096)) == 7 * 2048\n\
        \x20   os._exit(0)\n\
        children = []\n\
        for i in range(4):\n\
        \x20   child = os.fork()\n\
        \x20   if not child: work()\n\
        \x20   children.append(child)\n\
        for i in range(4): os.read(done[0], 1)\n\
        time.sleep(2); os.close(go[1])\n\
        assert all(os.waitpid(c, 0)[1] == 0 for c in children)";
    let memory = 64u64 << 20;
    let served = served(
        &["--memory", "64M"],
        python(),
        &["-c", text, file.to_str().expect("a plain path")],
    );
    served.printed("").taken_over();
    let workers: Vec<_> = served
        .reports
        .iter()
        .filter(|r| r.totals.mappings > 0)
        .collect();
    assert_eq!(workers.len(), 4, "{}", served.told());
    for w in &workers {
        assert_eq!(w.totals.memory_tree_bytes, memory);
        assert!(
            w.totals.used_bytes <= memory * 3 / 4,
            "one process has almost all: {}",
            served.told()
        );
    }
    // They hold the same pages several times, and say so.
    assert!(
        workers.iter().any(|w| w.totals.duplicated_bytes > 4 << 20),
        "{}",
        served.told()
    );
}

#[test]
fn programs_in_c_can_call_the_engine() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../faultless-preload");
    let lib = library().parent().expect("in a directory");
    let program = scratch().join("search");
    let status = Command::new("cc")
        .args([
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-std=c11",
            "-I",
        ])
        .arg(root.join("include"))
        .arg("-o")
        .arg(&program)
        .arg(root.join("examples/search.c"))
        .arg("-L")
        .arg(lib)
        .arg("-lfaultless_preload")
        .arg(format!("-Wl,-rpath,{}", lib.display()))
        .status()
        .expect("a C compiler");
    assert!(status.success());
    let file = scratch().join("search.data");
    let mut text = Vec::new();
    for i in 0..3_000_000 {
        text.extend_from_slice(format!("line {i} of some text\n").as_bytes());
        if i % 1000 == 7 {
            text.extend_from_slice(format!("a needle, number {i}\n").as_bytes());
        }
    }
    std::fs::write(&file, &text).expect("writable");
    cool(&file);
    let output = plain(&program, &["needle", file.to_str().expect("a plain path")]);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(out.starts_with("needle, number 7\n3000 lines; "), "{out}");
    let output = plain(&program, &["needle", "/no/such/file"]);
    assert!(
        !output.status.success()
            && String::from_utf8_lossy(&output.stderr).contains("/no/such/file")
    );
    let _ = std::fs::remove_file(file);
}

#[test]
fn a_library_that_is_unloaded_leaves_no_handler_without_code() {
    let program = compile("unloaded", &[]);
    let empty = scratch().join("empty");
    std::fs::write(&empty, b"").expect("writable");
    let arguments = [library(), &empty].map(|p| p.to_str().expect("a plain path"));
    let output = plain(&program, &arguments);
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
