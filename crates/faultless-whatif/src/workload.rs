//! Workloads: which threads of which processes do what, on which machine. They are text (TOML).
//!
//! ```toml
//! name = "churn"
//! about = "readers beside an allocator under load"
//! cores = 2
//! memory = "8 GiB"
//! seconds = 2.0
//!
//! [[files]]
//! name = "data"
//! size = "4 GiB"
//!
//! [[threads]]
//! name = "reader"
//! count = 16
//! loop = [{ read = { of = "data" } }]
//!
//! [[threads]]
//! name = "churn"
//! count = 8
//! loop = [{ map = "64 KiB" }, "touch", "unmap"]
//! ```

use crate::costs::Costs;
use crate::storage::Device;
use faultless_untrusted::printable;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A page, in bytes.
pub const PAGE: u64 = 4096;

/// So many threads, at most, in a workload.
const THREADS_MAX: u64 = 4096;
/// So many mappings at the beginning, at most.
const VMAS_MAX: u64 = 1 << 20;
/// Pages of a region that is paged out, at most.
const PAGE_OUT_MAX: u64 = 1 << 22;
/// Groups of threads that the model adds by itself.
pub(crate) const OWN_GROUPS: [&str; 3] = ["monitor", "kswapd", "evictor"];
/// Groups of threads, at most.
pub(crate) const GROUPS_MAX: usize = 256;
/// Pages that are read at a time, at most.
const READ_AHEAD_MAX: u32 = 8192;
/// Pages of a mapping that a thread makes, at most.
const MAP_MAX: u64 = 1 << 24;
/// The scheduler looks so often, at most, in nanoseconds.
const TICK_MIN: u64 = 10_000;

/// A size in bytes, written as `64 KiB`, `4 GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Bytes(pub u64);

impl Bytes {
    pub(crate) fn pages(self) -> u64 {
        self.0.div_ceil(PAGE)
    }
}

const UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

impl std::str::FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no size; write it with its unit, such as 64 KiB or 4 GiB");
        let (unit, bytes) = UNITS
            .iter()
            .find(|(unit, _)| text.trim_end().ends_with(unit))
            .ok_or_else(wrong)?;
        let number = text.trim_end().strip_suffix(unit).unwrap_or_default();
        let number: f64 = number.trim().parse().map_err(|_| wrong())?;
        let all = number * *bytes as f64;
        if (0.0..=(1u64 << 50) as f64).contains(&all) {
            Ok(Bytes(all as u64))
        } else {
            Err(wrong())
        }
    }
}

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unit = UNITS
            .iter()
            .find(|(_, u)| self.0 >= *u && self.0.is_multiple_of(*u));
        match unit {
            Some((name, bytes)) => write!(f, "{} {name}", self.0 / bytes),
            None => write!(f, "{} B", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// A file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// Its name, for steps.
    pub name: String,
    /// Its size.
    pub size: Bytes,
    /// Pages that are read at a time; 0 or 1: the missing one alone (MADV_RANDOM).
    #[serde(default)]
    pub read_ahead: u32,
    /// Nobody has written it: its pages are zeros, and need no device.
    #[serde(default)]
    pub holes: bool,
    /// Each thread has one of its own.
    #[serde(default)]
    pub each: bool,
}

/// Anonymous memory that a process has from the beginning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Region {
    /// Its name, for steps.
    pub name: String,
    /// Whose.
    #[serde(default = "app")]
    pub process: String,
    /// Its size.
    pub size: Bytes,
    /// Whether all of it has been touched.
    #[serde(default)]
    pub touched: bool,
    /// So many of them, each a mapping of its own; steps get at the last.
    #[serde(default = "one")]
    pub count: u32,
}

/// Threads that do the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Threads {
    /// Their name.
    pub name: String,
    /// How many.
    #[serde(default = "one")]
    pub count: u32,
    /// Of which process.
    #[serde(default = "app")]
    pub process: String,
    /// What they do, over and over.
    pub r#loop: Vec<Step>,
}

