//! `faultless whatif`.

mod measured;
mod published;

use crate::bench::usage_error;
use crate::output::{self, right_align, table};
use anyhow::Context;
use faultless_untrusted::input;
use faultless_untrusted::output::Readers;
use faultless_untrusted::printable;
use faultless_whatif::compare::{Comparison, Matrix, SCHEMA, Sweep, compare, designs};
use faultless_whatif::costs::Costs;
use faultless_whatif::designs::{DESIGNS, TODAY};
use faultless_whatif::html;
use faultless_whatif::replay::Recording;
use faultless_whatif::run::{GroupOutcome, Outcome};
use faultless_whatif::workload::{BUILT_IN, Workload};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

/// Bytes of a trace.
const TRACE_MAX: u64 = 512 << 20;
/// Workloads and machines are shorter.
const TEXT_MAX: u64 = 1 << 20;

/// Say what each design of the page fault would do to a workload: a model.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
  faultless whatif churn
  faultless whatif churn --sweep threads=1..256 --html churn.html
  faultless whatif my.toml --design vma-retry,vma-hold,faultless --sweep io-latency=50,500,5000
  faultless whatif server.trace
  faultless whatif all
  faultless whatif --list

A workload is a name from --list, or a file (docs/whatif.md). The first group of threads in it is what a design is judged by.")]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    measure: Option<Measure>,
    /// A built-in workload, a file with one (TOML), or a trace that `faultless observe --trace` recorded; all: a table of all that are built in.
    #[arg(default_value = "churn")]
    workload: String,
    /// Designs, separated by commas; all of them, if none is named.
    #[arg(long, value_delimiter = ',', value_name = "DESIGN")]
    design: Vec<String>,
    /// Repeat it with other values: threads=1..512, writers=0,1,8, cores=2..256, io-latency=50,500 (µs), or COST=… (ns).
    #[arg(long, value_name = "WHAT=VALUES")]
    sweep: Option<Sweep>,
    /// What chance begins with; the same seed gives the same figures.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A machine, as `faultless whatif calibrate` prints it, instead of the workload's own.
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,
    /// Simulated seconds, instead of the workload's.
    #[arg(long)]
    seconds: Option<f64>,
    /// Processors, instead of the workload's.
    #[arg(long)]
    cores: Option<u32>,
    /// Print the comparison as JSON (faultless.whatif/1).
    #[arg(long)]
    json: bool,
    /// Write a page with plots.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// List workloads and designs.
    #[arg(long, conflicts_with_all = ["json", "html", "sweep", "costs", "print"])]
    list: bool,
    /// List what things cost in the model, and where each figure comes from.
    #[arg(long, conflicts_with_all = ["json", "html", "sweep", "print"])]
    costs: bool,
    /// Print the workload as text, to be changed.
    #[arg(long, conflicts_with_all = ["json", "html", "sweep"])]
    print: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Measure {
    /// Measure what single operations cost here, and print it for --machine.
    Calibrate(measured::Calibrate),
    /// Predict what was published of designs, and set that beside it.
    Published(published::Args),
    /// Measure the designs that exist here, beside neighbours, and set the model's predictions beside that.
    Validate(measured::Validate),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.measure {
        Some(Measure::Calibrate(args)) => return measured::calibrate(&args),
        Some(Measure::Validate(args)) => return measured::validate(args),
        Some(Measure::Published(args)) => return published::run(&args),
        None => {}
    }
    if args.cores.is_some_and(|n| !(1..=1024).contains(&n)) {
        usage_error("--cores must be 1 to 1024");
    }
    if args.seconds.is_some_and(|s| !(s > 0.0 && s <= 3600.0)) {
        usage_error("--seconds must be more than 0, and at most 3600");
    }
    if args.list {
        return say(&list());
    }
    let machine = args.machine.as_deref().map(measured::machine).transpose()?;
    let changed = |mut workload: Workload| {
        if let Some(machine) = &machine {
            workload = workload.on(machine);
        }
        if let Some(seconds) = args.seconds {
            workload.seconds = seconds;
        }
        if let Some(cores) = args.cores {
            workload.cores = cores;
        }
        workload
    };
    if args.workload == "all" {
        if args.sweep.is_some() || args.html.is_some() || args.print || args.costs {
            usage_error(
                "all is a table of all workloads; --sweep, --html, --print and --costs are for one of them",
            );
        }
        let chosen = designs(&args.design).unwrap_or_else(|e| usage_error(&e.to_string()));
        return matrix(&chosen, &changed, args.seed, args.json);
    }
    let workload = changed(load(&args.workload)?);
    if workload.recorded.is_some() && (args.print || args.seconds.is_some()) {
        usage_error(
            "a trace is replayed from its beginning to its end, and has no text: --print and --seconds are for workloads",
        );
    }
    workload.check()?;
    for value in args.sweep.iter().flat_map(|s| &s.values) {
        let set = args.sweep.as_ref().map(|s| s.knob.set(&workload, *value));
        if let Some(Err(e)) = set {
            usage_error(&format!("--sweep: {e}"));
        }
    }
    if args.costs {
        return say(&costs(&workload.costs));
    }
    if args.print {
        return say(&workload
            .to_text()
            .context("cannot write the workload as text")?);
    }
    let chosen = designs(&args.design).unwrap_or_else(|e| usage_error(&e.to_string()));
    let page = args
        .html
        .as_deref()
        .map(|path| output::create(path, Readers::AsUsual))
        .transpose()?;
    let compared = with_progress(|show| compare(&workload, &chosen, args.sweep, args.seed, show))?;
    if let Some((page, mut file)) = page {
        let text = html::page(&compared).map_err(anyhow::Error::msg)?;
        page.finish(file.write_all(text.as_bytes()).map(|()| file))?;
    }
    if args.json {
        say(&crate::output::json(&compared)?)
    } else {
        say(&tables(&compared))
    }
}

