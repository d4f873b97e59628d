//! `faultless observe`.

use crate::output::{self, percent, right_align, table};
use anyhow::Context;
use faultless_observe::{Report, duration};
use faultless_trace::Error;
use faultless_untrusted::input;
use faultless_untrusted::output::Readers;
use faultless_untrusted::printable;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// Say who waits for which lock behind whose I/O, in a live process.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
On a terminal, -p shows a live view: q ends it, and the tables follow. Otherwise the tables come at the end: after
--duration, on Ctrl-C, or when the processes have ended. A program that is run keeps its exit status and its output (which
goes to stderr with --json); one that runs for longer than --duration goes on by itself, and its end is awaited.
Needs root, or CAP_BPF and CAP_PERFMON.

  faultless observe -p $(pgrep -o searchd)
  faultless observe -p 4711 --duration 10s --html report.html
  faultless observe --trace calls.trace -- ./server --port 80
  faultless observe --from calls.trace --html report.html")]
pub(crate) struct Args {
    /// A process to watch, and what it forks from now on (may be given several times).
    #[arg(short, long, value_name = "PID", required_unless_present_any = ["command", "from"])]
    pid: Vec<u32>,
    /// Do not watch what the processes fork.
    #[arg(long)]
    no_children: bool,
    /// End after this time, such as 10s or 5m [default: with --once 10s, otherwise when the processes end].
    #[arg(long, value_name = "TIME", value_parser = time)]
    duration: Option<Duration>,
    /// No live view: the tables, at the end.
    #[arg(long, conflicts_with = "from")]
    once: bool,
    /// Print the report as JSON (faultless.observe/1; see docs/observe.md).
    #[arg(long)]
    json: bool,
    /// Write the report as a page to look at.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Record each fault, long wait, hold and read, for `faultless whatif` and --from.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Size of either file at which the observation ends.
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = crate::bench::size)]
    trace_max: faultless::ByteSize,
    /// Write the same for the Perfetto UI (ui.perfetto.dev).
    #[arg(long, value_name = "FILE")]
    perfetto: Option<PathBuf>,
    /// Report on a recorded trace instead of a live process.
    #[arg(long, value_name = "TRACE", conflicts_with_all = ["pid", "command", "duration", "no_children", "trace"])]
    from: Option<PathBuf>,
    /// A program to run and watch, and its arguments.
    #[arg(last = true, value_name = "PROGRAM", conflicts_with = "pid")]
    command: Vec<OsString>,
}

