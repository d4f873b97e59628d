//! `faultless run --backend live`: the kernel's own mappings, of files that others write, and in programs that have a use for SIGSEGV.

mod common;

use common::*;
use std::path::Path;

const LIVE: [&str; 2] = ["--backend", "live"];

/// Whether mappings can be served live here.
fn live(test: &str) -> bool {
    possible(
        test,
        faultless::live::support().map(drop).map_err(str::to_owned),
    )
}

#[test]
fn a_live_mapping_is_the_kernels_while_others_write_to_the_file_and_cut_it_and_handle_faults() {
    if live("a_live_mapping_is_the_kernels") {
        let served = both("live", &LIVE);
        served.taken_over().handed_back_because("mprotect");
        let files = served.reports.iter().flat_map(|r| &r.files);
        assert!(
            files
                .into_iter()
                .all(|f| f.backend == "live" && !f.why.is_empty()),
            "{}",
            served.told()
        );
    }
}

#[test]
fn all_that_holds_for_stand_ins_holds_for_live_mappings() {
    if !live("all_that_holds_for_stand_ins_holds_for_live_mappings") {
        return;
    }
    for compat in [&LIVE[..], &["--backend", "live", "--compat"]] {
        for name in ["shape", "holes", "signals", "family", "storm"] {
            both(name, compat).taken_over();
        }
        // (The kernel alone touches its pages: markers are removed, and none is missed.)
        let served = both("calls", compat);
        let files = served.reports.iter().flat_map(|r| &r.files);
        assert!(
            files.into_iter().any(|f| f.backend == "live"),
            "{}",
            served.told()
        );
    }
}

#[test]
fn what_is_mapped_where_a_live_mapping_was_is_never_touched() {
    if live("what_is_mapped_where_a_live_mapping_was_is_never_touched") {
        let served = both("handed_on", &LIVE);
        served.taken_over().handed_back_because("mprotect");
    }
}

#[test]
fn what_a_program_and_the_kernel_write_to_a_live_mapping_is_there() {
    if live("what_a_program_and_the_kernel_write_to_a_live_mapping_is_there") {
        let served = both("written", &LIVE);
        served
            .taken_over()
            .handed_back_because("the stack of a thread")
            .handed_back_because("the buffer of a stream");
        // Mappings that are made while there is one thread wait for the second.
        let program = compile("written", &[]);
        let data = scratch().join("written.waiting.data");
        let served = served_as_it_comes(&LIVE, &program, &[text(&data)], |_| ());
        served
            .printed("good\n")
            .taken_over()
            .left_because("changed or locked it before it had a second thread");
        let _ = std::fs::remove_file(data);
    }
}

#[test]
fn memory_that_happens_to_have_a_file_is_left_alone() {
    if !live("memory_that_happens_to_have_a_file_is_left_alone") {
        return;
    }
    let program = compile("memory", &[]);
    let data = scratch().join("memory.data");
    let served = served(&LIVE, &program, &[text(&data)]);
    served
        .printed("good\n")
        .took_nothing()
        .left_because("has never been written to")
        .left_because("its file has no name");
    let compat = [&LIVE[..], &["--compat"]].concat();
    let program = compile("written", &[]);
    let served = common::served(&compat, &program, &[text(&data)]);
    served
        .printed("good\n")
        .left_because("--compat does not see what the kernel writes to");
    let _ = std::fs::remove_file(data);
}

#[test]
fn numpy_arrays_that_are_written_to() {
    if !live("arrays_written") || !possible("arrays_written", modules("numpy")) {
        return;
    }
    let script = source("arrays_written.py");
    let file = scratch().join("arrays_written.data");
    write_mixed(&file, 64 << 20);
    let by_itself = plain(python(), &[&script, text(&file)]);
    assert!(by_itself.status.success());
    write_mixed(&file, 64 << 20);
    cool(&file);
    let served = served(&LIVE, python(), &[&script, text(&file)]);
    served.same_as(&by_itself);
    served_live(&served, "arrays_written.data");
    let _ = std::fs::remove_file(file);
}

#[test]
fn pages_of_a_live_mapping_that_were_reclaimed_are_served_again() {
    if !live("pages_of_a_live_mapping_that_were_reclaimed_are_served_again") {
        return;
    }
    // (By itself the program finds no markers.)
    let program = compile("reclaimed", &[]);
    let data = scratch().join("reclaimed.data");
    let served = served(&LIVE, &program, &[data.to_str().expect("a plain path")]);
    served.printed("good\n").taken_over();
    let put_back: u64 = served
        .reports
        .iter()
        .flat_map(|r| &r.files)
        .map(|f| f.put_back)
        .sum();
    assert!(put_back > 0, "{}", served.told());
    let _ = std::fs::remove_file(data);
}

/// All that was served of a file was served live, and pages of it were missed.
#[track_caller]
fn served_live(served: &Served, name: &str) {
    let files = || served.reports.iter().flat_map(|r| &r.files);
    assert!(files().all(|f| f.backend == "live"), "{}", served.told());
    served.taken_over_of(name);
}

/// Makes something with a script, in a directory of its own.
fn made_by(script: &str, args: &[&str]) {
    let made = plain(python(), &[&["-c", script], args].concat());
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(made.status.success(), "{said}");
}

