//! Scenarios: what is read, in what order, beside whom, and on what terms.

use crate::cell::{SCAN_SHARE, THETA};
use crate::neighbour::{AGENT_EVERY, BIG, CHURN_THREADS, MAP_EVERY, SMALL};
use faultless::ByteSize;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The control group of the pressure scenarios has this part of the data as memory.
pub const PRESSURE_FRACTION: u64 = 8;
/// Touched memory beside an agent that reads smaps_rollup, and beside a thread that forks.
const SMAPS_BALLAST: u64 = 6 << 30;
const FORK_BALLAST: u64 = 1 << 30;

/// A scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Cold random reads, and nobody else.
    Quiet,
    /// Cold random reads beside eight threads that mmap, touch and munmap 64 KiB in a loop: an allocator under load.
    Churn,
    /// Cold random reads while another process reads `/proc/PID/smaps_rollup` in a loop without pause, this one holds 6 GiB
    /// of touched memory, and one thread maps and unmaps 64 KiB every millisecond: the most eager metrics agent beside a
    /// service.
    Smaps,
    /// The same with an agent that looks once a second, and without the thread that maps: an ordinary metrics agent.
    SmapsGentle,
    /// As [`Smaps`](Scenario::Smaps), with an agent that asks by `PAGEMAP_SCAN` which pages are in memory: a checkpoint, or an estimate of
    /// the working set. (smaps does without `mmap_lock` from Linux 7.2 on.)
    Pagemap,
    /// Cold random reads beside a thread that forks, and waits for a child that exits immediately, in a loop, with 1 GiB
    /// touched.
    Fork,
    /// Cold random reads beside a thread that allocates, touches and frees 1 GiB in a loop: a hash table that grows.
    Bigfree,
    /// Random reads, every page alike, in a control group whose memory is an eighth of the data.
    PressureUniform,
    /// The same with few hot pages: Zipf with theta 0.99.
    PressureZipf,
    /// The same, while another thread reads all pages in order: each fourth read is its.
    PressureScan,
    /// As [`PressureUniform`](Scenario::PressureUniform), beside the threads of [`Churn`](Scenario::Churn).
    PressureChurn,
    /// The same beside the agent and the thread of [`Smaps`](Scenario::Smaps). Its 6 GiB are not counted in the group.
    PressureSmaps,
    /// As [`PressureZipf`](Scenario::PressureZipf), with a budget that fits the control group and with one of twice its memory.
    PressureOver,
    /// The same, and the control group's memory is halved while the readers run: with a budget that fits what is left, and with one
    /// that did fit before.
    PressureShrink,
    /// As [`Quiet`](Scenario::Quiet), by all ways to ask for a page.
    Reads,
    /// All of the data read once in order, by words.
    Scan,
    /// Random 8-byte loads from resident pages that were read in order.
    HotInOrder,
    /// Random 8-byte loads from resident pages that were read at random.
    HotAtRandom,
    /// Cold random reads from storage that answers after 5 ms (a FUSE file system), beside churn.
    Latency5,
    /// The same with 50 ms.
    Latency50,
    /// Random reads of resident pages, and halfway somebody opens the file for writing.
    Writer,
}

/// What the readers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Every page once, in random order.
    Cold,
    /// Any page, each as likely.
    Uniform,
    /// Any page, few of them often.
    Zipf,
    /// The same, while one thread reads in order.
    ZipfAndScan,
    /// Each thread its part of the data, in order, by words.
    Scan,
    /// Single loads from resident pages.
    Hot,
    /// Whole pages, all of which are resident.
    Resident,
}

/// Who disturbs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disturbance {
    /// Nobody.
    None,
    /// Threads that map and unmap.
    Churn,
    /// A process that reads smaps_rollup without pause, and a thread that maps and unmaps.
    Smaps,
    /// A process that reads smaps_rollup once a second.
    SmapsGentle,
    /// A process that scans the page tables without pause, and a thread that maps and unmaps.
    Pagemap,
    /// A thread that forks.
    Fork,
    /// A thread that frees a gibibyte at a time.
    Bigfree,
    /// Somebody who opens the file for writing, once.
    Writer,
}

