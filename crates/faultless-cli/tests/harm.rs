//! `faultless run` does no harm: programs of the kinds that preloaded libraries and mapped files have broken, by themselves and
//! served. What they observe must be the same.

mod common;

use common::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const MIB: usize = 1 << 20;

/// A file whose every page differs from the others, out of the page cache.
fn file(name: &str, mib: usize) -> PathBuf {
    let path = scratch().join(format!("harm-{name}-{}", std::process::id()));
    let mut out = std::fs::File::create(&path).expect("the directory is writable");
    let mut page = vec![0u8; 4096];
    for i in 0..mib * MIB / 4096 {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (i * 31 + at * 7 + (i >> 8)) as u8;
        }
        out.write_all(&page).expect("written");
    }
    drop(out);
    cool(&path);
    path
}

fn lines(of: &Output) -> String {
    String::from_utf8_lossy(&of.stdout).into_owned()
}

/// Runs a program by itself and served, and wants the same output and status. The served run.
fn same(program: &Path, options: &[&str], args: &[&str]) -> Served {
    same_with(program, options, args, |_| ())
}

fn same_with(
    program: &Path,
    options: &[&str],
    args: &[&str],
    prepare: impl Fn(&mut Command),
) -> Served {
    let mut alone = Command::new("timeout");
    alone.args(["--signal=KILL", "120"]).arg(program).args(args);
    prepare(&mut alone);
    let alone = alone.output().expect("it starts");
    let served = served_by(options, program, args, |c| prepare(c));
    assert!(
        lines(&alone) == served.stdout() && alone.status == served.output.status,
        "{} {args:?} {options:?}\nby itself ({}):\n{}served ({}):\n{}{}",
        program.display(),
        alone.status,
        lines(&alone),
        served.output.status,
        served.stdout(),
        served.stderr()
    );
    served
}

/// Where a shared library of the distribution is.
fn installed(name: &str) -> Result<PathBuf, String> {
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"]
        .map(|dir| Path::new(dir).join(name))
        .into_iter()
        .find(|p| p.exists())
        .ok_or(format!("there is no {name} (./run setup installs it)"))
}

#[test]
fn programs_start_with_allocators_that_map_memory_while_they_prepare_themselves() {
    let data = file("allocators", 8);
    let reader = compile("reader", &[]);
    let mut allocators = vec![compile_as(
        "allocator",
        "allocator.so",
        &["-shared", "-fPIC"],
    )];
    for name in [
        "libjemalloc.so.2",
        "libtcmalloc_minimal.so.4",
        "libmimalloc.so.2.0",
    ] {
        let found = installed(name);
        if possible(name, found.clone().map(drop)) {
            allocators.extend(found);
        }
    }
    for (i, allocator) in allocators.iter().enumerate() {
        let linked = format!("reader-linked-{i}");
        let linked = compile_as("reader", &linked, &["-Wl,--no-as-needed", text(allocator)]);
        cool(&data);
        same(&linked, &[], &[text(&data)]).taken_over();
        cool(&data);
        same_with(&reader, &[], &[text(&data)], |c| {
            c.env("LD_PRELOAD", allocator);
        })
        .taken_over();
    }
    let _ = std::fs::remove_file(data);
}

#[test]
fn memory_at_addresses_that_were_a_mappings_is_never_discarded() {
    let program = compile("reuse", &[]);
    let data = file("reuse", 32);
    let served = same(&program, &["--memory", "12M"], &[text(&data)]);
    served
        .taken_over()
        .handed_back_because("unmapped or moved it past the C library");
    same(&program, &["--memory", "12M", "--compat"], &[text(&data)]).taken_over();
    let _ = std::fs::remove_file(data);
}