/// Shows on a terminal how many runs of how many are done.
fn with_progress<T>(runs: impl FnOnce(&(dyn Fn(usize, usize) + Sync)) -> T) -> T {
    // (In a pipe it is hidden: indicatif sees to that.)
    let bar = indicatif::ProgressBar::new(0);
    let done = runs(&|done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    done
}

/// All built-in workloads under designs.
fn matrix(
    chosen: &[String],
    changed: &dyn Fn(Workload) -> Workload,
    seed: u64,
    json: bool,
) -> anyhow::Result<()> {
    let names = BUILT_IN.iter().map(|b| b.0);
    let workloads = names.filter_map(faultless_whatif::workload::built_in);
    let workloads: Vec<Workload> = workloads.map(changed).collect();
    let mut jobs = Vec::new();
    for w in &workloads {
        jobs.extend(chosen.iter().map(|d| (w.clone(), d.clone())));
    }
    let outcomes = with_progress(|show| {
        faultless_whatif::compare::run_all(&jobs, seed, |done| show(done, jobs.len()))
    })?;
    if json {
        let all = Matrix {
            schema: SCHEMA,
            seed,
            outcomes,
        };
        return say(&crate::output::json(&all)?);
    }
    let mut text = String::new();
    for (what, of) in [
        (
            "Rounds a second, × today",
            faultless_whatif::compare::throughput as fn(&Outcome) -> f64,
        ),
        (
            "99 % of the rounds within, × today",
            faultless_whatif::compare::tail,
        ),
    ] {
        let mut head = vec![what];
        head.extend(workloads.iter().map(|w| w.name.as_str()));
        let mut t = table(&head);
        for design in chosen {
            let mut row = vec![design.clone()];
            for w in &workloads {
                let find = |d: &str| {
                    let mut all = outcomes.iter();
                    all.find(|o| o.workload == w.name && o.design == d).map(of)
                };
                row.push(match (find(design), find(TODAY)) {
                    (Some(x), Some(today)) if today > 0.0 => format!("{:.2}", x / today),
                    (Some(x), _) => format!("{x:.0}"),
                    _ => "–".to_owned(),
                });
            }
            t.add_row(row);
        }
        right_align(&mut t, 1);
        let _ = writeln!(text, "{t}\n");
    }
    text.push_str("(Of the first group of threads of each workload; without today's kernel among the designs: rounds a second, and microseconds.)\n");
    say(&text)
}

fn say(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(e).context("cannot write the answer")
        }
        _ => Ok(()),
    }
}