impl Disturbance {
    /// How often another process looks at this one, if one does; zero: without pause.
    pub fn agent_every(self) -> Option<Duration> {
        match self {
            Disturbance::Smaps | Disturbance::Pagemap => Some(Duration::ZERO),
            Disturbance::SmapsGentle => Some(AGENT_EVERY),
            _ => None,
        }
    }
}

/// A time between two events of a kind, in words.
fn each(time: Duration) -> String {
    if time.is_zero() {
        "without pause".to_owned()
    } else if time == Duration::from_secs(1) {
        "once a second".to_owned()
    } else if time == Duration::from_millis(1) {
        "each millisecond".to_owned()
    } else {
        format!("every {}", span(time))
    }
}

/// A time in the largest unit in which it is a whole number.
fn span(time: Duration) -> String {
    let us = time.as_micros();
    if us.is_multiple_of(1_000_000) {
        format!("{} s", us / 1_000_000)
    } else if us.is_multiple_of(1_000) {
        format!("{} ms", us / 1_000)
    } else {
        format!("{us} µs")
    }
}

impl Scenario {
    /// All, in the order in which they are run.
    pub const ALL: [Scenario; 21] = [
        Scenario::Quiet,
        Scenario::Churn,
        Scenario::Smaps,
        Scenario::SmapsGentle,
        Scenario::Pagemap,
        Scenario::Fork,
        Scenario::Bigfree,
        Scenario::PressureUniform,
        Scenario::PressureZipf,
        Scenario::PressureScan,
        Scenario::PressureChurn,
        Scenario::PressureSmaps,
        Scenario::PressureOver,
        Scenario::PressureShrink,
        Scenario::Reads,
        Scenario::Scan,
        Scenario::HotInOrder,
        Scenario::HotAtRandom,
        Scenario::Latency5,
        Scenario::Latency50,
        Scenario::Writer,
    ];

    /// Those that show what mmap_lock costs, and what it costs not to take it.
    pub const ABOUT_THE_LOCK: [Scenario; 7] = [
        Scenario::Quiet,
        Scenario::Churn,
        Scenario::Smaps,
        Scenario::SmapsGentle,
        Scenario::Pagemap,
        Scenario::Fork,
        Scenario::Bigfree,
    ];