#[test]
fn pointers_that_cannot_be_read_are_for_the_kernel_to_refuse() {
    let program = compile("pointers", &[]);
    let data = scratch().join("harm-pointers.data");
    let known = Command::new(&program)
        .arg("--names")
        .output()
        .expect("it starts");
    let known = lines(&known);
    let exported = Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(library())
        .output();
    let exported = lines(&exported.expect("binutils come with the compiler"));
    let missing: Vec<&str> = exported
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .filter(|name| !name.starts_with("faultless_") && !name.starts_with("__st"))
        .filter(|name| !known.lines().any(|k| k == *name))
        .collect();
    assert!(missing.is_empty(), "no row in pointers.c for {missing:?}");
    same(&program, &[], &[text(&data)]);
    // (Then one of the program's mappings is writable.)
    let live = faultless::live::support().map(drop).map_err(str::to_owned);
    if possible("pointers_that_cannot_be_read, live", live) {
        same(&program, &["--backend", "live"], &[text(&data)]).taken_over();
        same(&program, &["--backend", "live"], &[text(&data), "good"]).taken_over();
    }
    let _ = std::fs::remove_file(data);
}

/// The functions that a C header declares, each with its parameters. (Attributes come behind them.)
fn declarations(header: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for declaration in header.split([';', '{', '}']) {
        let Some(open) = declaration.find('(') else {
            continue;
        };
        let name = declaration[..open].trim_end();
        let start = name
            .rfind(|c: char| !c.is_alphanumeric() && c != '_')
            .map_or(0, |i| i + 1);
        let mut depth = 0;
        let end = declaration[open..].find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0
        });
        if let Some(end) = end
            && declaration.trim_start().starts_with("extern")
            && start < name.len()
        {
            found.push((
                name[start..].to_owned(),
                declaration[open..open + end].to_owned(),
            ));
        }
    }
    found
}

#[test]
fn every_function_that_takes_memory_to_read_is_stood_before_or_has_a_reason() {
    let headers = Command::new("cc")
        .args(["-E", "-P", "-x", "c"])
        .arg(sources().join("headers.h"))
        .output()
        .expect("a C compiler");
    let declared = declarations(&lines(&headers));
    let exported = Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(library())
        .output();
    let exported = lines(&exported.expect("binutils come with the compiler"));
    let stood_before: std::collections::HashSet<&str> = exported
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .collect();
    let reasons = include_str!("calls.txt");
    let known: std::collections::HashSet<&str> = reasons
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .collect();
    let reads = |parameters: &str| {
        parameters
            .split(',')
            .any(|p| p.contains("const") && p.contains(['*', '[']))
    };
    let unknown: Vec<&str> = declared
        .iter()
        .filter(|(name, parameters)| reads(parameters) && !name.starts_with("__"))
        .map(|(name, _)| name.as_str())
        .filter(|name| !stood_before.contains(name) && !known.contains(name))
        .collect();
    assert!(
        declared.len() > 1000,
        "only {} declarations were found",
        declared.len()
    );
    assert!(
        unknown.is_empty(),
        "neither stood before nor in calls.txt: {unknown:?}"
    );
}

#[test]
fn one_call_does_its_work_in_one_piece() {
    let program = compile("append", &["-w"]);
    let data = file("append", 16);
    let log = scratch().join("harm-append.log");
    for how in ["write", "vector"] {
        cool(&data);
        same(
            &program,
            &["--memory", "16M"],
            &[text(&data), text(&log), how],
        )
        .taken_over();
    }
    let _ = std::fs::remove_file(data);
}

#[test]
fn the_kernel_finds_the_pages_of_every_call_that_reads_memory() {
    let data = scratch().join("harm-kernel-reads.data");
    let gone = scratch().join("harm-kernel-reads.gone");
    let mut bytes = vec![0u8; 16 * MIB];
    for (i, page) in bytes.chunks_mut(4096).enumerate() {
        page[4000] = i as u8;
    }
    let strings = [
        (1, "/bin/true"),
        (2, "from-the-map"),
        (3, text(&gone)),
        (4, "from-the-map"),
        (5, "from-the-map"),
        (6, "exit 5"),
        (7, "in-a-map"),
    ];
    for (mib, string) in strings {
        bytes[mib * MIB..][..string.len()].copy_from_slice(string.as_bytes());
    }
    std::fs::write(&data, bytes).expect("written");
    cool(&data);
    let program = compile("kernel_reads", &["-w"]);
    same(&program, &[], &[text(&data), text(&gone)]).taken_over();
    let _ = std::fs::remove_file(data);
}