fn load(name: &str) -> anyhow::Result<Workload> {
    if let Some(workload) = faultless_whatif::workload::built_in(name) {
        return Ok(workload);
    }
    let path = std::path::Path::new(name);
    if !path.exists() {
        let names: Vec<&str> = BUILT_IN.iter().map(|b| b.0).collect();
        usage_error(&format!(
            "there is no workload and no file {name}; built in are {}",
            names.join(", ")
        ));
    }
    let file = input::open(path).with_context(|| format!("cannot read {}", printable(name)))?;
    let len = file.metadata().map_or(0, |m| m.len());
    anyhow::ensure!(
        len <= TRACE_MAX,
        "{} has {} MiB, and a trace is replayed in memory: {} MiB are the most; record a shorter time",
        printable(name),
        len >> 20,
        TRACE_MAX >> 20
    );
    let file = std::io::Read::take(file, TRACE_MAX);
    let name = &printable(name).to_string();
    match faultless_trace::Reader::new(std::io::BufReader::new(file)) {
        Ok(trace) => {
            let cannot = || format!("cannot read the trace {name}");
            let recording = Recording::read(trace).with_context(cannot)?;
            return Workload::of_recording(name, recording).map_err(anyhow::Error::new);
        }
        // Then it is text.
        Err(faultless_trace::Error::NotATrace) => {}
        Err(e) => return Err(e).with_context(|| format!("cannot read the trace {name}")),
    }
    let text = text_of(path)?;
    Workload::parse(&text).with_context(|| format!("{name} is no workload"))
}

/// A text that is not absurdly long.
fn text_of(path: &std::path::Path) -> anyhow::Result<String> {
    input::text(path, TEXT_MAX).with_context(|| format!("cannot read {}", printable(path)))
}

fn list() -> String {
    let mut t = table(&["Workload", "what it is"]);
    for (name, _) in BUILT_IN {
        if let Some(w) = faultless_whatif::workload::built_in(name) {
            t.add_row([name.to_owned(), w.about]);
        }
    }
    let mut d = table(&["Design", "what it does", "when"]);
    for design in DESIGNS {
        d.add_row([design.id, design.what, design.when]);
    }
    format!("{t}\n\n{d}\n")
}

fn costs(costs: &Costs) -> String {
    let mut t = table(&["Cost", "ns", "what it is", "source"]);
    for (name, ns, what, source) in costs.explained() {
        t.add_row([
            name.replace('_', "-"),
            ns.to_string(),
            what,
            source.to_owned(),
        ]);
    }
    format!("{t}\n")
}

/// Microseconds, with their unit.
fn time(us: f64) -> String {
    faultless_observe::duration(us / 1e3)
}

fn rate(per_second: f64) -> String {
    match per_second {
        r if r >= 100_000.0 => format!("{:.0} k", r / 1e3),
        r if r >= 10_000.0 => format!("{:.1} k", r / 1e3),
        r if r >= 100.0 => format!("{r:.0}"),
        r => format!("{r:.1}"),
    }
}