fn one() -> u32 {
    1
}

fn app() -> String {
    "app".to_owned()
}

/// In which order pages are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Each once, at random; then again.
    #[default]
    Once,
    /// Any, each as likely.
    Uniform,
    /// Few of them often: Zipf with theta 0.99.
    Zipf,
    /// One after the other, by each thread for itself.
    Sequential,
}

/// Something that a thread does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Step {
    /// Touches a page of a file, which is mapped from the beginning, or of a region, and uses it.
    Read {
        /// Of which file or region.
        of: String,
        /// Which page.
        #[serde(default)]
        order: Order,
    },
    /// Maps anonymous memory of that size.
    Map(Bytes),
    /// Maps a file.
    MapFile(String),
    /// Touches all pages of what it mapped last, in order.
    Touch,
    /// Unmaps what it mapped last.
    Unmap,
    /// Forks; waits for a child that ends at once.
    Fork,
    /// Reads the smaps_rollup of a process.
    Smaps(String),
    /// Gives the pages of a region up (MADV_PAGEOUT).
    PageOut(String),
    /// Punches a hole into a file that it has mapped from the beginning: a page, any.
    Punch(String),
    /// Changes the protection of a file or region that it has mapped from the beginning (mprotect), in which others may be faulting.
    Protect(String),
    /// Computes, for so many microseconds.
    WorkUs(f64),
    /// Sleeps, for so many microseconds.
    SleepUs(f64),
}

/// A workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Workload {
    /// Its name.
    pub name: String,
    /// What it is, in a sentence.
    #[serde(default)]
    pub about: String,
    /// Processors.
    #[serde(default = "two")]
    pub cores: u32,
    /// Room for pages, of files and anonymous ones together: of the machine, or of a control group.
    #[serde(default = "plenty")]
    pub memory: Bytes,
    /// `memory` is the machine's: kswapd reclaims ahead of need. (A control group has none.)
    #[serde(default)]
    pub kswapd: bool,
    /// `memory.high` of the control group: who takes more is slowed down.
    #[serde(default)]
    pub memory_high: Option<Bytes>,
    /// How long is measured.
    #[serde(default = "second")]
    pub seconds: f64,
    /// How long it runs before.
    #[serde(default = "tenth")]
    pub warm_up: f64,
    /// Whether mmap_lock may be taken before those that sleep for it, as since Linux 3.10; else it goes in order.
    #[serde(default = "yes")]
    pub rwsem_steals: bool,
    /// Whether the kernel itself is preempted (CONFIG_PREEMPT), and not only what runs in user space.
    #[serde(default)]
    pub preempt: bool,
    /// Threads of each process that read the events of its userfaultfd, under uffd-monitor.
    #[serde(default = "four")]
    pub monitors: u32,
    /// What is read from.
    #[serde(default)]
    pub device: Device,
    /// What things cost.
    #[serde(default)]
    pub costs: Costs,
    /// Files.
    #[serde(default)]
    pub files: Vec<File>,
    /// Anonymous memory that is there from the beginning.
    #[serde(default)]
    pub regions: Vec<Region>,
    /// Threads.
    pub threads: Vec<Threads>,
    /// A trace that is replayed, instead of threads.
    #[serde(skip)]
    pub recorded: Option<std::sync::Arc<crate::replay::Recording>>,
    /// Reads take what the device says, and not what was recorded.
    #[serde(skip)]
    pub reads_anew: bool,
}

fn yes() -> bool {
    true
}

fn two() -> u32 {
    2
}

fn four() -> u32 {
    4
}

fn plenty() -> Bytes {
    Bytes(1 << 40)
}

fn second() -> f64 {
    1.0
}

fn tenth() -> f64 {
    0.1
}

/// A machine, as `faultless whatif calibrate` writes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Machine {
    /// Processors.
    pub cores: u32,
    /// Whether the kernel itself is preempted (CONFIG_PREEMPT).
    #[serde(default)]
    pub preempt: bool,
    /// What is read from.
    pub device: Device,
    /// What things cost.
    pub costs: Costs,
}