#[test]
fn what_a_program_sees_of_a_mapping_is_the_kernels() {
    let program = compile("seen", &["-w"]);
    let data = file("seen", 8);
    // As users run it: what is in the page cache stays the kernel's.
    let alone = plain(&program, &[text(&data)]);
    let mut command = Command::new(FAULTLESS);
    command
        .args(["run", "--min-size", "64K", "--"])
        .arg(&program)
        .arg(&data);
    let served = command
        .env("FAULTLESS_LIBRARY", library())
        .output()
        .expect("it starts");
    assert_eq!(
        lines(&alone),
        lines(&served),
        "{}",
        String::from_utf8_lossy(&served.stderr)
    );
    let sealed = compile("sealed", &["-w"]);
    let small = file("sealed", 4);
    same(&sealed, &[], &[text(&small)]);
    for f in [data, small] {
        let _ = std::fs::remove_file(f);
    }
}

#[test]
fn files_that_are_cut_short_under_readers_crash_nobody() {
    let program = compile("cut_short", &["-w"]);
    let data = scratch().join("harm-cut-short.data");
    same(&program, &[], &[text(&data)]);
    let _ = std::fs::remove_file(data);
}

#[test]
fn a_mapping_that_loses_its_head_and_tail_is_served_on() {
    let program = compile("weights", &["-w"]);
    let data = file("weights", 48);
    for how in ["w", "p", "h"] {
        cool(&data);
        let served = same(&program, &[], &[text(&data), how]);
        served.taken_over();
        let handed_back = served.reports.iter().any(|r| !r.handed_back.is_empty());
        assert!(!handed_back, "{how}: {}", served.told());
    }
    let _ = std::fs::remove_file(data);
}

#[test]
fn a_ring_that_is_made_past_the_library_finds_its_memory() {
    let program = compile("ring_past", &["-w"]);
    let data = file("ring-past", 8);
    let out = scratch().join("harm-ring-past.out");
    let served = same(&program, &[], &[text(&data), text(&out)]);
    if served.output.status.success() {
        served.handed_back_because("io_uring");
    }
    let _ = std::fs::remove_file(data);
}

#[test]
fn windows_that_do_not_pay_are_left_alone_and_so_are_files_in_the_page_cache() {
    let program = compile("windows", &["-w"]);
    let data = file("windows", 8);
    let run = |options: &[&str]| {
        let json = tempfile::NamedTempFile::new_in(scratch()).expect("a temporary file");
        let mut command = Command::new(FAULTLESS);
        command
            .args(["run", "--min-size", "64K", "--stats-json"])
            .arg(json.path())
            .args(options);
        command
            .arg("--")
            .arg(&program)
            .arg(&data)
            .env("FAULTLESS_LIBRARY", library());
        assert!(command.status().expect("it starts").success());
        let reports = faultless_run::read_reports(json.path()).expect("reports are JSON lines");
        let taken: u64 = reports.iter().map(|r| r.totals.mappings).sum();
        let left: u64 = reports
            .iter()
            .flat_map(|r| &r.left_alone)
            .map(|l| l.mappings)
            .sum();
        (taken, left)
    };
    let (taken, left) = run(&[]);
    assert!(taken == 0 && left >= 3000, "{taken} {left}");
}

// ---- neighbours

/// A program that maps a file, says so, and ends when it is told.
struct Holder(Child);

impl Holder {
    fn start(data: &Path, options: &[&str]) -> Holder {
        const SOURCE: &str = "import mmap, os, sys\n\
            f = os.open(sys.argv[1], os.O_RDONLY); n = os.fstat(f).st_size\n\
            m = mmap.mmap(f, n, mmap.MAP_SHARED, mmap.PROT_READ); os.close(f)\n\
            x = sum(m[i] for i in range(0, n, 4096)); print('ready', flush=True); sys.stdin.readline()\n\
            print(m[0], m[n // 2], flush=True); sys.stdin.read()";
        let mut child = Command::new(FAULTLESS)
            .args(["run", "--eager"])
            .args(options)
            .args(["--", "/usr/bin/python3", "-c", SOURCE])
            .arg(data)
            .env("FAULTLESS_LIBRARY", library())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut ready = [0; 6];
        let out = child.stdout.as_mut().expect("piped");
        out.read_exact(&mut ready)
            .expect("it says that it is ready");
        Holder(child)
    }

