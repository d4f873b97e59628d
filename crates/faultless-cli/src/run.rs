//! `faultless run`.

use anyhow::{Context, bail};
use clap::ValueEnum;
use faultless::ByteSize;
use faultless_run::tree::Tree;
use faultless_run::{
    Fitness, Sandbox, Settings, VARIABLE, check_program, compat, find_program, tree,
};
use faultless_untrusted::output::start_log;
use faultless_untrusted::printable;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Run a program whose large file mappings are served without mmap_lock.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Taken over are mappings of regular files that are readable, not executable, and large enough, in the program and in all
that it executes; writable ones only live. A stand-in's bytes are guarded by a read lease: when somebody opens the file for
writing, the mapping becomes the kernel's again, at the same address, before the writer goes on. A live mapping stays the
kernel's all the time, so --memory, --reads and --no-lease mean nothing to it. Everything else goes to the kernel untouched.

PATTERNS without a slash are about a file's name, others about its whole path; * stands for slashes, too.

The program's exit status, signals, input and output are its own. In gdb: handle SIGBUS SIGSEGV nostop noprint pass.

  faultless run --stats -- rg --mmap needle logs/
  faultless run --memory 8G -- python3 search.py")]
pub(crate) struct Args {
    /// What serves the mappings.
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,
    /// Memory for all file mappings of the program and what it starts, together [default: half of what is available].
    #[arg(long, value_name = "SIZE", value_parser = crate::bench::size)]
    memory: Option<ByteSize>,
    /// Smallest mapping that is taken over [default: 16M; with --eager 1M].
    #[arg(long, value_name = "SIZE", value_parser = crate::bench::size)]
    min_size: Option<ByteSize>,
    /// Also take over what promises no gain: mappings of a program with one thread, of files that are in the page cache, and those
    /// that a program like this unmaps soon.
    #[arg(long)]
    eager: bool,
    /// Take files over for which no lease can be had: you vouch that their bytes do not change while they are mapped.
    #[arg(long, value_name = "PATTERN")]
    trust: Vec<String>,
    /// Take no leases: only files that --trust names, and those on file systems that nobody can write, are taken over.
    #[arg(long)]
    no_lease: bool,
    /// Take over these files alone.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Leave these files to the kernel.
    #[arg(long, value_name = "PATTERN")]
    skip: Vec<String>,
    /// How files are read.
    #[arg(long, value_enum, default_value_t)]
    reads: Reads,
    /// Say on stderr, when a process ends and when it gets SIGUSR2, what was taken over, what was not, and why.
    #[arg(long)]
    stats: bool,
    /// Write the same as JSON, one line for each process (made anew).
    #[arg(long, value_name = "FILE")]
    stats_json: Option<PathBuf>,
    /// Take nothing over: only say what would be. Implies --stats.
    #[arg(long)]
    dry_run: bool,
    /// Serve system calls that bypass the C library, too (programs in Go, some static parts). Costs a little in each.
    #[arg(long)]
    compat: bool,
    /// The program, and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// From Linux 6.19 on live, before that stand-in; with --memory stand-in, and live where that cannot be.
    #[default]
    Auto,
    /// The kernel's own mapping goes on to be used, and only the reading is done otherwise (Linux 6.15; a gain from 6.19 on). The page
    /// cache is the memory. The bytes may change.
    Live,
    /// A map of the engine's takes the mapping's place, within a memory budget. A lease guards its bytes.
    StandIn,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Reads {
    /// Through the page cache if half of the mapping is in it already, directly otherwise.
    #[default]
    Auto,
    /// Directly: the budget is the cache.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// Smallest mapping that is taken over, if the user does not say.
fn min_size(eager: bool) -> ByteSize {
    if eager {
        ByteSize::mib(1)
    } else {
        ByteSize::mib(16)
    }
}

/// Smallest budget for a tree of processes.
const MEMORY_MIN: ByteSize = ByteSize::mib(4);

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let name = args.command.first().context("no program")?;
    if args.backend == Backend::Live && args.memory.is_some() {
        crate::bench::usage_error(
            "--memory is a budget of stand-ins, and --backend live makes none; leave one of them out",
        );
    }
    if args.backend == Backend::Live
        && let Err(why) = faultless::live::support()
    {
        bail!("--backend live is not possible: {why}; leave it out, or choose stand-in");
    }
    let memory = match args.memory {
        Some(memory) if memory < MEMORY_MIN => crate::bench::usage_error(&format!(
            "--memory is {memory}: give it at least {MEMORY_MIN}"
        )),
        Some(memory) if memory > physical_memory() => crate::bench::usage_error(&format!(
            "--memory is {memory}: the machine has {}; give it less",
            physical_memory()
        )),
        Some(memory) => memory,
        None => faultless::internals::default_budget(),
    };
    let patterns = args.trust.iter().chain(&args.only).chain(&args.skip);
    if let Some((pattern, e)) = faultless_run::first_bad(patterns) {
        crate::bench::usage_error(&format!("{pattern:?} is not a pattern: {e}"));
    }
    let program = find_program(name)?;
    check_program(&program)?;
    let library = library()?;
    let preload = preload(&library);
    let sanitized = fitness(&program)? == Fitness::Sanitized;
    let log = args.stats_json.as_deref().map(start_file).transpose()?;
    let (stats_json, stats_file) = log.unzip();
    let watch = args.stats || stats_json.is_some();
    let mut settings = Settings {
        efault_tracepoints: if watch {
            efault_tracepoints()
        } else {
            Vec::new()
        },
        backend: match args.backend {
            Backend::Auto => faultless_run::Backend::Auto,
            Backend::Live => faultless_run::Backend::Live,
            Backend::StandIn => faultless_run::Backend::StandIn,
        },
        memory: memory.get(),
        budget: args.memory.is_some(),
        min_size: args.min_size.unwrap_or(min_size(args.eager)).get(),
        eager: args.eager,
        trust: args.trust,
        only: args.only,
        skip: args.skip,
        reads: match args.reads {
            Reads::Auto => faultless_run::Reads::Auto,
            Reads::Direct => faultless_run::Reads::Direct,
            Reads::Buffered => faultless_run::Reads::Buffered,
        },
        stats: args.stats || (args.dry_run && stats_json.is_none()),
        stats_json,
        stats_file,
        dry_run: args.dry_run,
        compat: args.compat,
        gate: 0,
        no_lease: args.no_lease,
        sandbox: Sandbox::default(),
        library,
        tree: Tree::none(),
    };
    if args.compat {
        settings.gate = gate()?;
    }
    // After a filter of our own, which counts as well.
    settings.sandbox = Sandbox::try_here();
    let permitted = settings.sandbox.permitted;
    if !permitted {
        eprintln!(
            "faultless: a seccomp filter that this command inherited ends processes for system calls of the engine; {} is not served",
            printable(&program)
        );
    }
    let served = !sanitized && permitted;
    if served {
        tree::sweep();
        // (If it cannot be made, the processes say so that would have shared.)
        settings.tree = Tree::make().unwrap_or(settings.tree);
    }
    let tree = settings.tree.clone();
    let settings = settings.encode().context(
        "the path of --stats-json is not Unicode, so it cannot be passed on; name another",
    )?;
    let additions = served.then_some((settings.as_str(), preload.as_os_str()));
    let error = execute(&program, &args.command, additions);
    tree.end();
    Err(error).with_context(|| format!("cannot execute {}", printable(&program)))
}

/// Where system calls pass the filter of --compat, which is installed from here on. Inside another `faultless run --compat` it is
/// that one's.
fn gate() -> anyhow::Result<usize> {
    if compat::is_installed() {
        let outer = std::env::var(VARIABLE).ok();
        let outer = outer.and_then(|text| Settings::decode(&text).ok());
        return outer.filter(|s| s.compat).map(|s| s.gate).context(
            "this command was started under --compat already, and FAULTLESS_RUN does not say so any more; keep that variable, or run without --compat",
        );
    }
    let gate = compat::choose_gate().context("cannot choose an address")?;
    compat::install(gate).context(
        "--compat needs a seccomp filter, which the kernel refuses here; run without --compat",
    )?;
    Ok(gate)
}

/// Memory of the machine.
#[allow(unsafe_code, reason = "sysconf(3)")]
fn physical_memory() -> ByteSize {
    // SAFETY: no pointers.
    let [pages, bytes] =
        [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|n| unsafe { libc::sysconf(n) });
    match (u64::try_from(pages), u64::try_from(bytes)) {
        (Ok(pages), Ok(bytes)) => ByteSize::new(pages.saturating_mul(bytes)),
        _ => ByteSize::new(u64::MAX),
    }
}

/// Becomes the program, which finds signals as this command found them.
#[allow(unsafe_code, reason = "execve(2)")]
fn execute(
    program: &Path,
    arguments: &[OsString],
    additions: Option<(&str, &OsStr)>,
) -> std::io::Error {
    let text = |s: &OsStr| CString::new(s.as_bytes());
    let own = |name: &OsStr| name == VARIABLE || (additions.is_some() && name == "LD_PRELOAD");
    let made = || -> Result<_, std::ffi::NulError> {
        let program = text(program.as_os_str())?;
        let arguments: Vec<CString> = arguments
            .iter()
            .map(|a| text(a))
            .collect::<Result<_, _>>()?;
        let mut environment: Vec<CString> = std::env::vars_os()
            .filter(|(name, _)| !own(name))
            .map(|(mut name, value)| {
                name.push("=");
                name.push(value);
                text(&name)
            })
            .collect::<Result<_, _>>()?;
        if let Some((settings, preload)) = additions {
            environment.push(CString::new(format!("{VARIABLE}={settings}"))?);
            let mut preloaded = OsString::from("LD_PRELOAD=");
            preloaded.push(preload);
            environment.push(text(&preloaded)?);
        }
        Ok((program, arguments, environment))
    };
    let (program, arguments, environment) = match made() {
        Ok(made) => made,
        Err(e) => return std::io::Error::new(std::io::ErrorKind::InvalidInput, e),
    };
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        let all = strings.iter().map(|s| s.as_ptr());
        all.chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(&arguments), pointers(&environment));
    // The Rust runtime ignores SIGPIPE; whoever started this command may have wanted either.
    // SAFETY: the disposition that was there; lists of NUL-terminated strings that end with null.
    unsafe {
        if !SIGPIPE_WAS_IGNORED.load(Ordering::Relaxed) {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        }
        libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
    }
    std::io::Error::last_os_error()
}