impl Machine {
    /// A machine from its text.
    ///
    /// # Errors
    ///
    /// Where the text is wrong, with the line.
    pub fn parse(text: &str) -> Result<Machine, Error> {
        toml::from_str(text).map_err(Error::Text)
    }

    /// Its text.
    ///
    /// # Errors
    ///
    /// When it has no form as text.
    pub fn to_text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

/// Why a workload cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no workload.
    #[error("{}", in_one_line(.0))]
    Text(toml::de::Error),
    /// It says something that cannot be.
    #[error("the workload {}: {}", printable(name), printable(what))]
    Wrong {
        /// Its name.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// There is no such design.
    #[error("there is no design {name}; there are: {all}", name = printable(.0), all = .1)]
    Design(String, String),
    /// It would take too long.
    #[error(
        "the workload {} takes more than {} million steps under design {design}, which is given up; make it shorter",
        printable(workload),
        events / 1_000_000
    )]
    TooLong {
        /// What was run.
        workload: String,
        /// Under which design.
        design: String,
        /// Steps that were allowed.
        events: u64,
    },
    /// The model is wrong.
    #[error(
        "an invariant of the model is broken: {what} (workload {workload}, design {design}, seed {seed}); please report it with the workload"
    )]
    Broken {
        /// What was run.
        workload: String,
        /// Under which design.
        design: String,
        /// With which seed.
        seed: u64,
        /// What is broken.
        what: String,
    },
}

/// The reason, and where: without a picture of the line.
fn in_one_line(e: &toml::de::Error) -> String {
    let text = e.to_string();
    let line = text.lines().next().unwrap_or_default();
    let at = line.strip_prefix("TOML parse error at ").unwrap_or(line);
    format!("{}: {}", printable(at), printable(e.message()))
}

/// All names, so that nothing of them acts on a terminal. (Names that are the same stay the same.)
fn make_printable(value: &mut toml::Value) {
    match value {
        toml::Value::String(s) => *s = printable(s).to_string(),
        toml::Value::Array(all) => all.iter_mut().for_each(make_printable),
        toml::Value::Table(all) => all.iter_mut().for_each(|(_, v)| make_printable(v)),
        _ => {}
    }
}

impl Workload {
    /// A workload from its text.
    ///
    /// # Errors
    ///
    /// Where the text is wrong, with the line; or what it says that cannot be.
    pub fn parse(text: &str) -> Result<Workload, Error> {
        // (First as it is: errors tell the line.)
        let _: Workload = toml::from_str(text).map_err(Error::Text)?;
        let mut value: toml::Table = toml::from_str(text).map_err(Error::Text)?;
        for (key, value) in &mut value {
            match value {
                toml::Value::String(s) if key == "about" => *s = printable(s).lines().to_string(),
                value => make_printable(value),
            }
        }
        let workload: Workload = value.try_into().map_err(Error::Text)?;
        workload.check()?;
        Ok(workload)
    }

    /// A recording as a workload.
    ///
    /// # Errors
    ///
    /// When there is nothing in it.
    pub fn of_recording(
        name: &str,
        recording: crate::replay::Recording,
    ) -> Result<Workload, Error> {
        if recording.is_empty() {
            return Err(Error::Wrong {
                name: name.to_owned(),
                what: "the trace has no faults and no holds of mmap_lock in it".to_owned(),
            });
        }
        let threads: u64 = recording.groups().iter().map(|g| u64::from(g.1)).sum();
        if threads > THREADS_MAX {
            return Err(Error::Wrong {
                name: name.to_owned(),
                what: format!("{threads} threads were recorded; {THREADS_MAX} are the most"),
            });
        }
        if recording.seconds > 86_400.0 {
            return Err(Error::Wrong {
                name: name.to_owned(),
                what: format!(
                    "the trace is {:.0} hours long; a day is the most",
                    recording.seconds / 3600.0
                ),
            });
        }
        Ok(Workload {
            name: printable(name).to_string(),
            about: format!(
                "a recording of {:.1} s on {} processors{}",
                recording.seconds,
                recording.processors,
                if recording.cut_off { ", cut off" } else { "" }
            ),
            cores: recording.processors,
            memory: plenty(),
            kswapd: false,
            memory_high: None,
            preempt: false,
            monitors: four(),
            seconds: recording.seconds.clamp(0.001, 3600.0),
            warm_up: 0.0,
            rwsem_steals: true,
            device: Device::default(),
            costs: Costs::default(),
            files: Vec::new(),
            regions: Vec::new(),
            threads: Vec::new(),
            recorded: Some(std::sync::Arc::new(recording)),
            reads_anew: false,
        })
    }

