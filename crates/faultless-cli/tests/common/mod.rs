//! What the tests of `faultless run` share: the library, programs made of sources, data, and runs with and without.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use faultless_run::{Report, read_reports};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Seconds that one program may take. A budget, not a measurement.
const BUDGET: &str = "300";

/// The command under test.
pub const FAULTLESS: &str = env!("CARGO_BIN_EXE_faultless");

/// The directory of this test's sources.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs")
}

/// Where tests keep files: data that is costly to make stays for the next run.
pub fn scratch() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("run");
    std::fs::create_dir_all(&dir).expect("the target directory is writable");
    dir
}

/// The library, built with the same profile as the command.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let dir = Path::new(FAULTLESS)
            .parent()
            .expect("a command lies in a directory");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "faultless-preload"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        let status = build
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .expect("cargo runs");
        assert!(status.success(), "the library does not build");
        dir.join("libfaultless_preload.so")
    })
}

/// Compiles a C program of `tests/programs`.
pub fn compile(name: &str, more: &[&str]) -> PathBuf {
    compile_as(name, name, more)
}

/// The same, with a name for what comes out.
pub fn compile_as(name: &str, out: &str, more: &[&str]) -> PathBuf {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let program = scratch().join(out);
    // Other tests may run, or compile, the same program at this moment.
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let fresh = scratch().join(format!("{out}.{}-{number}", std::process::id()));
    let status = Command::new("cc")
        .args(["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
        .arg(&fresh)
        .arg(sources().join(name).with_extension("c"))
        .args(more)
        .status()
        .expect("a C compiler");
    assert!(status.success(), "{name}.c does not compile");
    std::fs::rename(&fresh, &program).expect("the same directory");
    program
}

/// A file that is made once, by a function that is given another name for it.
pub fn once(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    static MAKING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = scratch().join(name);
    if !path.exists() {
        let partial = scratch().join(format!("{name}.partial"));
        let _ = std::fs::remove_dir_all(&partial);
        let _ = std::fs::remove_file(&partial);
        make(&partial);
        std::fs::rename(&partial, &path).expect("the data was made");
    }
    path
}

/// Takes a file out of the page cache.
pub fn cool(path: &Path) {
    let file = std::fs::File::open(path).expect("the file is there");
    file.sync_all().expect("synced");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    #[allow(unsafe_code, reason = "posix_fadvise")]
    // SAFETY: advice on a descriptor.
    unsafe {
        libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED)
    };
}

/// A command under the time budget.
fn budgeted(program: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", BUDGET]).arg(program);
    command
}

/// Runs a program by itself.
pub fn plain(program: &Path, args: &[&str]) -> Output {
    budgeted(program).args(args).output().expect("it starts")
}

/// What a program did under `faultless run`.
pub struct Served {
    pub output: Output,
    pub reports: Vec<Report>,
}

/// Runs a program under `faultless run`.
pub fn served(options: &[&str], program: &Path, args: &[&str]) -> Served {
    served_by(options, program, args, |_| ())
}

/// The same, with a say in its environment.
pub fn served_by(
    options: &[&str],
    program: &Path,
    args: &[&str],
    prepare: impl FnOnce(&mut Command),
) -> Served {
    let all = [&["--eager"], options].concat();
    served_as_it_comes(&all, program, args, prepare)
}

/// Without --eager: mappings are taken over where that promises a gain.
pub fn served_as_it_comes(
    options: &[&str],
    program: &Path,
    args: &[&str],
    prepare: impl FnOnce(&mut Command),
) -> Served {
    let json = tempfile::NamedTempFile::new_in(scratch()).expect("a temporary file");
    let mut command = budgeted(Path::new(FAULTLESS));
    command
        .args(["run", "--stats-json"])
        .arg(json.path())
        .args(by_backend(options))
        .arg("--")
        .arg(program)
        .args(args)
        .env("FAULTLESS_LIBRARY", library());
    prepare(&mut command);
    let output = command.output().expect("it starts");
    let reports = read_reports(json.path()).expect("reports are JSON lines");
    Served { output, reports }
}

/// The options, for the backend that the variable FAULTLESS_TEST_BACKEND names, if it names one: so that whole files of tests can be run
/// with each. (Live mappings have no budget.)
fn by_backend(options: &[&str]) -> Vec<String> {
    let all = || options.iter().map(|&o| o.to_owned());
    match std::env::var("FAULTLESS_TEST_BACKEND") {
        Ok(backend) if !options.contains(&"--backend") => {
            let budgets = options.iter().position(|&o| o == "--memory");
            let is_budget = |i: &usize| budgets.is_some_and(|at| *i == at || *i == at + 1);
            let live = backend == "live";
            let kept = all().enumerate().filter(|(i, _)| !live || !is_budget(i));
            let kept: Vec<String> = kept.map(|(_, o)| o).collect();
            [vec!["--backend".to_owned(), backend], kept].concat()
        }
        _ => all().collect(),
    }
}

impl Served {
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// The program succeeded, and printed this.
    #[track_caller]
    pub fn printed(&self, expected: &str) -> &Self {
        assert!(
            self.output.status.success() && self.stdout() == expected,
            "{}: {}{}",
            self.output.status,
            self.stdout(),
            self.stderr()
        );
        self
    }

    /// Exactly what it prints by itself, and the same status.
    #[track_caller]
    pub fn same_as(&self, plain: &Output) -> &Self {
        assert_eq!(self.output.status, plain.status, "{}", self.stderr());
        assert!(
            self.output.stdout == plain.stdout,
            "{} is not {}",
            self.stdout(),
            String::from_utf8_lossy(&plain.stdout)
        );
        self
    }

    /// Mappings were taken over, and their pages missed.
    #[track_caller]
    pub fn taken_over(&self) -> &Self {
        let (mappings, misses): (Vec<u64>, Vec<u64>) = self
            .reports
            .iter()
            .map(|r| (r.totals.mappings, r.totals.misses))
            .unzip();
        assert!(
            mappings.iter().sum::<u64>() > 0 && misses.iter().sum::<u64>() > 0,
            "{}",
            self.told()
        );
        self
    }

    /// Ended by a signal: `timeout` tells it as a status, or ends the same way.
    #[track_caller]
    pub fn ended_by(&self, signal: i32) -> &Self {
        use std::os::unix::process::ExitStatusExt;
        let status = self.output.status;
        assert!(
            status.code() == Some(128 + signal) || status.signal() == Some(signal),
            "{status}: {}",
            self.stderr()
        );
        self
    }

    /// Of files with such a name.
    #[track_caller]
    pub fn taken_over_of(&self, name: &str) -> &Self {
        let named = |p: &Path| p.to_string_lossy().contains(name);
        let misses: u64 = self
            .reports
            .iter()
            .flat_map(|r| &r.files)
            .filter(|f| named(&f.path))
            .map(|f| f.misses)
            .sum();
        assert!(misses > 0, "{name}: {}", self.told());
        let bad = self
            .reports
            .iter()
            .flat_map(|r| &r.efaults)
            .any(|e| !e.mended);
        assert!(!bad, "{}", self.told());
        self.taken_over()
    }

    /// Nothing was taken over at all, as far as the processes could report: one that ends by a system call of its own, as Go
    /// does, writes no report.
    #[track_caller]
    pub fn took_nothing(&self) -> &Self {
        assert!(
            self.reports.iter().all(|r| r.totals.mappings == 0),
            "{}",
            self.told()
        );
        self
    }

    /// Nothing was taken over of files with such a name.
    #[track_caller]
    pub fn left_alone(&self, name: &str) -> &Self {
        let taken = self
            .reports
            .iter()
            .flat_map(|r| &r.files)
            .any(|f| f.path.to_string_lossy().contains(name));
        assert!(
            !taken && !self.reports.is_empty(),
            "{name}: {}",
            self.told()
        );
        self
    }

    /// Some mapping was left to the kernel for a reason like this.
    #[track_caller]
    pub fn left_because(&self, why: &str) -> &Self {
        let told = self
            .reports
            .iter()
            .flat_map(|r| &r.left_alone)
            .any(|l| l.reason.contains(why));
        assert!(told, "{why}: {}", self.told());
        self
    }

    /// Some mapping was handed back for a reason like this.
    #[track_caller]
    pub fn handed_back_because(&self, why: &str) -> &Self {
        let told = self
            .reports
            .iter()
            .flat_map(|r| &r.handed_back)
            .any(|h| h.reason.contains(why));
        assert!(told, "{why}: {}", self.told());
        self
    }

    /// All reports, for messages.
    pub fn told(&self) -> String {
        self.reports
            .iter()
            .map(ToString::to_string)
            .collect::<String>()
            + &self.stderr()
    }
}

/// The distribution's Python.
pub fn python() -> &'static Path {
    Path::new("/usr/bin/python3")
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// The path of a program's source in `tests/programs`.
pub fn source(name: &str) -> String {
    text(&sources().join(name)).to_owned()
}

/// Whether the distribution's Python has some modules.
pub fn modules(names: &str) -> Result<(), String> {
    commands(&["/usr/bin/python3"])?;
    let output = plain(python(), &["-c", &format!("import {names}")]);
    let why = String::from_utf8_lossy(&output.stderr);
    let why = why.lines().last().unwrap_or_default().to_owned();
    output
        .status
        .success()
        .then_some(())
        .ok_or(why + " (./run setup installs it)")
}

/// Writes bytes that look random.
pub fn write_mixed(path: &Path, len: u64) {
    let bytes: Vec<u8> = (0..len)
        .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
        .collect();
    std::fs::write(path, bytes).expect("writable");
}

/// Runs a test program by itself, which proves the program, and served.
pub fn both(name: &str, options: &[&str]) -> Served {
    let program = compile(name, &[]);
    let data = scratch().join(format!(
        "{name}.{}.data",
        options.join("").replace('/', "_")
    ));
    let data = data.to_str().expect("a plain path");
    let by_itself = plain(&program, &[data]);
    assert!(
        by_itself.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&by_itself.stderr)
    );
    let served = served(options, &program, &[data]);
    served.same_as(&by_itself);
    let _ = std::fs::remove_file(data);
    served
}

/// Whether a test can run; if not, it says so, and is counted by `./run test`.
pub fn possible(test: &str, needs: Result<(), String>) -> bool {
    if let Err(why) = &needs {
        tell(&format!("NOT RUN: {test}: {why}\n"));
    }
    needs.is_ok()
}

/// Says something even if the test passes: the harness captures what goes through the print macros, and not what goes to the
/// descriptor.
pub fn tell(line: &str) {
    #[allow(unsafe_code, reason = "write(2)")]
    // SAFETY: the buffer lives until the call returns, and has `len` bytes.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len())
    };
}

/// Whether commands are installed.
pub fn commands(names: &[&str]) -> Result<(), String> {
    for name in names {
        let found = if name.contains('/') {
            Path::new(name).exists()
        } else {
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
                .any(|d| d.join(name).exists())
        };
        if !found {
            return Err(format!("there is no {name} (./run setup installs it)"));
        }
    }
    Ok(())
}