    /// As it is written in tables.
    pub fn name(self) -> &'static str {
        match self {
            Scenario::Quiet => "quiet",
            Scenario::Churn => "churn",
            Scenario::Smaps => "smaps",
            Scenario::SmapsGentle => "smaps-gentle",
            Scenario::Pagemap => "pagemap",
            Scenario::Fork => "fork",
            Scenario::Bigfree => "bigfree",
            Scenario::PressureUniform => "pressure, uniform",
            Scenario::PressureZipf => "pressure, Zipf",
            Scenario::PressureScan => "pressure, Zipf and scan",
            Scenario::PressureChurn => "pressure, churn",
            Scenario::PressureSmaps => "pressure, smaps",
            Scenario::PressureOver => "pressure, large budget",
            Scenario::PressureShrink => "pressure, shrinking group",
            Scenario::Reads => "reads",
            Scenario::Scan => "scan",
            Scenario::HotInOrder => "hot, read in order",
            Scenario::HotAtRandom => "hot, read at random",
            Scenario::Latency5 => "latency 5 ms",
            Scenario::Latency50 => "latency 50 ms",
            Scenario::Writer => "writer",
        }
    }

    /// What is read, and what the neighbour does, in a line: with the numbers that are in force.
    ///
    /// `size` is how much data is used; `delay` is how long the storage takes to answer in every scenario, if it is not the
    /// disk.
    pub fn describe(self, size: ByteSize, delay: Option<Duration>) -> String {
        let small = ByteSize::new(SMALL as u64);
        let big = ByteSize::new(BIG as u64);
        let held = ByteSize::new(self.ballast());
        let group = format!(
            "in a control group of {}, 1/{PRESSURE_FRACTION} of the data",
            ByteSize::new(size.get() / PRESSURE_FRACTION)
        );
        let churn = format!(
            "{CHURN_THREADS} threads of the process that each map, touch and unmap {small} in a loop without pause"
        );
        let agent = match self.disturbance().agent_every() {
            None => String::new(),
            Some(every) => format!(
                "another process that {} {}{}{}",
                match self {
                    Scenario::Pagemap =>
                        "asks which pages of this one are in memory (PAGEMAP_SCAN)",
                    _ => "reads this one's /proc/PID/smaps_rollup",
                },
                if every.is_zero() { "in a loop " } else { "" },
                each(every),
                if self.pressure() {
                    format!(", with {held} touched outside the group")
                } else {
                    format!(", with {held} touched")
                }
            ),
        };
        let mapper = format!("a thread that maps and unmaps {small} {}", each(MAP_EVERY));
        let text = match self {
            Scenario::Quiet | Scenario::Reads => {
                "random reads of cold pages, beside nobody".to_owned()
            }
            Scenario::Churn => {
                format!("random reads of cold pages beside {churn} (an allocator under load)")
            }
            Scenario::Smaps => format!(
                "random reads of cold pages beside {agent}, and {mapper} (the most eager of metrics agents)"
            ),
            Scenario::Pagemap => format!(
                "random reads of cold pages beside {agent}, and {mapper} (a checkpoint, or an estimate of the working set)"
            ),
            Scenario::SmapsGentle => {
                format!("random reads of cold pages beside {agent} (an ordinary metrics agent)")
            }
            Scenario::Fork => format!(
                "random reads of cold pages beside a thread that forks, and waits for a child that exits immediately, in a loop without pause, with {held} touched"
            ),
            Scenario::Bigfree => format!(
                "random reads of cold pages beside a thread that maps, touches and unmaps {big} in a loop without pause (a growing hash table)"
            ),
            Scenario::PressureUniform => format!("random reads {group}"),
            Scenario::PressureZipf => format!("Zipf (theta {THETA}) {group}"),
            Scenario::PressureScan => format!(
                "Zipf (theta {THETA}) with a scan beside it, which does one read of {SCAN_SHARE}, {group}"
            ),
            Scenario::PressureChurn => format!("random reads {group}, beside {churn}"),
            Scenario::PressureSmaps => {
                format!("random reads {group}, beside {agent}, and {mapper}")
            }
            Scenario::PressureOver => format!(
                "Zipf (theta {THETA}) {group}; the budget of faultless-over is twice the group's memory"
            ),
            Scenario::PressureShrink => format!(
                "Zipf (theta {THETA}) {group}, which is halved while they run; the budget of faultless fits what is left, and that of faultless-over what was there before"
            ),
            Scenario::Scan => format!("all of the data ({size}) once, in order, by words"),
            Scenario::HotInOrder => {
                "random 8-byte loads from resident pages that were read in order".to_owned()
            }
            Scenario::HotAtRandom => {
                "random 8-byte loads from resident pages that were read at random".to_owned()
            }
            Scenario::Latency5 | Scenario::Latency50 => {
                format!("random reads of cold pages beside {churn}")
            }
            Scenario::Writer => {
                "random reads of pages that are all in memory; halfway somebody opens the file for writing (its p99: how long that took)".to_owned()
            }
        };
        let own = self.storage_delay_us().map(Duration::from_micros);
        match own.or(delay) {
            Some(delay) => format!("{text}; storage that answers after {}", span(delay)),
            None => text,
        }
    }

    /// Touched memory that the process holds during all measurements of the scenario, in bytes.
    pub fn ballast(self) -> u64 {
        match self {
            Scenario::Smaps
            | Scenario::SmapsGentle
            | Scenario::Pagemap
            | Scenario::PressureSmaps => SMAPS_BALLAST,
            Scenario::Fork => FORK_BALLAST,
            _ => 0,
        }
    }

    /// What the readers do.
    pub fn access(self) -> Access {
        match self {
            Scenario::PressureUniform | Scenario::PressureChurn | Scenario::PressureSmaps => {
                Access::Uniform
            }
            Scenario::PressureZipf | Scenario::PressureOver | Scenario::PressureShrink => {
                Access::Zipf
            }
            Scenario::PressureScan => Access::ZipfAndScan,
            Scenario::Scan => Access::Scan,
            Scenario::HotInOrder | Scenario::HotAtRandom => Access::Hot,
            Scenario::Writer => Access::Resident,
            _ => Access::Cold,
        }
    }

    /// Who disturbs them.
    pub fn disturbance(self) -> Disturbance {
        match self {
            Scenario::Churn
            | Scenario::PressureChurn
            | Scenario::Latency5
            | Scenario::Latency50 => Disturbance::Churn,
            Scenario::Smaps | Scenario::PressureSmaps => Disturbance::Smaps,
            Scenario::SmapsGentle => Disturbance::SmapsGentle,
            Scenario::Pagemap => Disturbance::Pagemap,
            Scenario::Fork => Disturbance::Fork,
            Scenario::Bigfree => Disturbance::Bigfree,
            Scenario::Writer => Disturbance::Writer,
            _ => Disturbance::None,
        }
    }

    /// Whether each contender runs in a process and a control group of its own.
    pub fn pressure(self) -> bool {
        matches!(
            self.access(),
            Access::Uniform | Access::Zipf | Access::ZipfAndScan
        )
    }

    /// Whether the engine is measured with a second budget, which is larger than the control group's memory.
    pub fn has_large_budget(self) -> bool {
        matches!(self, Scenario::PressureOver | Scenario::PressureShrink)
    }

    /// How long the storage takes to answer, in microseconds, where that is part of the scenario.
    pub fn storage_delay_us(self) -> Option<u64> {
        match self {
            Scenario::Latency5 => Some(5_000),
            Scenario::Latency50 => Some(50_000),
            _ => None,
        }
    }

    /// Numbers of reader threads, unless told otherwise.
    pub fn threads(self) -> Vec<usize> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        match self {
            Scenario::Quiet => vec![1, 4, 16, 64, 256],
            Scenario::Reads => vec![1, 4, 16, 64],
            Scenario::PressureUniform => vec![16, 64],
            Scenario::Scan => vec![1, 4],
            Scenario::HotInOrder | Scenario::HotAtRandom => {
                let mut all: Vec<usize> = vec![1, cores, 2 * cores];
                all.dedup();
                all
            }
            Scenario::Latency5 | Scenario::Latency50 => vec![64],
            _ => vec![16],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn title(scenario: Scenario) -> String {
        scenario.describe(ByteSize::gib(4), None)
    }

    #[test]
    fn a_title_says_what_the_neighbour_does() {
        let smaps = title(Scenario::Smaps);
        for part in [
            "in a loop without pause",
            "6 GiB",
            "64 KiB each millisecond",
        ] {
            assert!(smaps.contains(part), "{smaps}");
        }
        let gentle = title(Scenario::SmapsGentle);
        assert!(
            gentle.contains("once a second") && gentle.contains("6 GiB"),
            "{gentle}"
        );
        assert!(!gentle.contains("thread"), "{gentle}");
        for scenario in Scenario::ALL {
            let ballast = ByteSize::new(scenario.ballast());
            let says = title(scenario).contains(&ballast.to_string());
            assert!(says || scenario.ballast() == 0, "{}", title(scenario));
        }
    }

    #[test]
    fn a_title_has_the_numbers_in_force() {
        let title = Scenario::PressureZipf.describe(ByteSize::gib(16), None);
        assert!(title.contains("2 GiB, 1/8 of the data"), "{title}");
        let slow = Some(Duration::from_micros(500));
        let title = Scenario::Quiet.describe(ByteSize::gib(4), slow);
        assert!(
            title.ends_with("storage that answers after 500 µs"),
            "{title}"
        );
        let title = Scenario::Latency5.describe(ByteSize::gib(4), slow);
        assert!(
            title.ends_with("storage that answers after 5 ms"),
            "{title}"
        );
    }

    #[test]
    fn times_are_told_in_words() {
        assert_eq!(each(Duration::ZERO), "without pause");
        assert_eq!(each(Duration::from_secs(1)), "once a second");
        assert_eq!(each(Duration::from_secs(5)), "every 5 s");
        assert_eq!(each(Duration::from_micros(1500)), "every 1500 µs");
    }

    #[test]
    fn the_gentle_agent_is_run_where_the_eager_one_is() {
        for all in [&Scenario::ALL[..], &Scenario::ABOUT_THE_LOCK[..]] {
            assert!(all.contains(&Scenario::Smaps) && all.contains(&Scenario::SmapsGentle));
        }
    }
}