fn time(text: &str) -> Result<Duration, String> {
    let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let seconds = units.iter().find_map(|(unit, seconds)| {
        let number = text.strip_suffix(unit)?.trim();
        number.parse::<f64>().ok().map(|n| n * seconds)
    });
    match seconds {
        Some(s) if (0.01..=30.0 * 86400.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err("it must be a time with its unit, such as 500ms, 10s, 5m or 1h".to_owned()),
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    check_files(&args);
    // Before anything is observed: it would be in vain if the page could not be written.
    let page = args
        .html
        .as_deref()
        .map(|p| output::create(p, Readers::Owner))
        .transpose()?;
    let watched = match &args.from {
        Some(trace) => recorded(trace, args.perfetto.as_deref())?,
        None => watch(&args)?,
    };
    let Watched {
        report,
        mut child,
        mut failure,
    } = watched;
    if let Some((page, mut file)) = page {
        let text = faultless_observe::html::page(&report);
        let written = page.finish(file.write_all(text.as_bytes()).map(|()| file));
        failure = failure.or(written.err().map(Into::into));
    }
    let mut out = std::io::stdout().lock();
    let printed = if args.json {
        let text = output::json(&report).map_err(std::io::Error::from);
        text.and_then(|text| out.write_all(text.as_bytes()))
    } else {
        out.write_all(tables(&report).as_bytes())
    };
    if let Err(e) = printed.and_then(|()| out.flush())
        && e.kind() != std::io::ErrorKind::BrokenPipe
    {
        failure = failure.or(Some(
            anyhow::Error::new(e).context("cannot write the report"),
        ));
    }
    drop(out);
    if report.doubts.cut_off {
        eprintln!("faultless: the trace was cut off; this is what there is of it");
    }
    let status = child.as_mut().map(watching::wait_for).transpose()?;
    match (failure, status) {
        (Some(e), _) => Err(e),
        (None, Some(status)) => std::process::exit(
            status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        ),
        (None, None) => Ok(()),
    }
}

/// No file is written twice, nor written while it is read.
fn check_files(args: &Args) {
    let files = [
        ("--from", &args.from),
        ("--html", &args.html),
        ("--trace", &args.trace),
        ("--perfetto", &args.perfetto),
    ];
    let place = |path: &Path| {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        path.canonicalize()
            .unwrap_or_else(|_| dir.join(path.file_name().unwrap_or_default()))
    };
    for (no, (option, path)) in files.iter().enumerate() {
        let Some(path) = path else { continue };
        if path.is_dir() || path.file_name().is_none() {
            crate::bench::usage_error(&format!(
                "{option}: {} is a directory; name a file",
                printable(&path)
            ));
        }
        for (other, its) in &files[..no] {
            let same = |its: &PathBuf| {
                let is_file = !path.exists() || path.is_file();
                is_file && place(its) == place(path)
            };
            if its.as_ref().is_some_and(same) {
                crate::bench::usage_error(&format!(
                    "{other} and {option} are both {}; give each a file of its own",
                    printable(&path)
                ));
            }
        }
    }
}

struct Watched {
    report: Report,
    /// The program that was run.
    child: Option<Child>,
    /// What went wrong, although there is a report.
    failure: Option<anyhow::Error>,
}

fn recorded(trace: &Path, perfetto: Option<&Path>) -> anyhow::Result<Watched> {
    let open = || -> anyhow::Result<_> {
        let file = input::open(trace)
            .with_context(|| format!("cannot open the trace {}", printable(&trace)))?;
        let cannot = || format!("cannot read {}", printable(&trace));
        faultless_trace::Reader::new(std::io::BufReader::new(file)).with_context(cannot)
    };
    if let Some(path) = perfetto {
        let (output, file) = output::create(path, Readers::Owner)?;
        let mut perfetto = faultless_observe::perfetto::Perfetto::new(file)?;
        for event in open()? {
            match event {
                Ok(event) => perfetto.event(&event)?,
                // The report says so.
                Err(Error::CutOff { events, .. }) if events > 0 => break,
                Err(e) => {
                    return Err(e).with_context(|| format!("cannot read {}", printable(&trace)));
                }
            }
        }
        output.finish(perfetto.finish())?;
    }
    let report = faultless_observe::report_of(open()?)
        .with_context(|| format!("cannot read {}", printable(&trace)))?;
    Ok(Watched {
        report,
        child: None,
        failure: None,
    })
}

// ---- Tables ----

/// Rows of each table; `--json` has more.
const ROWS: usize = 12;

fn tables(r: &Report) -> String {
    let mut text = String::new();
    let names: Vec<String> = r
        .observed
        .processes
        .iter()
        .take(4)
        .map(|p| format!("{} ({})", p.name, p.pid))
        .collect();
    let more = r.observed.processes_seen.saturating_sub(4);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    let _ = writeln!(
        text,
        "Observed {}{more} for {}; Linux {}, {} processors\n\n{}\n",
        names.join(", "),
        duration(r.observed.seconds * 1e3),
        r.observed.kernel,
        r.observed.processors,
        r.verdict.text
    );
    if r.faults.stalled > 0 {
        let mut t = table(&["Where the time in faults goes", "time", "share"]);
        let mut parts: Vec<(&str, f64)> = r.faults.time_ms.iter().map(|(k, v)| (*k, *v)).collect();
        parts.sort_by(|a, b| b.1.total_cmp(&a.1));
        let spent: f64 = r.faults.time_ms.values().sum();
        for (key, ms) in parts.into_iter().filter(|p| p.1 > 0.0) {
            t.add_row([key.replace('_', " "), duration(ms), percent(ms, spent)]);
        }
        right_align(&mut t, 1);
        let _ = writeln!(text, "{t}\n");
        let mut t = table(&[
            "Threads",
            "process",
            "threads",
            "major faults",
            "time",
            "mmap_lock",
            "device",
            "no CPU",
            "calls",
            "p50",
            "p99",
            "max",
        ]);
        for g in r.groups.iter().take(ROWS) {
            t.add_row([
                g.name.clone(),
                format!("{} {}", g.process, g.pid),
                g.threads.to_string(),
                g.major.to_string(),
                duration(g.total_ms),
                duration(g.lock_wait_ms),
                duration(g.device_ms),
                duration(g.runnable_ms),
                duration(g.call_wait_ms),
                duration(g.latency_us.p50 / 1e3),
                duration(g.latency_us.p99 / 1e3),
                duration(g.latency_us.max / 1e3),
            ]);
        }
        right_align(&mut t, 2);
        let _ = writeln!(text, "{t}\n");
        let mut t = table(&[
            "Files",
            "major faults",
            "gone at retry",
            "time",
            "mmap_lock",
            "device",
            "p50",
            "p99",
            "max",
        ]);
        for f in r.files.iter().take(ROWS) {
            t.add_row([
                f.path.clone(),
                f.major.to_string(),
                f.gone_at_retry.to_string(),
                duration(f.total_ms),
                duration(f.lock_wait_ms),
                duration(f.device_ms),
                duration(f.latency_us.p50 / 1e3),
                duration(f.latency_us.p99 / 1e3),
                duration(f.latency_us.max / 1e3),
            ]);
        }
        right_align(&mut t, 1);
        let _ = writeln!(text, "{t}\n");
    }
    if !r.blame.is_empty() {
        let mut t = table(&[
            "Who kept others waiting",
            "doing",
            "waited for",
            "share",
            "of faults",
            "holds",
            "longest",
            "holder was",
        ]);
        for b in r.blame.iter().take(ROWS) {
            t.add_row([
                format!(
                    "{} {}{}",
                    b.who,
                    b.pid,
                    if b.neighbour { " (neighbour)" } else { "" }
                ),
                b.what.clone(),
                duration(b.victim_ms),
                format!("{:.1} %", 100.0 * b.share),
                duration(b.victim_fault_ms),
                b.holds.to_string(),
                duration(b.longest_ms),
                mostly(b),
            ]);
        }
        right_align(&mut t, 2);
        let _ = writeln!(text, "{t}\n");
    }
    if !r.convoys.is_empty() {
        let _ = writeln!(
            text,
            "The worst of {} convoys (waits of a millisecond and more behind the same hold):",
            r.convoys_seen
        );
        for c in r.convoys.iter().take(ROWS / 2) {
            let _ = writeln!(text, "  at {}: {}", duration(c.at_ms), c.sentence);
        }
        text.push('\n');
    }
    if !r.verdict.remedies.is_empty() {
        let _ = writeln!(
            text,
            "What would help (shares of the stalled {}; they overlap):",
            duration(r.verdict.stalled_ms)
        );
        for remedy in r.verdict.remedies.iter().take(ROWS / 2) {
            let _ = writeln!(text, "  {:>5.1} %  {}", 100.0 * remedy.share, remedy.text);
        }
        text.push('\n');
    }
    text.push_str(&doubts(r));
    text
}

/// What a holder mostly did.
pub(crate) fn mostly(b: &faultless_observe::BlameRow) -> String {
    let elsewhere: f64 = b.holder_time_ms.values().sum();
    let running = ("running", b.held_ms - elsewhere);
    let parts = b.holder_time_ms.iter().map(|(k, v)| (*k, *v));
    let most = parts.chain([running]).max_by(|a, b| a.1.total_cmp(&b.1));
    match most {
        Some(("asleep", _)) => b
            .asleep_ms
            .iter()
            .max_by(|a, b| a.1.total_cmp(b.1))
            .map_or_else(|| "asleep".to_owned(), |(k, _)| k.clone()),
        Some((what, _)) => what.replace('_', " "),
        None => String::new(),
    }
}

fn doubts(r: &Report) -> String {
    let d = &r.doubts;
    let mut text = String::new();
    if d.lost > 0 {
        let _ = writeln!(
            text,
            "{} records were lost: sums of waits are too small.",
            d.lost
        );
    }
    if d.out_of_step > 0 {
        let _ = writeln!(
            text,
            "Out of step: when {} waits began, the lock itself named its writer, and for {} of them this report has another one.",
            d.checked, d.out_of_step
        );
    }
    if d.unexplained_ms > 0.0 {
        let _ = writeln!(
            text,
            "For {} of {} of waits no holder was seen.",
            duration(d.unexplained_ms),
            duration(d.waited_ms)
        );
    }
    for missing in &r.observed.missing {
        let _ = writeln!(
            text,
            "The tracepoint {missing} was not used, since the kernel lacks it, or (with FUSE as a module) CAP_SYS_ADMIN was lacking; what it tells is missing."
        );
    }
    if r.observed.other_mounts {
        let _ = writeln!(text, "Note: {}.", faultless_observe::OTHER_MOUNTS);
    }
    let _ = writeln!(text, "Note: {}.", r.bounds);
    text
}

use watching::watch;

mod watching {
    use super::{Args, Watched};
    use crate::output;
    use anyhow::Context;
    use faultless_observe::perfetto::Perfetto;
    use faultless_observe::{Observer, Options};
    use faultless_trace::Writer;
    use faultless_untrusted::output::{Kept, Readers};
    use std::path::Path;

    /// Events after which the size of the file for Perfetto is looked at.
    const LOOK_AT_SIZE: u64 = 4096;
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use std::cell::RefCell;
    use std::io::IsTerminal;
    use std::os::fd::AsFd;
    use std::process::{Child, ExitStatus};
    use std::rc::Rc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, LazyLock};
    use std::time::{Duration, Instant};

    /// The signal that asked this process to end. (A terminal sends SIGINT to the program as well.)
    static CAME: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

    /// Waits for the program; hands on to it what this process was told.
    #[allow(unsafe_code, reason = "kill(2)")]
    pub(super) fn wait_for(child: &mut Child) -> std::io::Result<ExitStatus> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            let signal = CAME.swap(0, Ordering::Relaxed);
            if signal != 0 {
                // SAFETY: takes no pointers. The number is the child's, which has not been waited for.
                unsafe { libc::kill(child.id() as i32, signal as i32) };
            }
            std::thread::sleep(TICK);
        }
    }

    /// How long the ring is left to fill.
    const TICK: Duration = Duration::from_millis(20);
    const ONCE: Duration = Duration::from_secs(10);

    /// How often what is in a trace's buffer goes to the file, at least.
    const FLUSH_EVERY: Duration = Duration::from_secs(1);

    pub(crate) fn watch(args: &Args) -> anyhow::Result<Watched> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGHUP] {
            signal_hook::flag::register_usize(signal, Arc::clone(&*CAME), signal as usize)?;
        }
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // The second one ends this process at once.
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop))?;
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        let mut pids = args.pid.clone();
        crate::bench::unique(&mut pids);
        for &pid in &pids {
            faultless_observe::check_process(pid)?;
        }
        let every_fault = args.trace.is_some() || args.perfetto.is_some();
        let mut observer = Observer::start(&Options {
            every_fault,
            follow_children: !args.no_children,
        })?;
        let command: Vec<String> = args
            .command
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        let header = observer.header(&pids, &command);
        let mut trace = args
            .trace
            .as_deref()
            .map(|path| -> anyhow::Result<_> {
                let (output, file) = output::create(path, Readers::Owner)?;
                let writer = Writer::new(file, &header)?;
                Ok((Rc::new(RefCell::new(Some(writer))), output))
            })
            .transpose()?;
        if let Some((writer, _)) = &trace {
            let writer = Rc::clone(writer);
            let (full, most) = (Arc::clone(&stop), args.trace_max);
            observer.record(Box::new(move |event| {
                if let Some(writer) = &mut *writer.borrow_mut() {
                    writer.write(event).context("cannot write the trace")?;
                    if writer.bytes() >= most.get() && !full.swap(true, Ordering::Relaxed) {
                        eprintln!(
                            "faultless: the trace has reached {most}, so the observation ends (--trace-max)"
                        );
                    }
                }
                Ok(())
            }));
        }
        let perfetto = args
            .perfetto
            .as_deref()
            .map(|path| -> anyhow::Result<_> {
                let (output, file) = output::create(path, Readers::Owner)?;
                Ok((Rc::new(RefCell::new(Some(Perfetto::new(file)?))), output))
            })
            .transpose()?;
        if let Some((perfetto, output)) = &perfetto {
            let perfetto = Rc::clone(perfetto);
            let (full, most) = (Arc::clone(&stop), args.trace_max);
            let (len, mut events) = (output.partial().map(Path::to_owned), 0u64);
            observer.record(Box::new(move |event| {
                if let Some(perfetto) = &mut *perfetto.borrow_mut() {
                    perfetto
                        .event(event)
                        .context("cannot write the file for Perfetto")?;
                }
                events += 1;
                let len = || Some(std::fs::metadata(len.as_ref()?).ok()?.len());
                if events.is_multiple_of(LOOK_AT_SIZE)
                    && len().is_some_and(|len| len >= most.get())
                    && !full.swap(true, Ordering::Relaxed)
                {
                    eprintln!(
                        "faultless: the file for Perfetto has reached {most}, so the observation ends (--trace-max)"
                    );
                }
                Ok(())
            }));
        }
        for &pid in &pids {
            observer.watch(pid)?;
        }
        let mut child = match args.command.split_first() {
            Some((program, rest)) => {
                let mut command = std::process::Command::new(program);
                command.args(rest);
                if args.json {
                    // This command's stdout has the report alone.
                    command.stdout(std::io::stderr().as_fd().try_clone_to_owned()?);
                }
                Some(observer.spawn(&mut command)?)
            }
            None => None,
        };
        // From here on a part of the trace is better than none.
        if let Some((_, output)) = &mut trace {
            output.kept = Kept::InPart;
        }

        let terminal = std::io::stdin().is_terminal()
            && std::io::stdout().is_terminal()
            && std::io::stderr().is_terminal();
        let is_live = terminal && !args.once && !args.json && child.is_none();
        let until = args
            .duration
            .or((args.once && child.is_none()).then_some(ONCE))
            .map(|d| Instant::now() + d);
        let mut failure = None;
        if is_live {
            failure = crate::live::run(&mut observer, until, &stop).err();
        } else {
            if !terminal && child.is_none() {
                // For whoever waits until the observation has begun.
                eprintln!("faultless: observing");
            }
            let progress = Progress::new(until, child.is_none());
            let mut flushed = Instant::now();
            while !stop.load(Ordering::Relaxed) && until.is_none_or(|u| Instant::now() < u) {
                let goes_on = match &mut child {
                    Some(child) => child.try_wait()?.is_none(),
                    None => observer.is_anyone_there(),
                };
                if !goes_on {
                    break;
                }
                observer.tick(TICK);
                if let Some((writer, _)) = &trace
                    && flushed.elapsed() >= FLUSH_EVERY
                    && let Some(writer) = &mut *writer.borrow_mut()
                {
                    flushed = Instant::now();
                    // What could not be written is told at the end.
                    let _ = writer.flush();
                }
                progress.show();
            }
            progress.clear();
        }
        let report = observer.finish();
        failure = observer.failure().or(failure);

        // A file that lacks something does not get its name.
        if failure.is_none()
            && let Some((writer, output)) = trace
        {
            let writer = writer.borrow_mut().take().context("the trace is gone")?;
            let written = output.finish(writer.finish().map_err(std::io::Error::other));
            failure = failure.or(written.err().map(Into::into));
        }
        if failure.is_none()
            && let Some((perfetto, output)) = perfetto
        {
            let perfetto = perfetto.borrow_mut().take().context("the file is gone")?;
            failure = failure.or(output.finish(perfetto.finish()).err().map(Into::into));
        }
        Ok(Watched {
            report,
            child,
            failure,
        })
    }

    /// A line on a terminal's stderr that says how long is left.
    struct Progress {
        bar: Option<indicatif::ProgressBar>,
        began: Instant,
    }

    impl Progress {
        fn new(until: Option<Instant>, alone: bool) -> Progress {
            let began = Instant::now();
            // A program that was started has the terminal to itself.
            let bar = (alone && std::io::stderr().is_terminal()).then(|| match until {
                Some(until) => {
                    let bar = indicatif::ProgressBar::new(
                        until.saturating_duration_since(began).as_millis() as u64,
                    );
                    if let Ok(style) =
                        indicatif::ProgressStyle::with_template("observing {bar:30} {eta} left")
                    {
                        bar.set_style(style);
                    }
                    bar
                }
                None => {
                    let bar = indicatif::ProgressBar::new_spinner();
                    bar.set_message("observing; Ctrl-C ends it and prints the report");
                    bar
                }
            });
            Progress { bar, began }
        }

        fn show(&self) {
            if let Some(bar) = &self.bar {
                bar.set_position(self.began.elapsed().as_millis() as u64);
            }
        }

        fn clear(&self) {
            if let Some(bar) = &self.bar {
                bar.finish_and_clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_need_a_unit() {
        assert_eq!(time("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("2m"), Ok(Duration::from_secs(120)));
        assert!(time("10").is_err());
        assert!(time("-1s").is_err());
        assert!(time("nans").is_err());
    }
}