#[test]
fn sqlite_with_a_write_ahead_log_and_two_writers() {
    if !live("sqlite_wal") || !possible("sqlite_wal", modules("sqlite3")) {
        return;
    }
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let file = dir.path().join("wal.db");
    made_by(
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('pragma journal_mode = wal')\n\
         c.execute('create table t (id integer primary key, v blob)')\n\
         c.executemany('insert into t values (?, ?)', ((i, bytes((i * 7 + j) & 255 for j in range(64)) * 60) for i in range(1, 8001)))\n\
         c.commit(); c.execute('pragma wal_checkpoint(truncate)')",
        &[text(&file)],
    );
    cool(&file);
    let script = source("sqlite_wal.py");
    let options = [&LIVE[..], &["--min-size", "1M"]].concat();
    let served = served(&options, python(), &[&script, text(&file)]);
    served.printed("('ok',)\n(0,)\n(8300,)\n");
    served_live(&served, "wal.db");
}

#[test]
fn lmdb_written_by_two_processes() {
    if !live("lmdb_two") || !possible("lmdb_two", modules("lmdb")) {
        return;
    }
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let made = plain(
        python(),
        &[&source("lmdb_writer.py"), text(dir.path()), "100000"],
    );
    assert!(made.status.success());
    cool(&dir.path().join("data.mdb"));
    let script = source("lmdb_two.py");
    let served = served(&LIVE, python(), &[&script, text(dir.path()), "100000"]);
    served.printed("100600\nTrue\n");
    served_live(&served, "data.mdb");
}

#[test]
fn rocksdb_with_mapped_reads() {
    let header = Path::new("/usr/include/rocksdb/c.h");
    let there = header.exists().then_some(());
    let there = there.ok_or("there is no librocksdb-dev (./run setup installs it)".to_owned());
    if !live("rocksdb") || !possible("rocksdb", there) {
        return;
    }
    let program = compile("rocks", &["-lrocksdb"]);
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let made = plain(&program, &["make", text(dir.path())]);
    assert!(made.status.success(), "{made:?}");
    let cool_all = || {
        let files = std::fs::read_dir(dir.path()).expect("readable").flatten();
        let tables = files
            .map(|f| f.path())
            .filter(|path| path.extension().is_some_and(|e| e == "sst"));
        tables.for_each(|table| cool(&table));
    };
    let read = ["read", text(dir.path())];
    let by_itself = plain(&program, &read);
    cool_all();
    let options = [&LIVE[..], &["--min-size", "1M"]].concat();
    let served = served(&options, &program, &read);
    served.same_as(&by_itself);
    served_live(&served, ".sst");
}

#[test]
fn a_server_that_forks_its_children() {
    if !live("prefork") {
        return;
    }
    let file = once("prefork.data", |path| write_mixed(path, 64 << 20));
    let script = source("prefork.py");
    let by_itself = plain(python(), &[&script, text(&file)]);
    cool(&file);
    let served = served(&LIVE, python(), &[&script, text(&file)]);
    served.same_as(&by_itself);
    served_live(&served, "prefork.data");
}

#[test]
fn java_with_its_own_use_of_sigsegv() {
    if !live("java_live") || !possible("java_live", commands(&["java", "javac"])) {
        return;
    }
    let classes = tempfile::tempdir_in(scratch()).expect("a directory");
    let compiled = std::process::Command::new("javac")
        .args(["-d", text(classes.path()), &source("Maps.java")])
        .status();
    assert!(compiled.expect("javac starts").success());
    let file = once("java.live.data", |path| write_mixed(path, 64 << 20));
    let shrinking = classes.path().join("shrinking");
    let dir = text(classes.path());
    let args = ["-Xmx48m", "-cp", dir, "Maps", text(&file), text(&shrinking)];
    let by_itself = plain(Path::new("java"), &args);
    cool(&file);
    let served = served(&LIVE, Path::new("java"), &args);
    served.same_as(&by_itself);
    served_live(&served, "java.live.data");
}

/// Runs a program with a file on an overlay, in a mount namespace of its own.
#[test]
fn a_file_on_overlayfs_of_which_the_kernel_does_not_say_what_is_cached_is_left_alone() {
    let mount = "mount -t overlay overlay -o lowerdir=$0/low,upperdir=$0/up,workdir=$0/work $0/all";
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    for name in ["low", "up", "work", "all"] {
        std::fs::create_dir(dir.path().join(name)).expect("writable");
    }
    let unshare = |then: &str| {
        let script = format!("{mount} && {then}");
        let mut all = std::process::Command::new("unshare");
        all.args(["-m", "sh", "-c", &script]).arg(dir.path());
        all
    };
    let can = unshare("true").output().is_ok_and(|o| o.status.success());
    let can = can
        .then_some(())
        .ok_or("overlayfs cannot be mounted here (it takes root)".to_owned());
    if !live("overlay") || !possible("overlay", can) {
        return;
    }
    std::fs::copy(
        once("overlay.data", |path| {
            let bytes: Vec<u8> = (0..32u32 << 20).map(|i| (i >> 12) as u8).collect();
            std::fs::write(path, bytes).expect("writable");
        }),
        dir.path().join("low/file"),
    )
    .expect("copied");
    let json = dir.path().join("reports.json");
    let read = "import mmap, os, sys, threading\n\
        m = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, mmap.MAP_SHARED, mmap.PROT_READ)\n\
        t = threading.Thread(target=lambda: None); t.start(); t.join()\n\
        print(all(m[i * 4096] == i & 255 for i in range(0, len(m) // 4096, 3)))";
    let run = format!(
        "{FAULTLESS} run --backend live --eager --only file --stats-json {} -- /usr/bin/python3 -c '{read}' $0/all/file",
        text(&json)
    );
    let output = unshare(&run)
        .env("FAULTLESS_LIBRARY", library())
        .output()
        .expect("it starts");
    let reports = faultless_run::read_reports(&json).expect("reports are JSON lines");
    let served = Served { output, reports };
    served
        .printed("True\n")
        .left_alone("/all/file")
        .left_because("learn what is in memory");
}
