//! Real programs under `faultless run`: what they print is what they print without it, byte for byte.

mod common;

use common::*;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Text with a needle now and then: 2 GiB.
fn letters() -> PathBuf {
    once("letters", |path| {
        use std::io::Write;
        let mut block = Vec::new();
        let mut x = 1u64;
        while block.len() < 1 << 20 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let word = 3 + (x >> 60) as u32;
            block.extend((0..word).map(|i| b'a' + (x.rotate_right(4 * i) % 25) as u8));
            block.push(if x >> 57 & 7 == 0 { b'\n' } else { b' ' });
        }
        let mut file = std::fs::File::create(path).expect("writable");
        for i in 0..2048 {
            file.write_all(&block).expect("room for 2 GiB");
            writeln!(file, "\nzzneedle number {i}").expect("room");
        }
    })
}

#[test]
fn ripgrep() {
    if !possible("ripgrep", commands(&["rg"])) {
        return;
    }
    let (rg, file) = (Path::new("rg"), letters());
    for args in [
        ["--mmap", "-c", "zzneedle"],
        ["--mmap", "-n", "zzneedle number 1[0-9]*7$"],
    ] {
        let args: Vec<&str> = args.into_iter().chain([text(&file)]).collect();
        let by_itself = plain(rg, &args);
        cool(&file);
        served(&["--memory", "256M"], rg, &args)
            .same_as(&by_itself)
            .taken_over_of("letters");
    }
}

/// A repository with a pack of more than 200 MiB, and a file with a history.
fn repository() -> PathBuf {
    once("repository", |dir| {
        std::fs::create_dir(dir).expect("writable");
        let git = |args: &[&str]| {
            let status = Command::new("git")
                .arg("-C")
                .arg(dir)
                .args([
                    "-c",
                    "user.name=Test",
                    "-c",
                    "user.email=test@example.org",
                    "-c",
                    "core.compression=0",
                ])
                .args(args)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .expect("git runs");
            assert!(status.success(), "git {args:?}");
        };
        git(&["init", "-q"]);
        let mut x = 7u64;
        for file in 0..60 {
            let bytes: Vec<u8> = std::iter::repeat_with(|| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (x >> 32).to_le_bytes()
            })
            .flatten()
            .take(4 << 20)
            .collect();
            std::fs::write(dir.join(format!("big{file}")), bytes).expect("writable");
        }
        git(&["add", "."]);
        git(&["commit", "-q", "-m", "big files"]);
        for version in 0..40 {
            let lines: String = (0..2000)
                .map(|i| {
                    format!(
                        "line {i}, version {}\n",
                        version * u64::from(i % 40 <= version as u32)
                    )
                })
                .collect();
            std::fs::write(dir.join("story"), lines).expect("writable");
            git(&["add", "."]);
            git(&["commit", "-q", "-m", "the story goes on"]);
        }
        git(&["repack", "-adq"]);
    })
}

#[test]
fn git() {
    if !possible("git", commands(&["git"])) {
        return;
    }
    let (git, dir) = (Path::new("git"), repository());
    for (args, reads_pack) in [
        (&["fsck", "--full"][..], true),
        (&["log", "-p", "--stat"], true),
        (&["blame", "story"], true),
        (&["archive", "HEAD"], true),
    ] {
        let args: Vec<&str> = ["-C", text(&dir)]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        let by_itself = plain(git, &args);
        let served = served(&["--memory", "128M"], git, &args);
        served.same_as(&by_itself);
        if reads_pack {
            served.taken_over_of(".pack");
        }
    }
}

#[test]
fn numpy_and_mmap_of_python() {
    if !possible("numpy_and_mmap_of_python", modules("numpy")) {
        return;
    }
    let file = once("vectors.npy", |path| {
        let make = "import numpy as np, sys\n\
            a = np.lib.format.open_memmap(sys.argv[1], mode='w+', dtype=np.float32, shape=(1 << 19, 128))\n\
            r = np.random.default_rng(1)\n\
            for i in range(0, 1 << 19, 1 << 16): a[i:i + (1 << 16)] = r.random((1 << 16, 128), dtype=np.float32)\n\
            a.flush()";
        assert!(plain(python(), &["-c", make, text(path)]).status.success());
    });
    cool(&file);
    let arrays = source("arrays.py");
    let by_itself = plain(python(), &[&arrays, text(&file)]);
    cool(&file);
    served(&["--memory", "64M"], python(), &[&arrays, text(&file)])
        .same_as(&by_itself)
        .taken_over_of("vectors.npy");
}

