//! `faultless observe`.

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use faultless_observe::{Report, duration};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Say who waits for which lock behind whose I/O, in a live process.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
On a terminal, -p shows a live view: q ends it, and the tables follow. Otherwise the tables come at the end: after
--duration, on Ctrl-C, or when the processes have ended. Needs root, or CAP_BPF and CAP_PERFMON.

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
    #[arg(long)]
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
    // Before anything is observed: it would be in vain if the page could not be written.
    let page = args
        .html
        .as_deref()
        .map(|p| Output::create(p, Kept::IfWhole))
        .transpose()?;
    let report = match &args.from {
        Some(trace) => recorded(trace, args.perfetto.as_deref())?,
        None => watch(&args)?,
    };
    let Watched { report, status } = report;
    if let Some((page, mut file)) = page {
        let text = faultless_observe::html::page(&report);
        page.finish(file.write_all(text.as_bytes()).map(|()| file))?;
    }
    let mut out = std::io::stdout().lock();
    let printed = if args.json {
        serde_json::to_writer_pretty(&mut out, &report)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        out.write_all(tables(&report).as_bytes())
    };
    match printed {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            return Err(e).context("cannot write the report");
        }
        _ => {}
    }
    if let Some(status) = status {
        std::process::exit(status);
    }
    Ok(())
}

struct Watched {
    report: Report,
    /// Of the program that was run.
    status: Option<i32>,
}

fn recorded(trace: &Path, perfetto: Option<&Path>) -> anyhow::Result<Watched> {
    let open = || -> anyhow::Result<_> {
        let file = std::fs::File::open(trace)
            .with_context(|| format!("cannot open the trace {}", trace.display()))?;
        let cannot = || format!("cannot read {}", trace.display());
        faultless_trace::Reader::new(std::io::BufReader::new(file)).with_context(cannot)
    };
    if let Some(path) = perfetto {
        let (output, file) = Output::create(path, Kept::IfWhole)?;
        let mut perfetto = faultless_observe::perfetto::Perfetto::new(file)?;
        for event in open()? {
            perfetto.event(&event.with_context(|| format!("cannot read {}", trace.display()))?)?;
        }
        output.finish(perfetto.finish())?;
    }
    let report = faultless_observe::report_of(open()?)
        .with_context(|| format!("cannot read {}", trace.display()))?;
    Ok(Watched {
        report,
        status: None,
    })
}

/// What becomes of a file that could not be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    IfWhole,
    /// A part is of use as well: it stays, with `.partial` at the end of its name.
    InPart,
}

/// A file that has its name only when it is complete.
struct Output {
    path: PathBuf,
    partial: PathBuf,
    kept: Kept,
}

type File = std::io::BufWriter<std::fs::File>;

