//! Counters that the fault path can bump.

use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::process;
use crate::base::stats::{BUCKETS, Latency, Stats, bucket};

/// Most processors that count by themselves; with more, some share.
const SHARDS_MAX: usize = 16;

/// What is counted.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(crate) enum Count {
    Misses,
    Fills,
    BytesRead,
    Evictions,
    Cooled,
    Rescued,
    TakenBack,
    Waits,
    Errors,
    Charged,
    Released,
    PrefetchDropped,
    Ahead,
    AheadUsed,
    AheadWasted,
}
const COUNTS: usize = 15;

#[repr(align(128))]
#[derive(Debug)]
struct Shard {
    counts: [AtomicU64; COUNTS],
    latency: [AtomicU64; BUCKETS],
}

/// The live counters of one map.
#[derive(Debug)]
pub(crate) struct Counters(Box<[Shard]>);

fn shards() -> usize {
    let processors = process::possible_processors();
    processors.next_power_of_two().min(SHARDS_MAX)
}

impl Counters {
    pub(crate) fn new() -> Self {
        Counters(
            (0..shards())
                .map(|_| Shard {
                    counts: [const { AtomicU64::new(0) }; COUNTS],
                    latency: [const { AtomicU64::new(0) }; BUCKETS],
                })
                .collect(),
        )
    }

    fn shard(&self) -> &Shard {
        &self.0[process::shard(self.0.len())]
    }

    pub(crate) fn add(&self, what: Count, n: u64) {
        self.shard().counts[what as usize].fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn record_fill_ns(&self, ns: u64) {
        self.shard().latency[bucket(ns)].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self, what: Count) -> u64 {
        self.0.iter().fold(0u64, |sum, s| {
            sum.wrapping_add(s.counts[what as usize].load(Ordering::Relaxed))
        })
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let mut latency = Latency {
            buckets: vec![0; BUCKETS],
        };
        for s in &self.0 {
            for (sum, n) in latency.buckets.iter_mut().zip(&s.latency) {
                *sum += n.load(Ordering::Relaxed);
            }
        }
        Stats {
            misses: self.get(Count::Misses),
            fills: self.get(Count::Fills),
            bytes_read: self.get(Count::BytesRead),
            evictions: self.get(Count::Evictions),
            cooled: self.get(Count::Cooled),
            rescued: self.get(Count::Rescued),
            taken_back: self.get(Count::TakenBack),
            waits: self.get(Count::Waits),
            errors: self.get(Count::Errors),
            prefetch_dropped: self.get(Count::PrefetchDropped),
            read_ahead: self.get(Count::Ahead),
            read_ahead_used: self.get(Count::AheadUsed),
            read_ahead_wasted: self.get(Count::AheadWasted),
            fill_latency: latency,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_rise() {
        let c = Counters::new();
        (1..=1000u64).for_each(|us| c.record_fill_ns(us * 1000));
        let l = c.snapshot().fill_latency;
        assert_eq!(l.count(), 1000);
        let (half, most) = (
            l.quantile(0.5).expect("some"),
            l.quantile(0.99).expect("some"),
        );
        assert!((500..=625).contains(&half.as_micros()), "{half:?}");
        assert!((990..=1250).contains(&most.as_micros()), "{most:?}");
        assert_eq!(Latency::default().quantile(0.5), None);
    }
}