    /// What it reads now.
    fn reads(mut self) -> String {
        self.0
            .stdin
            .as_mut()
            .expect("piped")
            .write_all(b"\n")
            .expect("it reads");
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().expect("piped"))
            .read_line(&mut line)
            .expect("a line");
        let _ = self.0.kill();
        let _ = self.0.wait();
        line
    }
}

fn open_for_writing(path: &Path, flags: i32) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(path)
}

#[test]
fn a_writer_goes_on_and_the_program_reads_what_was_written() {
    use std::os::unix::fs::FileExt;
    let data = file("written", 8);
    let holder = Holder::start(&data, &[]);
    let writer = open_for_writing(&data, 0).expect("the lease is given up");
    writer.write_at(&[77], 0).expect("written");
    assert!(holder.reads().starts_with("77 "), "not the new byte");
    let _ = std::fs::remove_file(data);
}

#[test]
fn without_leases_nobody_who_opens_a_file_is_refused() {
    let data = file("no-lease", 8);
    let holder = Holder::start(&data, &["--no-lease"]);
    open_for_writing(&data, libc_nonblock()).expect("nobody is in the way");
    drop(holder);
    // With one, the kernel refuses a first opener that will not wait (docs/run.md), and nobody after that.
    cool(&data);
    let _holder = Holder::start(&data, &[]);
    let refused = open_for_writing(&data, libc_nonblock())
        .err()
        .and_then(|e| e.raw_os_error());
    assert!(matches!(refused, Some(11) | None), "{refused:?}");
    open_for_writing(&data, 0).expect("the lease is given up");
    open_for_writing(&data, libc_nonblock()).expect("and no other is taken");
    let _ = std::fs::remove_file(data);
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `O_NONBLOCK`.
fn libc_nonblock() -> i32 {
    0o4000
}

#[test]
fn a_file_that_was_written_once_is_left_to_the_kernel() {
    let data = file("once-written", 4);
    let source = "import mmap, os, sys\n\
        def m():\n f = os.open(sys.argv[1], 0); r = mmap.mmap(f, 4 << 20, mmap.MAP_SHARED, 1); os.close(f); return r\n\
        a = m(); x = a[0]; os.close(os.open(sys.argv[1], os.O_RDWR)); b = m(); print(a[4096] + b[8192])\n\
        if os.fork() == 0:\n print(m()[1 << 20], flush=True); os._exit(0)\n\
        os.wait()";
    let served = same(
        Path::new("/usr/bin/python3"),
        &[],
        &["-c", source, text(&data)],
    );
    served
        .handed_back_because("opened for writing")
        .left_because("opened for writing while it was mapped before");
    let _ = std::fs::remove_file(data);
}

// ---- children of other kinds

#[test]
fn children_that_the_library_does_not_fit_run_as_if_it_were_not_there() {
    let hello = scratch().join("hello.c");
    std::fs::write(
        &hello,
        "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 3; }\n",
    )
    .expect("written");
    let build = |name: &str, compiler: &str, flags: &[&str]| -> Result<PathBuf, String> {
        let out = scratch().join(name);
        let built = Command::new(compiler)
            .args(flags)
            .arg("-o")
            .arg(&out)
            .arg(&hello)
            .output();
        match built {
            Ok(o) if o.status.success() => Ok(out),
            _ => Err(format!(
                "{compiler} {flags:?} cannot build it (./run setup installs it)"
            )),
        }
    };
    let kinds = [
        ("hello-musl", "musl-gcc", &[][..]),
        ("hello-static", "cc", &["-static"]),
        ("hello-32", "cc", &["-m32"]),
        ("hello-asan", "cc", &["-fsanitize=address"]),
        ("hello-tsan", "cc", &["-fsanitize=thread"]),
    ];
    for (name, compiler, flags) in kinds {
        let built = build(name, compiler, flags);
        if !possible(name, built.clone().map(drop)) {
            continue;
        }
        let program = built.expect("checked");
        for call in ["%s", "env %s", "exec %s", "(exec -a other %s)"] {
            let command = call.replace("%s", text(&program)) + "; echo $?";
            let alone = plain(Path::new("/bin/bash"), &["-c", &command]);
            let served = served(&[], Path::new("/bin/bash"), &["-c", &command]);
            served.same_as(&alone);
            assert_eq!(
                served.stderr(),
                String::from_utf8_lossy(&alone.stderr),
                "{name} {call}"
            );
        }
    }
}

#[test]
fn a_child_in_another_root_directory_runs_silently() {
    let root = scratch().join("other-root");
    let program = compile("reader", &[]);
    let needs = Command::new("ldd").arg(&program).output().expect("ldd");
    for line in lines(&needs).lines() {
        if let Some(path) = line.split_whitespace().find(|w| w.starts_with('/')) {
            let to = root.join(&path[1..]);
            std::fs::create_dir_all(to.parent().expect("not the root")).expect("a directory");
            std::fs::copy(path, to).expect("copied");
        }
    }
    std::fs::copy(&program, root.join("prog")).expect("copied");
    let command = format!("chroot {} /prog /prog; echo $?", root.display());
    let alone = plain(Path::new("/bin/sh"), &["-c", &command]);
    let served = served(&[], Path::new("/bin/sh"), &["-c", &command]);
    served.same_as(&alone);
    assert_eq!(served.stderr(), String::from_utf8_lossy(&alone.stderr));
}

#[test]
fn a_program_with_a_sanitizer_runs_unserved_and_one_sentence_says_so() {
    let data = file("sanitizers", 8);
    for kind in ["address", "thread", "undefined", "leak"] {
        let name = format!("reader-{kind}");
        let program = compile_as("reader", &name, &[&format!("-fsanitize={kind}")]);
        let served = same(&program, &[], &[text(&data)]);
        let says = served.stderr().matches("contains a sanitizer").count();
        assert_eq!(
            says,
            usize::from(kind != "undefined"),
            "{kind}: {}",
            served.stderr()
        );
    }
    let _ = std::fs::remove_file(data);
}

// ---- sandboxes and limits

#[test]
fn limits_that_the_engine_would_count_towards_leave_a_program_to_the_kernel() {
    let data = file("limits", 8);
    let reader = compile("reader", &[]);
    let cases = [
        ("ulimit -v 4000000", "address space is limited"),
        ("ulimit -d 4000000", "data are limited"),
        ("ulimit -n 64", "may open few files"),
    ];
    for (limit, why) in cases {
        let command = format!("{limit}; exec {} {}", reader.display(), data.display());
        let alone = plain(Path::new("/bin/bash"), &["-c", &command]);
        cool(&data);
        let served = served(&[], Path::new("/bin/bash"), &["-c", &command]);
        served.same_as(&alone).took_nothing().left_because(why);
    }
    // With a limit that can be exceeded, the program finds all of its descriptors.
    let command = format!(
        "ulimit -Sn 64; exec /usr/bin/python3 -c '{}' {}",
        COUNT,
        data.display()
    );
    let alone = plain(Path::new("/bin/bash"), &["-c", &command]);
    cool(&data);
    served(&[], Path::new("/bin/bash"), &["-c", &command])
        .same_as(&alone)
        .taken_over();
    let _ = std::fs::remove_file(data);
}

/// Maps and reads a file, then opens descriptors until there are none.
const COUNT: &str = "import mmap, os, sys\n\
    f = os.open(sys.argv[1], 0); m = mmap.mmap(f, 8 << 20, mmap.MAP_SHARED, 1); os.close(f)\n\
    x = sum(m[i] for i in range(0, 8 << 20, 4096)); n = 0\n\
    try:\n\
    \x20while True: os.open(\"/dev/null\", 0); n += 1\n\
    except OSError as e: print(n, e.errno, x)";

#[test]
fn in_a_control_group_a_program_survives_the_heaps_that_it_survives_by_itself() {
    let group = Path::new("/sys/fs/cgroup/memory/faultless-harm");
    let limit = group.join("memory.limit_in_bytes");
    let (group, limit) = if Path::new("/sys/fs/cgroup/memory").exists() {
        (group.to_owned(), limit)
    } else {
        let group = PathBuf::from("/sys/fs/cgroup/faultless-harm");
        (group.clone(), group.join("memory.max"))
    };
    let made = std::fs::create_dir_all(&group)
        .and_then(|()| std::fs::write(&limit, (96 * MIB).to_string()))
        .map_err(|e| format!("no memory control group can be made: {e}"));
    if !possible("in_a_control_group", made) {
        return;
    }
    let program = compile("heap", &["-w"]);
    let data = file("heap", 64);
    let join = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", group.display());
    let status = |served: bool, heap: &str| {
        cool(&data);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &join, "sh"]);
        if served {
            command
                .arg(FAULTLESS)
                .args(["run", "--"])
                .env("FAULTLESS_LIBRARY", library());
        }
        command.arg(&program).arg(&data).arg(heap);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().expect("it starts").success()
    };
    // The largest heap that it survives three times by itself.
    let most = (70..92)
        .rev()
        .find(|heap| (0..3).all(|_| status(false, &heap.to_string())))
        .expect("it survives a heap of 70 MiB");
    // (So near to the limit it depends on what else the machine does whether the kernel finds a page to take back: by itself the program
    // does not survive its largest heap each time either.)
    for (heap, tries) in [(20, 1), (60, 1), (most - 8, 3), (most - 4, 3)] {
        assert!(
            (0..tries).any(|_| status(true, &heap.to_string())),
            "a heap of {heap} MiB in {tries} tries; by itself it survives {most}"
        );
    }
    let _ = std::fs::remove_dir(&group);
    let _ = std::fs::remove_file(data);
}

