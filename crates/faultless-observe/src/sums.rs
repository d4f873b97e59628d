//! Sums: where time goes, and how long faults take.

use faultless_trace::{CAUSES, Fault, Nanos};

/// Where the time of a fault, or of a wait, goes: the six [`Cause`]s first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(usize)]
pub(crate) enum Part {
    Device,
    Page,
    Lock,
    Reclaim,
    Cpu,
    Other,
    /// mmap_lock, held by a writer.
    Writer,
    /// mmap_lock, held by readers, behind whom a writer was queued (or for whom a writer waited).
    Reader,
    /// mmap_lock that nobody held: the next one was being woken. And waits that are too short to be told singly.
    HandOver,
    Running,
}

pub(crate) const PARTS: usize = 10;

impl Part {
    pub(crate) const ALL: [Part; PARTS] = [
        Part::Device,
        Part::Page,
        Part::Lock,
        Part::Reclaim,
        Part::Cpu,
        Part::Other,
        Part::Writer,
        Part::Reader,
        Part::HandOver,
        Part::Running,
    ];

    /// For tables and legends.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Part::Device => "device",
            Part::Page => "page being read by others",
            Part::Lock => "another lock",
            Part::Reclaim => "reclaim",
            Part::Cpu => "no processor free",
            Part::Other => "asleep otherwise",
            Part::Writer => "mmap_lock, behind a writer",
            Part::Reader => "mmap_lock, behind a reader",
            Part::HandOver => "mmap_lock, handed over",
            Part::Running => "running",
        }
    }

    /// For machines.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Part::Device => "device",
            Part::Page => "page_lock",
            Part::Lock => "other_lock",
            Part::Reclaim => "reclaim",
            Part::Cpu => "runnable",
            Part::Other => "asleep",
            Part::Writer => "mmap_lock_behind_writer",
            Part::Reader => "mmap_lock_behind_reader",
            Part::HandOver => "mmap_lock_hand_over",
            Part::Running => "running",
        }
    }
}

/// Nanoseconds by [`Part`].
pub(crate) type Parts = [Nanos; PARTS];

/// Sums of faults. From the kernel's map, or of events one by one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FaultSums {
    pub(crate) faults: u64,
    pub(crate) major: u64,
    pub(crate) gone: u64,
    pub(crate) total: Nanos,
    /// The longest one.
    pub(crate) longest: Nanos,
    pub(crate) first: Nanos,
    pub(crate) wait: Nanos,
    pub(crate) retry: Nanos,
    pub(crate) retry_asleep: Nanos,
    pub(crate) causes: [Nanos; CAUSES],
    /// By duration: see [`bucket_bounds`].
    pub(crate) buckets: [u64; crate::raw::BUCKETS],
}

impl Default for FaultSums {
    fn default() -> Self {
        FaultSums {
            faults: 0,
            major: 0,
            gone: 0,
            total: 0,
            longest: 0,
            first: 0,
            wait: 0,
            retry: 0,
            retry_asleep: 0,
            causes: [0; CAUSES],
            buckets: [0; crate::raw::BUCKETS],
        }
    }
}

impl FaultSums {
    pub(crate) fn add(&mut self, other: &FaultSums) {
        self.longest = self.longest.max(other.longest);
        self.combine(other, |a, b| a.saturating_add(b));
    }

    pub(crate) fn subtract(&mut self, other: &FaultSums) {
        self.combine(other, |a, b| a.saturating_sub(b));
    }

    fn combine(&mut self, other: &FaultSums, f: impl Fn(u64, u64) -> u64) {
        for (a, b) in [
            (&mut self.faults, other.faults),
            (&mut self.major, other.major),
            (&mut self.gone, other.gone),
            (&mut self.total, other.total),
            (&mut self.first, other.first),
            (&mut self.wait, other.wait),
            (&mut self.retry, other.retry),
            (&mut self.retry_asleep, other.retry_asleep),
        ] {
            *a = f(*a, b);
        }
        for (a, &b) in self.causes.iter_mut().zip(&other.causes) {
            *a = f(*a, b);
        }
        for (a, &b) in self.buckets.iter_mut().zip(&other.buckets) {
            *a = f(*a, b);
        }
    }

    pub(crate) fn one(fault: &Fault) -> FaultSums {
        let mut sums = FaultSums {
            faults: 1,
            major: fault.major.into(),
            gone: fault.gone.into(),
            total: fault.took,
            longest: fault.took,
            first: fault.first,
            wait: fault.wait,
            retry: fault.retry,
            retry_asleep: fault.retry_asleep,
            causes: fault.causes,
            ..FaultSums::default()
        };
        sums.buckets[bucket_of(fault.took)] = 1;
        sums
    }

    /// The duration, in nanoseconds, that a share of the faults does not exceed: the upper bound of its bucket, or the
    /// longest.
    pub(crate) fn quantile(&self, share: f64) -> Nanos {
        let all: u64 = self.buckets.iter().sum();
        let rank = (share * all as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (no, &n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return bucket_bounds(no).1.min(self.longest);
            }
        }
        0
    }
}

/// The bucket of a duration: four to an octave, from 1,024 ns; as the kernel's part counts them.
pub(crate) fn bucket_of(ns: Nanos) -> usize {
    let quarters = ns >> 8;
    if quarters < 4 {
        return 0;
    }
    let log = quarters.ilog2();
    let fraction = (quarters >> (log - 2)) & 3;
    ((log as usize - 2) * 4 + fraction as usize).min(crate::raw::BUCKETS - 1)
}

/// The durations from which and to which a bucket counts, in nanoseconds.
pub(crate) fn bucket_bounds(bucket: usize) -> (Nanos, Nanos) {
    let bound = |b: usize| (4 + b as u64 % 4) << (b / 4) << 8;
    match bucket {
        0 => (0, bound(1)),
        b => (bound(b), bound(b + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_the_kernels_part() {
        for ns in [0, 1, 1023, 1024, 1300, 5000, 123_456, 9_999_999, 1 << 40] {
            let (from, to) = bucket_bounds(bucket_of(ns));
            assert!(
                from <= ns && (ns < to || bucket_of(ns) == crate::raw::BUCKETS - 1),
                "{ns} in {from}..{to}"
            );
        }
    }
}