/// How SIGPIPE was before the Rust runtime started.
static SIGPIPE_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

#[allow(unsafe_code, reason = "asks for a signal's disposition")]
extern "C" fn note_sigpipe() {
    // SAFETY: fills the structure, for which zeros are valid.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), &mut now);
        SIGPIPE_WAS_IGNORED.store(now.sa_sigaction == libc::SIG_IGN, Ordering::Relaxed);
    }
}

#[used]
#[allow(unsafe_code, reason = "runs before the Rust runtime does")]
#[unsafe(link_section = ".init_array")]
static NOTE_SIGPIPE: extern "C" fn() = note_sigpipe;

/// Calls that read a program's memory in bulk.
const READERS: [&str; 9] = [
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "sendto", "sendmsg", "sendmmsg",
    "vmsplice",
];

/// Where EFAULT of these can be counted, if this user may.
fn efault_tracepoints() -> Vec<(String, u64)> {
    let names = READERS.map(|call| format!("syscalls/sys_exit_{call}"));
    let paths: Vec<&str> = names.iter().map(String::as_str).collect();
    let ids = faultless_sys::perf::tracepoint_ids(&paths).unwrap_or_default();
    READERS
        .iter()
        .map(|&call| call.to_owned())
        .zip(ids)
        .collect()
}

