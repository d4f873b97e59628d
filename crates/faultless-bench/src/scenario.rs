//! Scenarios: what is read, in what order, beside whom, and on what terms.

use serde::{Deserialize, Serialize};

/// A scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Cold random reads, and nobody else.
    Quiet,
    /// Cold random reads beside eight threads that mmap, touch and munmap 64 KiB in a loop: an allocator under load.
    Churn,
    /// Cold random reads while another process reads `/proc/PID/smaps_rollup` in a loop, this one holds 6 GiB of touched
    /// memory, and one thread maps and unmaps 64 KiB every millisecond: a metrics agent beside a service.
    Smaps,
    /// Cold random reads beside a thread that forks, and waits for a child that exits at once, in a loop, with 1 GiB
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
    /// A process that reads smaps_rollup.
    Smaps,
    /// A thread that forks.
    Fork,
    /// A thread that frees a gibibyte at a time.
    Bigfree,
    /// Somebody who opens the file for writing, once.
    Writer,
}

impl Scenario {
    /// All, in the order in which they are run.
    pub const ALL: [Scenario; 14] = [
        Scenario::Quiet,
        Scenario::Churn,
        Scenario::Smaps,
        Scenario::Fork,
        Scenario::Bigfree,
        Scenario::PressureUniform,
        Scenario::PressureZipf,
        Scenario::PressureScan,
        Scenario::Scan,
        Scenario::HotInOrder,
        Scenario::HotAtRandom,
        Scenario::Latency5,
        Scenario::Latency50,
        Scenario::Writer,
    ];

    /// Those that show what mmap_lock costs, and what it costs not to take it.
    pub const ABOUT_THE_LOCK: [Scenario; 5] = [
        Scenario::Quiet,
        Scenario::Churn,
        Scenario::Smaps,
        Scenario::Fork,
        Scenario::Bigfree,
    ];

    /// As it is written in tables.
    pub fn name(self) -> &'static str {
        match self {
            Scenario::Quiet => "quiet",
            Scenario::Churn => "churn",
            Scenario::Smaps => "smaps",
            Scenario::Fork => "fork",
            Scenario::Bigfree => "bigfree",
            Scenario::PressureUniform => "pressure, uniform",
            Scenario::PressureZipf => "pressure, Zipf",
            Scenario::PressureScan => "pressure, Zipf and scan",
            Scenario::Scan => "scan",
            Scenario::HotInOrder => "hot, read in order",
            Scenario::HotAtRandom => "hot, read at random",
            Scenario::Latency5 => "latency 5 ms",
            Scenario::Latency50 => "latency 50 ms",
            Scenario::Writer => "writer",
        }
    }

    /// What it stands for, in a line.
    pub fn describe(self) -> &'static str {
        match self {
            Scenario::Quiet => "random reads, nothing else",
            Scenario::Churn => {
                "8 threads mmap, touch and munmap 64 KiB in a loop (an allocator under load)"
            }
            Scenario::Smaps => {
                "another process reads /proc/PID/smaps_rollup in a loop (a metrics agent)"
            }
            Scenario::Fork => "a thread forks and waits in a loop, with 1 GiB touched",
            Scenario::Bigfree => {
                "a thread allocates, touches and frees 1 GiB in a loop (a growing hash table)"
            }
            Scenario::PressureUniform => "random reads in a control group of an eighth of the data",
            Scenario::PressureZipf => {
                "Zipf (theta 0.99) in a control group of an eighth of the data"
            }
            Scenario::PressureScan => {
                "Zipf (theta 0.99) with a scan beside it, in a control group of an eighth of the data"
            }
            Scenario::Scan => "all of the data once, in order, by words",
            Scenario::HotInOrder => {
                "random 8-byte loads from resident pages that were read in order"
            }
            Scenario::HotAtRandom => {
                "random 8-byte loads from resident pages that were read at random"
            }
            Scenario::Latency5 => "storage that answers after 5 ms, beside churn",
            Scenario::Latency50 => "storage that answers after 50 ms, beside churn",
            Scenario::Writer => {
                "all pages are in memory; halfway somebody opens the file for writing (its p99: how long that took)"
            }
        }
    }

    /// Touched memory that the process holds during all measurements of the scenario, in bytes.
    pub fn ballast(self) -> u64 {
        match self {
            Scenario::Smaps => 6 << 30,
            Scenario::Fork => 1 << 30,
            _ => 0,
        }
    }

    /// What the readers do.
    pub fn access(self) -> Access {
        match self {
            Scenario::PressureUniform => Access::Uniform,
            Scenario::PressureZipf => Access::Zipf,
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
            Scenario::Churn | Scenario::Latency5 | Scenario::Latency50 => Disturbance::Churn,
            Scenario::Smaps => Disturbance::Smaps,
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