    /// The same on another machine.
    pub fn on(&self, machine: &Machine) -> Workload {
        Workload {
            cores: machine.cores,
            preempt: machine.preempt,
            device: machine.device.clone(),
            costs: machine.costs,
            ..self.clone()
        }
    }

    /// Its text, with everything that is said by default.
    ///
    /// # Errors
    ///
    /// When it has no form as text.
    pub fn to_text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// Whether memory is short at all.
    pub(crate) fn is_limited(&self) -> bool {
        self.memory < plenty()
    }

    /// Whether it can be run.
    ///
    /// # Errors
    ///
    /// What of it cannot be.
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |what: String| {
            Err(Error::Wrong {
                name: self.name.clone(),
                what,
            })
        };
        if !(1..=1024).contains(&self.cores) {
            return wrong(format!("cores = {}; it must be 1 to 1024", self.cores));
        }
        if !(self.seconds > 0.0 && self.seconds <= 3600.0) {
            return wrong(format!("seconds = {}; it must be up to 3600", self.seconds));
        }
        if !(0.0..=3600.0).contains(&self.warm_up) {
            return wrong(format!("warm-up = {}; it must be up to 3600", self.warm_up));
        }
        let costs = self.costs.explained();
        if let Some((name, ns, ..)) = costs.iter().find(|c| c.1 > 1_000_000_000) {
            return wrong(format!("the cost {name} is {ns} ns; a second is the most"));
        }
        if self.costs.base_slice < TICK_MIN || self.costs.tick < TICK_MIN {
            return wrong(format!(
                "the costs base-slice and tick must be at least {TICK_MIN} ns"
            ));
        }
        if self.threads.len() > GROUPS_MAX {
            return wrong(format!(
                "{} groups of threads; {GROUPS_MAX} is the most",
                self.threads.len()
            ));
        }
        if let Some(file) = self.files.iter().find(|f| f.read_ahead > READ_AHEAD_MAX) {
            return wrong(format!(
                "{}: read-ahead = {}; {READ_AHEAD_MAX} pages is the most",
                file.name, file.read_ahead
            ));
        }
        let points = &self.device.latency_us;
        let rises = points.windows(2).all(|w| w[0].0 < w[1].0);
        if points.is_empty() || !rises || points.iter().any(|p| !(0.0..=1e9).contains(&p.1)) {
            return wrong(
                "device.latency-us must have points [reads, microseconds] in order of reads".into(),
            );
        }
        let rate = self.device.per_second;
        if rate != 0.0 && !(0.001..=1e9).contains(&rate) {
            return wrong("device.per-second must be 0 (no limit) or 0.001 to 1e9".into());
        }
        if self.device.depth == 0 || !(0.0..=3.0).contains(&self.device.scatter) {
            return wrong("device.depth must be at least 1, and device.scatter 0 to 3".into());
        }
        let spread = &self.device.spread;
        let rises = |points: &[(f64, f64)]| {
            let in_order = points
                .windows(2)
                .all(|w| w[0].0 <= w[1].0 && w[0].1 <= w[1].1);
            let is_fine = |p: &(f64, f64)| (0.0..=1.0).contains(&p.0) && p.1 > 0.0 && p.1 <= 1e6;
            !points.is_empty() && in_order && points.iter().all(is_fine)
        };
        if !spread.windows(2).all(|w| w[0].0 < w[1].0) || !spread.iter().all(|p| rises(&p.1)) {
            return wrong(
                "device.spread must have points [reads, [[share, medians], ...]] in order of reads, and in each of them shares of 0 to 1 and medians that rise".into(),
            );
        }
        let count: u64 = self.threads.iter().map(|t| u64::from(t.count)).sum();
        if (count == 0 && self.recorded.is_none()) || count > THREADS_MAX {
            return wrong(format!("{count} threads; there must be 1 to {THREADS_MAX}"));
        }
        let mut names: Vec<&str> = self.files.iter().map(|f| f.name.as_str()).collect();
        names.extend(self.regions.iter().map(|r| r.name.as_str()));
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|n| n[0] == n[1]) {
            return wrong(format!("two files or regions are named {}", twice[0]));
        }
        let mut names: Vec<&str> = self.threads.iter().map(|t| t.name.as_str()).collect();
        names.extend(OWN_GROUPS);
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|n| n[0] == n[1]) {
            return wrong(match OWN_GROUPS.contains(&twice[0]) {
                true => format!("threads may not be named {}: the model has some", twice[0]),
                false => format!("two groups of threads are named {}", twice[0]),
            });
        }
        if !(1..=1024).contains(&self.monitors) {
            return wrong(format!(
                "monitors = {}; it must be 1 to 1024",
                self.monitors
            ));
        }
        let vmas: u64 = self.regions.iter().map(|r| u64::from(r.count)).sum();
        if self.regions.iter().any(|r| r.count == 0) || vmas > VMAS_MAX {
            return wrong(format!(
                "{vmas} regions; count must be at least 1, and all together at most {VMAS_MAX}"
            ));
        }
        if let Some(high) = self.memory_high
            && (high.0 == 0 || high > self.memory)
        {
            return wrong(format!(
                "memory-high = {high}; it must be more than 0, and at most memory ({})",
                self.memory
            ));
        }
        if self.kswapd && self.memory_high.is_some() {
            return wrong("a control group, which memory-high is of, has no kswapd".into());
        }
        if self.memory.pages() == 0 {
            return wrong("memory = 0; there must be some".into());
        }
        if self.threads.first().is_some_and(|t| t.count == 0) {
            return wrong(format!(
                "count = 0 for {}: then there is nobody to be judged by",
                self.threads[0].name
            ));
        }
        let lost = |r: &&Region| !self.threads.iter().any(|t| t.process == r.process);
        if let Some(region) = self.regions.iter().find(lost) {
            return wrong(format!(
                "the region {} is of the process {}, which has no threads",
                region.name, region.process
            ));
        }
        let is_named = |name: &str| {
            let file = self.files.iter().any(|f| f.name == name);
            file || self.regions.iter().any(|r| r.name == name)
        };
        for size in self
            .files
            .iter()
            .map(|f| f.size)
            .chain(self.regions.iter().map(|r| r.size))
        {
            if size.0 == 0 {
                return wrong("a file or region of no size".into());
            }
        }
        for threads in &self.threads {
            if threads.r#loop.is_empty() {
                return wrong(format!("the threads {} do nothing", threads.name));
            }
            let mut mapped = 0i32;
            for step in &threads.r#loop {
                match step {
                    Step::Read { of, .. } | Step::Protect(of)
                        if self.files.iter().any(|f| &f.name == of && f.each) =>
                    {
                        return wrong(format!(
                            "{}: of {of} each thread has one of its own: map it (map-file)",
                            threads.name
                        ));
                    }
                    Step::Read { of, .. } | Step::PageOut(of) | Step::Protect(of)
                        if !is_named(of) =>
                    {
                        return wrong(format!("{}: there is no file or region {of}", threads.name));
                    }
                    Step::Read { of, .. } | Step::PageOut(of) | Step::Protect(of)
                        if self
                            .regions
                            .iter()
                            .any(|r| &r.name == of && r.process != threads.process) =>
                    {
                        return wrong(format!(
                            "{}: the region {of} is another process's",
                            threads.name
                        ));
                    }
                    Step::PageOut(of) if !self.regions.iter().any(|r| &r.name == of) => {
                        return wrong(format!("{}: {of} is no region", threads.name));
                    }
                    Step::PageOut(of)
                        if self
                            .regions
                            .iter()
                            .any(|r| &r.name == of && r.size.pages() > PAGE_OUT_MAX) =>
                    {
                        return wrong(format!(
                            "{}: {of} is too large to be paged out; {} is the most",
                            threads.name,
                            Bytes(PAGE_OUT_MAX * PAGE)
                        ));
                    }
                    Step::Punch(of) if !self.files.iter().any(|f| &f.name == of && !f.each) => {
                        return wrong(format!(
                            "{}: there is no file {of} that all threads share",
                            threads.name
                        ));
                    }
                    Step::MapFile(of) if !self.files.iter().any(|f| &f.name == of) => {
                        return wrong(format!("{}: there is no file {of}", threads.name));
                    }
                    Step::Smaps(of) if !self.threads.iter().any(|t| &t.process == of) => {
                        return wrong(format!("{}: there is no process {of}", threads.name));
                    }
                    Step::Map(size) if size.0 == 0 => {
                        return wrong(format!("{}: maps nothing", threads.name));
                    }
                    Step::Map(size) if size.pages() > MAP_MAX => {
                        return wrong(format!(
                            "{}: maps {size}; {} is the most",
                            threads.name,
                            Bytes(MAP_MAX * PAGE)
                        ));
                    }
                    Step::MapFile(of)
                        if self
                            .files
                            .iter()
                            .any(|f| &f.name == of && f.size.pages() > MAP_MAX) =>
                    {
                        return wrong(format!(
                            "{}: maps {of}, which is too large for that; {} is the most",
                            threads.name,
                            Bytes(MAP_MAX * PAGE)
                        ));
                    }
                    Step::WorkUs(us) | Step::SleepUs(us) if !(0.0..=1e9).contains(us) => {
                        return wrong(format!("{}: {us} microseconds", threads.name));
                    }
                    Step::Map(_) | Step::MapFile(_) => mapped += 1,
                    Step::Unmap | Step::Touch if mapped == 0 => {
                        return wrong(format!(
                            "{}: touches or unmaps what it has not mapped",
                            threads.name
                        ));
                    }
                    Step::Unmap => mapped -= 1,
                    _ => {}
                }
            }
            if mapped != 0 {
                return wrong(format!("{}: maps more than it unmaps", threads.name));
            }
        }
        Ok(())
    }
}

/// Workloads that are built in: their names and texts.
pub const BUILT_IN: [(&str, &str); 10] = [
    ("quiet", include_str!("../workloads/quiet.toml")),
    ("churn", include_str!("../workloads/churn.toml")),
    ("smaps", include_str!("../workloads/smaps.toml")),
    ("fork", include_str!("../workloads/fork.toml")),
    ("bigfree", include_str!("../workloads/bigfree.toml")),
    ("loop-2010", include_str!("../workloads/loop-2010.toml")),
    ("app-start", include_str!("../workloads/app-start.toml")),
    ("slow-fault", include_str!("../workloads/slow-fault.toml")),
    (
        "memcg-thrash",
        include_str!("../workloads/memcg-thrash.toml"),
    ),
    ("swap-in", include_str!("../workloads/swap-in.toml")),
];

/// A built-in workload.
pub fn built_in(name: &str) -> Option<Workload> {
    let text = BUILT_IN.iter().find(|b| b.0 == name)?.1;
    Some(Workload::parse(text).unwrap_or_else(|e| panic!("the built-in workload {name}: {e}")))
}