#[test]
fn sqlite_readers() {
    if !possible("sqlite_readers", modules("sqlite3")) {
        return;
    }
    const ROWS: u32 = 1_050_000;
    let file = once("readers.db", |path| {
        let make = "import sqlite3, sys, hashlib\n\
            c = sqlite3.connect(sys.argv[1]); c.execute('pragma synchronous=off'); c.execute('create table t (id integer primary key, v blob)')\n\
            c.executemany('insert into t values (?, ?)', ((i, hashlib.sha256(b'%d' % i).digest() * 30) for i in range(int(sys.argv[2]))))\n\
            c.commit()";
        assert!(
            plain(python(), &["-c", make, text(path), &ROWS.to_string()])
                .status
                .success()
        );
    });
    assert!(std::fs::metadata(&file).expect("made").len() > 1 << 30);
    let (script, rows) = (source("sqlite_readers.py"), ROWS.to_string());
    let args = [script.as_str(), text(&file), &rows];
    let by_itself = plain(python(), &args);
    cool(&file);
    served(&["--memory", "128M"], python(), &args)
        .same_as(&by_itself)
        .taken_over_of("readers.db");
}

#[test]
fn sqlite_writers_are_left_alone_and_lose_no_lock() {
    if !possible("sqlite_writers", modules("sqlite3")) {
        return;
    }
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let file = dir.path().join("writers.db");
    let served = served(
        &["--min-size", "4K"],
        python(),
        &[&source("sqlite_writers.py"), text(&file)],
    );
    served
        .printed("('ok',)\n(2300,) (300,)\n")
        .left_alone("writers.db");
}

#[test]
fn lmdb() {
    if !possible("lmdb", modules("lmdb")) {
        return;
    }
    let rows = "200000";
    let made = tempfile::tempdir_in(scratch()).expect("a directory");
    let dir = made.path().join("environment");
    std::fs::create_dir(&dir).expect("writable");
    // Read and written: left alone.
    served(
        &[],
        python(),
        &[&source("lmdb_writer.py"), text(&dir), rows],
    )
    .printed("good\n")
    .left_alone("data.mdb");
    let script = source("lmdb_readers.py");
    let args = [script.as_str(), text(&dir), rows];
    let by_itself = plain(python(), &args);
    cool(&dir.join("data.mdb"));
    served(&["--memory", "32M"], python(), &args)
        .same_as(&by_itself)
        .taken_over_of("data.mdb");
}

#[test]
fn java() {
    if !possible("java", commands(&["java", "javac"])) {
        return;
    }
    let classes = tempfile::tempdir_in(scratch()).expect("a directory");
    let compiled = plain(
        Path::new("javac"),
        &["-d", text(classes.path()), &source("Maps.java")],
    );
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let file = once("java.data", |path| write_mixed(path, 128 << 20));
    let shrinking = classes.path().join("shrinking");
    let args = [
        "-Xmx48m",
        "-cp",
        text(classes.path()),
        "Maps",
        text(&file),
        text(&shrinking),
    ];
    let by_itself = plain(Path::new("java"), &args);
    cool(&file);
    served(&["--memory", "64M"], Path::new("java"), &args)
        .same_as(&by_itself)
        .taken_over_of("java.data")
        .handed_back_because("opened for writing");
    assert!(String::from_utf8_lossy(&by_itself.stdout).ends_with("InternalError\n"));
}

#[test]
fn cpythons_own_tests_of_mmap() {
    if !possible("cpythons_own_tests_of_mmap", modules("test.test_mmap")) {
        return;
    }
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let args = ["-m", "test", "test_mmap"];
    let served = served_by(
        &["--min-size", "4096", "--trust", "*"],
        python(),
        &args,
        |c| {
            c.current_dir(dir.path()).env("TMPDIR", dir.path());
        },
    );
    assert!(
        served.output.status.success(),
        "{}{}",
        served.stdout(),
        served.stderr()
    );
    assert!(served.stdout().contains("SUCCESS"), "{}", served.stdout());
    let mappings: u64 = served.reports.iter().map(|r| r.totals.mappings).sum();
    assert!(mappings > 0, "{}", served.told());
}