// ---- one thread

#[test]
fn mappings_of_a_program_with_one_thread_are_the_kernels_until_it_creates_a_second() {
    let program = compile("later", &[]);
    let data = scratch().join("later.data");
    let data = data.to_str().expect("a plain path");
    let alone = plain(&program, &[data]);
    assert!(
        alone.status.success(),
        "{}",
        String::from_utf8_lossy(&alone.stderr)
    );
    for more in [&[][..], &["--compat"], &["--no-lease", "--trust", "*"]] {
        let options = [&["--min-size", "1M", "--memory", "64M"], more].concat();
        let served = served_as_it_comes(&options, &program, &[data], |_| ());
        served.same_as(&alone);
        served.left_because("before it had a second thread");
        // Three that waited, in place, and one that came later.
        let mapped: u64 = served.reports.iter().map(|r| r.totals.mappings).sum();
        assert_eq!(mapped, 4, "{more:?}: {}", served.told());
        assert!(
            served.stderr().contains("plain 0, shared 0, random 0"),
            "{}",
            served.stderr()
        );
    }
}

#[test]
fn a_program_that_never_has_a_second_thread_gets_none_of_ours() {
    let data = once("one-thread.data", |path| {
        std::fs::write(path, vec![7; 8 << 20]).expect("written");
    });
    cool(&data);
    const SOURCE: &str = "import mmap, os, sys, warnings\n\
        warnings.simplefilter('error')\n\
        f = os.open(sys.argv[1], os.O_RDONLY); n = os.fstat(f).st_size\n\
        m = mmap.mmap(f, n, mmap.MAP_SHARED, mmap.PROT_READ)\n\
        print(sum(m[i] for i in range(0, n, 4096)), len(os.listdir('/proc/self/task')))\n\
        pid = os.fork()\n\
        if pid == 0: os._exit(m[n - 1])\n\
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))";
    let data = data.to_str().expect("a plain path");
    let served = served_as_it_comes(
        &["--min-size", "1M"],
        Path::new("/usr/bin/python3"),
        &["-c", SOURCE, data],
        |_| (),
    );
    served.printed("14336 1\n7\n").took_nothing();
    served.left_because("the program has one thread");
}

#[test]
fn the_second_thread_can_be_one_of_a_librarys_constructor() {
    let library = compile_as("opens", "opens.so", &["-shared", "-fPIC", "-DLIBRARY"]);
    let program = compile("opens", &["-ldl"]);
    let data = scratch().join("opens.data");
    let args = [text(&library), text(&data)];
    served_as_it_comes(
        &["--min-size", "1M", "--memory", "64M"],
        &program,
        &args,
        |_| (),
    )
    .printed("all bytes are right\n")
    .taken_over();
    // The same where the mapping is taken over immediately.
    same(&program, &["--memory", "64M"], &args).taken_over();
}