impl Output {
    fn create(path: &Path, kept: Kept) -> anyhow::Result<(Output, File)> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let file = std::fs::File::create(&partial)
            .with_context(|| format!("cannot write {}", path.display()))?;
        let output = Output {
            path: path.to_owned(),
            partial,
            kept,
        };
        Ok((output, std::io::BufWriter::with_capacity(1 << 18, file)))
    }

    /// Gives it its name, if it was written.
    fn finish(mut self, written: std::io::Result<File>) -> anyhow::Result<()> {
        written
            .and_then(|mut file| file.flush())
            .and_then(|()| std::fs::rename(&self.partial, &self.path))
            .with_context(|| match self.kept {
                Kept::IfWhole => format!("cannot write {}", self.path.display()),
                Kept::InPart => format!(
                    "cannot write {}; what there is of it is in {}",
                    self.path.display(),
                    self.partial.display()
                ),
            })?;
        self.kept = Kept::InPart;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.kept == Kept::IfWhole {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

// ---- Tables ----

fn table(header: &[&str]) -> Table {
    let mut t = Table::new();
    t.load_preset(presets::NOTHING);
    t.set_header(header.iter().copied());
    t
}

/// All columns but the first so many are numbers.
fn right_align(t: &mut Table, from: usize) {
    for column in t.column_iter_mut().skip(from) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

fn percent(part: f64, whole: f64) -> String {
    if whole <= 0.0 {
        return "–".to_owned();
    }
    format!("{:.1} %", 100.0 * part / whole)
}

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
    let more = r.observed.processes.len().saturating_sub(4);
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
        for (key, ms) in parts.into_iter().filter(|p| p.1 > 0.0) {
            t.add_row([
                key.replace('_', " "),
                duration(ms),
                percent(ms, r.faults.total_ms),
            ]);
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
            "Of {} waits that began while a writer held the lock, {} began behind another writer than the one found here.",
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
            "This kernel has no tracepoint {missing}; what it tells is missing."
        );
    }
    let _ = writeln!(text, "Note: {}.", r.bounds);
    text
}

use watching::watch;

mod watching {
    use super::{Args, Kept, Output, Watched};
    use anyhow::Context;
    use faultless_observe::perfetto::Perfetto;
    use faultless_observe::{Observer, Options};
    use faultless_trace::Writer;
    use std::cell::RefCell;
    use std::io::IsTerminal;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Child;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    /// How long the ring is left to fill.
    const TICK: Duration = Duration::from_millis(20);
    const ONCE: Duration = Duration::from_secs(10);

    pub(crate) fn watch(args: &Args) -> anyhow::Result<Watched> {
        let mut pids = args.pid.clone();
        crate::bench::unique(&mut pids);
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
        let trace = args
            .trace
            .as_deref()
            .map(|path| -> anyhow::Result<_> {
                let (output, file) = Output::create(path, Kept::InPart)?;
                let writer = Writer::new(file, &header)?;
                Ok((Rc::new(RefCell::new(Some(writer))), output))
            })
            .transpose()?;
        if let Some((writer, _)) = &trace {
            let writer = Rc::clone(writer);
            observer.record(Box::new(move |event| {
                if let Some(writer) = &mut *writer.borrow_mut() {
                    writer.write(event).context("cannot write the trace")?;
                }
                Ok(())
            }));
        }
        let perfetto = args
            .perfetto
            .as_deref()
            .map(|path| -> anyhow::Result<_> {
                let (output, file) = Output::create(path, Kept::IfWhole)?;
                Ok((Rc::new(RefCell::new(Some(Perfetto::new(file)?))), output))
            })
            .transpose()?;
        if let Some((perfetto, _)) = &perfetto {
            let perfetto = Rc::clone(perfetto);
            observer.record(Box::new(move |event| {
                if let Some(perfetto) = &mut *perfetto.borrow_mut() {
                    perfetto
                        .event(event)
                        .context("cannot write the file for Perfetto")?;
                }
                Ok(())
            }));
        }
        for &pid in &pids {
            observer.watch(pid)?;
        }

        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        let mut child = match args.command.split_first() {
            Some((program, rest)) => {
                Some(observer.spawn(std::process::Command::new(program).args(rest))?)
            }
            None => None,
        };
        let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        let is_live = terminal && !args.once && !args.json && child.is_none();
        let until = args
            .duration
            .or((args.once && child.is_none()).then_some(ONCE))
            .map(|d| Instant::now() + d);
        if is_live {
            crate::live::run(&mut observer, until, &stop)?;
        } else {
            if !terminal && child.is_none() {
                // For whoever waits until the observation has begun.
                eprintln!("faultless: observing");
            }
            let progress = Progress::new(until, child.is_none());
            while !stop.load(Ordering::Relaxed)
                && observer.is_anyone_there()
                && until.is_none_or(|u| Instant::now() < u)
            {
                observer.tick(TICK)?;
                progress.show();
            }
            progress.clear();
        }
        let status = child
            .as_mut()
            .map(|child| end(child, &mut observer))
            .transpose()?;
        let report = observer.finish()?;

        if let Some((writer, output)) = trace {
            let writer = writer.borrow_mut().take().context("the trace is gone")?;
            output.finish(writer.finish().map_err(std::io::Error::other))?;
        }
        if let Some((perfetto, output)) = perfetto {
            let perfetto = perfetto.borrow_mut().take().context("the file is gone")?;
            output.finish(perfetto.finish())?;
        }
        Ok(Watched { report, status })
    }

    /// The program's exit status. One that still runs when the observation ends goes on until it ends by itself.
    fn end(child: &mut Child, observer: &mut Observer) -> anyhow::Result<i32> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
            }
            observer.tick(TICK)?;
        }
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
                    let bar = indicatif::ProgressBar::new((until - began).as_millis() as u64);
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
