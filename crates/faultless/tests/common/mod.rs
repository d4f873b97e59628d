//! What the integration tests share.
#![allow(
    dead_code,
    unreachable_pub,
    unsafe_code,
    reason = "each test binary uses a part of it; the tests make raw system calls"
)]

use faultless::{ByteSize, Pool};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

pub const PAGE: usize = 4096;
/// How long anything in a test may take before it counts as hung.
pub const BUDGET: Duration = Duration::from_secs(120);

/// The bytes of every test file: a function of position and seed.
pub fn byte_at(seed: u64, position: usize) -> u8 {
    let x = (position as u64 / 8)
        .wrapping_add(seed)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x.to_le_bytes()[position % 8]
}

pub fn content(seed: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| byte_at(seed, i)).collect()
}

/// A directory on a disk file system where leases and direct reads work: below the build directory.
pub fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for test files")
}

/// A file of `len` bytes in `dir`, closed for writing.
pub fn file(dir: &Path, name: &str, seed: u64, len: usize) -> PathBuf {
    let path = dir.join(name);
    let mut f = File::create(&path).expect("a test file");
    f.write_all(&content(seed, len))
        .expect("room for a test file");
    f.sync_all().expect("sync");
    path
}

pub fn pool(mib: u64) -> Pool {
    Pool::builder()
        .memory(ByteSize::mib(mib))
        .build()
        .expect("a pool")
}

pub fn open(path: &Path) -> File {
    File::open(path).expect("a test file")
}

/// Checks every byte of `map` against `byte_at`, where `map` begins at `offset` of the file.
pub fn check(map: &[u8], seed: u64, offset: usize) {
    if let Some(i) = (0..map.len()).find(|&i| map[i] != byte_at(seed, offset + i)) {
        panic!(
            "byte {i} is {:#x} and must be {:#x}",
            map[i],
            byte_at(seed, offset + i)
        );
    }
}

pub fn is_root() -> bool {
    // SAFETY: takes nothing.
    unsafe { libc::geteuid() == 0 }
}

/// Says that a test was not run, and why, in a form that the test script counts.
pub fn not_run(test: &str, why: &str) {
    // Directly to the descriptor: the test harness captures what goes through the print macros.
    let line = format!("NOT RUN: {test}: {why}\n");
    // SAFETY: writes a live buffer.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}

const CHILD: &str = "FAULTLESS_TEST_CHILD";

/// Runs `body` in a process of its own: the test binary again, with this one test. `name` is the test's full name.
/// Returns how the process ended; the caller asserts on it.
pub fn isolated(name: &str, body: impl FnOnce()) -> Output {
    if std::env::var(CHILD).is_ok_and(|v| v == name) {
        // (A name that is no test's runs none, which is a success as well.)
        println!("{BEGUN}");
        body();
        std::process::exit(0);
    }
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child process");
    let mut pipes = (
        child.stdout.take().expect("piped"),
        child.stderr.take().expect("piped"),
    );
    let readers = (
        std::thread::spawn(move || {
            let mut v = Vec::new();
            let _ = pipes.0.read_to_end(&mut v);
            v
        }),
        std::thread::spawn(move || {
            let mut v = Vec::new();
            let _ = pipes.1.read_to_end(&mut v);
            v
        }),
    );
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("waiting for the child") {
            break status;
        }
        if began.elapsed() > BUDGET {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{name}: hung for {BUDGET:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let output = Output {
        status,
        stdout: readers.0.join().expect("stdout"),
        stderr: readers.1.join().expect("stderr"),
    };
    let begun = String::from_utf8_lossy(&output.stdout).contains(BEGUN);
    assert!(begun, "there is no test of the name {name}");
    output
}

/// What a process says that runs a test by itself.
const BEGUN: &str = "this test runs by itself";

/// As [`isolated`], for bodies that must succeed.
pub fn isolated_ok(name: &str, body: impl FnOnce()) {
    let out = isolated(name, body);
    assert!(
        out.status.success(),
        "{name}: {}\nstdout: {}\nstderr: {}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Asserts that a process was ended by SIGBUS after `stderr` said `text`.
pub fn assert_sigbus(out: &Output, text: &str) {
    use std::os::unix::process::ExitStatusExt;
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(
        out.status.signal(),
        Some(libc::SIGBUS),
        "{}: {stderr}",
        out.status
    );
    assert!(stderr.contains(text), "expected {text:?} in: {stderr}");
    assert_eq!(
        stderr.matches("faultless: ").count(),
        1,
        "one line: {stderr}"
    );
}

/// Waits until `done`, within the budget.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < BUDGET, "waited too long: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A forked child.
pub struct Child(libc::pid_t);

/// Forks a child that ends with the status that `f` returns, or with 101 if it panics.
pub fn fork(f: impl FnOnce() -> i32) -> Child {
    // SAFETY: tests fork where no other thread holds what the child needs.
    match unsafe { libc::fork() } {
        0 => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(101);
            // SAFETY: ends the child, without what its parent has registered to run at exit.
            unsafe { libc::_exit(code) }
        }
        pid => {
            assert!(pid > 0, "{}", std::io::Error::last_os_error());
            Child(pid)
        }
    }
}

impl Child {
    pub fn pid(&self) -> libc::pid_t {
        self.0
    }

    /// How it ended, if it has or does within some time. To be asked until it has.
    pub fn ends_within(&self, patience: Duration) -> Option<ExitStatus> {
        let began = Instant::now();
        loop {
            let mut status = 0;
            // SAFETY: writes a status of our own.
            match unsafe { libc::waitpid(self.0, &raw mut status, libc::WNOHANG) } {
                0 if began.elapsed() < patience => std::thread::sleep(Duration::from_millis(1)),
                0 => return None,
                pid => {
                    assert_eq!(pid, self.0);
                    return Some(ExitStatus::from_raw(status));
                }
            }
        }
    }
}

/// Drops the clean pages of a file from memory.
pub fn forget(path: &Path) {
    let file = open(path);
    file.sync_all().expect("sync");
    let fd = file.as_raw_fd();
    // SAFETY: no pointers.
    let forgotten = unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(forgotten, 0);
}