/// Empties the file of the reports, so that they can be appended from any directory.
fn start_file(path: &Path) -> anyhow::Result<(PathBuf, (u64, u64))> {
    use std::os::unix::fs::MetadataExt as _;
    let cannot = || format!("cannot write the reports to {}", printable(path));
    let (path, file) = start_log(path).with_context(cannot)?;
    let found = file.metadata().with_context(cannot)?;
    Ok((path, (found.dev(), found.ino())))
}

/// Whether the library would be in the program's way, though it can be loaded. Says so in a sentence.
fn fitness(program: &Path) -> anyhow::Result<Fitness> {
    let path = CString::new(program.as_os_str().as_bytes())?;
    let fitness = faultless_run::inspect(&path);
    if fitness == Fitness::Sanitized {
        eprintln!(
            "faultless: {} contains a sanitizer, which has to be the first library of a process and to know all of its memory; it runs unserved",
            printable(&program)
        );
    }
    Ok(fitness)
}

/// What `LD_PRELOAD` must be: our library first, then what was there.
fn preload(library: &Path) -> OsString {
    let mut all = library.as_os_str().to_owned();
    if let Some(before) = std::env::var_os("LD_PRELOAD").filter(|v| !v.is_empty()) {
        all.push(":");
        all.push(before);
    }
    all
}

const LIBRARY: &str = "libfaultless_preload.so";

/// Where the library is: beside the command, or in the `lib` beside its `bin`.
pub(crate) fn library() -> anyhow::Result<PathBuf> {
    let library = match std::env::var_os("FAULTLESS_LIBRARY") {
        Some(path) => PathBuf::from(path),
        None => {
            let exe =
                std::env::current_exe().context("cannot find the faultless command itself")?;
            let dir = exe.parent().unwrap_or(Path::new("/"));
            let places = [
                dir.join(LIBRARY),
                dir.join("../lib").join(LIBRARY),
                dir.join("../lib/faultless").join(LIBRARY),
            ];
            let Some(found) = places.iter().find(|p| p.is_file()) else {
                bail!(
                    "{LIBRARY} is neither beside the command ({}) nor in ../lib; build it (cargo build --release -p faultless-preload), or name it in FAULTLESS_LIBRARY",
                    printable(&dir)
                );
            };
            found.clone()
        }
    };
    let library = library
        .canonicalize()
        .with_context(|| format!("cannot find the library {}", printable(&library)))?;
    // The dynamic loader takes both for separators.
    if has(library.as_os_str(), b' ') || has(library.as_os_str(), b':') {
        bail!(
            "the library's path {} has a space or a colon, which the dynamic loader takes for the end of it; move it",
            printable(&library)
        );
    }
    Ok(library)
}

fn has(text: &OsStr, byte: u8) -> bool {
    text.as_bytes().contains(&byte)
}