#[test]
fn numpys_own_tests_of_memmap() {
    if !possible(
        "numpys_own_tests_of_memmap",
        modules("numpy, pytest, hypothesis"),
    ) {
        return;
    }
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let find = "import numpy, glob, os; print(glob.glob(os.path.join(os.path.dirname(numpy.__file__), '*core', 'tests', 'test_memmap.py'))[0])";
    let path = plain(python(), &["-c", find]);
    let path = String::from_utf8_lossy(&path.stdout).trim().to_owned();
    if !possible("numpys_own_tests_of_memmap", commands(&[&path])) {
        return;
    }
    let args = ["-m", "pytest", "-q", "-p", "no:cacheprovider", &path];
    let served = served_by(
        &["--min-size", "4096", "--trust", "*"],
        python(),
        &args,
        |c| {
            c.current_dir(dir.path()).env("TMPDIR", dir.path());
        },
    );
    assert!(
        served.output.status.success() && served.stdout().contains(" passed"),
        "{}{}",
        served.stdout(),
        served.stderr()
    );
    // Its one read-only mapping is of a file that it has open for writing: rightly left alone.
    served.left_because("descriptor open for writing");
}

#[test]
fn programs_that_do_not_map_are_left_alone() {
    if !possible(
        "programs_that_do_not_map",
        commands(&["sort", "xz", "sha256sum"]),
    ) {
        return;
    }
    let file = once("lines", |path| {
        let mut x = 3u64;
        let lines: String = (0..2_000_000)
            .map(|_| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                format!("{:08x}\n", x >> 32)
            })
            .collect();
        std::fs::write(path, lines).expect("writable");
    });
    let packed = once("lines.xz", |path| {
        let output = plain(Path::new("xz"), &["-0", "-c", text(&file)]);
        std::fs::write(path, output.stdout).expect("writable");
    });
    for (program, args) in [
        ("sort", [text(&file), "-u"]),
        ("xz", ["-t", text(&packed)]),
        ("sha256sum", ["-b", text(&file)]),
    ] {
        let by_itself = plain(Path::new(program), &args);
        let served = served(&[], Path::new(program), &args);
        served.same_as(&by_itself).left_alone("lines");
        assert!(by_itself.status.success());
    }
}

#[test]
fn programs_in_go() {
    if !possible("programs_in_go", commands(&["go"])) {
        return;
    }
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let build = |name: &str, cgo: bool| {
        let program = dir.path().join(name);
        let mut command = Command::new("go");
        command
            .args(["build", "-o"])
            .arg(&program)
            .arg(source("maps.go"));
        if cgo {
            command.arg(source("cgo.go"));
        }
        let output = command
            .env("CGO_ENABLED", if cgo { "1" } else { "0" })
            .env("GOCACHE", scratch().join("go-cache"))
            .env("GOPATH", dir.path())
            .env("GO111MODULE", "off")
            .output()
            .expect("go runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        program
    };
    let (file, out) = (letters_of_go(), dir.path().join("out"));
    let args = [text(&file), text(&out)];
    // Statically linked, as Go does it: refused.
    let by_itself = plain(&build("static", false), &args);
    assert!(by_itself.status.success());
    let refused = Command::new(FAULTLESS)
        .args(["run", "--"])
        .arg(dir.path().join("static"))
        .args(args)
        .env("FAULTLESS_LIBRARY", library())
        .output()
        .expect("it starts");
    assert!(
        refused.status.code() == Some(1)
            && String::from_utf8_lossy(&refused.stderr).contains("statically linked")
    );
    // With C in it: its own system calls map, and are not seen.
    let dynamic = build("dynamic", true);
    for options in [&["--memory", "64M"][..], &["--memory", "64M", "--compat"]] {
        served(options, &dynamic, &args)
            .same_as(&by_itself)
            .took_nothing();
        let same = std::fs::read(&out).expect("written") == std::fs::read(&file).expect("made");
        assert!(same, "what it wrote is not what it mapped");
    }
}

fn letters_of_go() -> PathBuf {
    once("go.data", |path| write_mixed(path, 32 << 20))
}