fn tables(c: &Comparison) -> String {
    let mut text = format!(
        "{}: {} ({} processors; a model, not a measurement)\n\n{}\n\n",
        c.workload.name, c.workload.about, c.workload.cores, c.verdict
    );
    for group in c.outcomes.first().iter().flat_map(|o| &o.groups) {
        let today = c
            .outcomes
            .iter()
            .find(|o| o.design == TODAY)
            .and_then(|o| o.group(&group.name))
            .map(|g| g.per_second);
        let title = format!("{} × {}", group.name, group.threads);
        let mut t = table(&[
            &title,
            "rounds/s",
            "× today",
            "p50",
            "p99",
            "p99.9",
            "max",
            "mmap_lock read",
            "write",
            "VMA",
            "CPU",
        ]);
        for o in c.recorded.iter().chain(&c.outcomes) {
            let Some(g) = o.group(&group.name) else {
                continue;
            };
            let ratio = match today {
                Some(t) if t > 0.0 => format!("{:.2}", g.per_second / t),
                _ => "–".to_owned(),
            };
            let waited = |key: &str| match g.waited_ms_per_second.get(key) {
                Some(ms) if *ms > 0.0005 => format!("{:.1} %", ms / 10.0 / f64::from(g.threads)),
                _ => "–".to_owned(),
            };
            t.add_row([
                o.design.clone(),
                rate(g.per_second),
                ratio,
                time(g.round_us.p50),
                time(g.round_us.p99),
                time(g.round_us.p999),
                time(g.round_us.max),
                waited("mmap_lock_read"),
                waited("mmap_lock_write"),
                waited("vma_write"),
                waited("processor"),
            ]);
        }
        right_align(&mut t, 1);
        let _ = writeln!(text, "{t}\n");
        if let Some(faults) = faults(c, &group.name) {
            let _ = writeln!(text, "{faults}\n");
        }
    }
    text.push_str("(The last four: how much of its time a thread waits for that.)\n\n");
    let mut t = table(&[
        "Machine",
        "mmap_lock/s",
        "pages read/s",
        "read again",
        "gone at retry",
        "processors busy",
    ]);
    for o in &c.outcomes {
        t.add_row([
            o.design.clone(),
            rate(o.mmap_locks_per_second),
            rate(o.reads_per_second),
            format!("{:.1} %", o.read_again_percent),
            format!("{:.1} %", o.gone_at_retry_percent),
            format!("{:.0} %", o.processors_percent),
        ]);
    }
    right_align(&mut t, 1);
    let _ = writeln!(text, "{t}\n");
    if let Some(sweep) = &c.sweep {
        let names: Vec<String> = std::iter::once(sweep.knob.name())
            .chain(c.outcomes.iter().map(|o| o.design.clone()))
            .collect();
        let group = c.outcomes.first().and_then(|o| o.groups.first());
        let _ = writeln!(
            text,
            "Rounds a second of {}, by {}:",
            group.map_or("", |g| g.name.as_str()),
            sweep.knob.name()
        );
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut t = table(&names);
        for p in &c.points {
            let rates = p
                .outcomes
                .iter()
                .map(|o| rate(faultless_whatif::compare::throughput(o)));
            t.add_row(std::iter::once(p.value.to_string()).chain(rates));
        }
        right_align(&mut t, 1);
        let _ = writeln!(text, "{t}\n");
    }
    let unfinished: Vec<&str> = c
        .outcomes
        .iter()
        .filter(|o| o.unfinished)
        .map(|o| o.design.as_str())
        .collect();
    if !unfinished.is_empty() {
        let _ = writeln!(
            text,
            "Not all of the trace was done again in twenty times its length: {}.\n",
            unfinished.join(", ")
        );
    }
    text.push_str("The longest wait for mmap_lock, and what it was behind when it was looked at (once a millisecond):\n");
    for o in &c.outcomes {
        let _ = writeln!(text, "  {}: {}", o.design, worst(o));
    }
    text
}

/// How long faults of a group take, where a round is not a fault.
fn faults(c: &Comparison, group: &str) -> Option<comfy_table::Table> {
    let is_other = |g: &GroupOutcome| {
        g.faults_per_second > 0.0 && (g.faults_per_second / g.per_second - 1.0).abs() > 0.01
    };
    if !c
        .outcomes
        .iter()
        .filter_map(|o| o.group(group))
        .any(is_other)
    {
        return None;
    }
    let title = format!("faults of {group}");
    let mut t = table(&[&title, "faults/s", "p50", "p99", "p99.9", "max"]);
    for o in c.recorded.iter().chain(&c.outcomes) {
        let Some(g) = o.group(group) else { continue };
        t.add_row([
            o.design.clone(),
            rate(g.faults_per_second),
            time(g.fault_us.p50),
            time(g.fault_us.p99),
            time(g.fault_us.p999),
            time(g.fault_us.max),
        ]);
    }
    right_align(&mut t, 1);
    Some(t)
}

fn worst(o: &Outcome) -> String {
    match &o.worst {
        _ if o.longest_mmap_wait_ms < 0.1 => "under 0.1 ms".to_owned(),
        Some(chain) if chain.waited_ms >= o.longest_mmap_wait_ms / 2.0 => {
            format!("{:.1} ms; {chain}", o.longest_mmap_wait_ms)
        }
        // It was over before anybody looked.
        _ => format!("{:.1} ms", o.longest_mmap_wait_ms),
    }
}
