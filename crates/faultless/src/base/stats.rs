//! The figures that users read: what happened in a map or in a pool, and how long fills took.

use std::time::Duration;

/// Sub-buckets for each power of two: a bucket is at most 25 % wide.
const SUB_BITS: u32 = 2;
const SUB: usize = 1 << SUB_BITS;
/// Buckets up to 2^38 ns, about 275 s; what is longer counts in the last.
pub(crate) const BUCKETS: usize = 37 * SUB;

pub(crate) fn bucket(ns: u64) -> usize {
    if ns < SUB as u64 {
        return ns as usize;
    }
    let exponent = 63 - ns.leading_zeros();
    let sub = (ns >> (exponent - SUB_BITS)) as usize & (SUB - 1);
    (((exponent - SUB_BITS + 1) as usize) * SUB + sub).min(BUCKETS - 1)
}

/// Upper end of a bucket, in nanoseconds.
fn bucket_end(index: usize) -> u64 {
    if index < SUB {
        return index as u64 + 1;
    }
    let exponent = (index / SUB) as u32 + SUB_BITS - 1;
    let sub = (index % SUB) as u64;
    (SUB as u64 + sub + 1) << (exponent - SUB_BITS)
}

/// What happened in a map, or in all maps of a pool, since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Touches of absent pages that came to the engine: by loads, pins and prefetches. A thread that waits for another
    /// thread's fill of the same page counts too.
    pub misses: u64,
    /// Units (fill units, 4 KiB by default) that were read and installed.
    pub fills: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Units that the engine gave up to stay within the budget, or that were released.
    pub evictions: u64,
    /// Units that were taken out of the map, their bytes kept for a while: a touch in that time rescues them.
    pub cooled: u64,
    /// Of these, units that were touched in time: misses that asked no device.
    pub rescued: u64,
    /// Units that the engine held for resident and found gone: under memory pressure the kernel takes cold pages back.
    pub taken_back: u64,
    /// How often a thread waited: for another's fill, for the budget, or for a batch that was in flight.
    pub waits: u64,
    /// Fills that failed.
    pub errors: u64,
    /// Parts of prefetches that were dropped because the queue or the budget was full.
    pub prefetch_dropped: u64,
    /// Units that were asked for because somebody was found to read in order.
    pub read_ahead: u64,
    /// Of these, units in windows that the reader entered.
    pub read_ahead_used: u64,
    /// Of these, units in windows that the reader was found not to enter, as it went elsewhere.
    pub read_ahead_wasted: u64,
    /// How long fills took, from the claim of the unit to its installation.
    pub fill_latency: Latency,
}

impl Stats {
    pub(crate) fn add(&mut self, other: &Stats) {
        self.misses += other.misses;
        self.fills += other.fills;
        self.bytes_read += other.bytes_read;
        self.evictions += other.evictions;
        self.cooled += other.cooled;
        self.rescued += other.rescued;
        self.taken_back += other.taken_back;
        self.waits += other.waits;
        self.errors += other.errors;
        self.prefetch_dropped += other.prefetch_dropped;
        self.read_ahead += other.read_ahead;
        self.read_ahead_used += other.read_ahead_used;
        self.read_ahead_wasted += other.read_ahead_wasted;
        self.fill_latency.buckets.resize(BUCKETS, 0);
        for (sum, n) in self
            .fill_latency
            .buckets
            .iter_mut()
            .zip(&other.fill_latency.buckets)
        {
            *sum += n;
        }
    }
}

/// A histogram of durations whose buckets are at most 25 % wide.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latency {
    pub(crate) buckets: Vec<u64>,
}

impl Latency {
    /// How many durations were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The duration that a share `q` (0 to 1) of all did not exceed, rounded up to the end of its bucket; `None` if
    /// nothing was recorded.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        let rank = ((count as f64 * q.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, &n) in self.buckets.iter().enumerate() {
            seen += n;
            if n > 0 && seen >= rank {
                return Some(Duration::from_nanos(bucket_end(i)));
            }
        }
        None
    }

    /// The buckets that are not empty: the end of each, and how many durations lie in it.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        self.buckets
            .iter()
            .enumerate()
            .filter(|&(_, &n)| n > 0)
            .map(|(i, &n)| (Duration::from_nanos(bucket_end(i)), n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_in_a_bucket_at_most_a_quarter_wide() {
        let mut last = 0;
        for ns in (0..200)
            .chain((8..38).flat_map(|e| [(1u64 << e) - 1, 1 << e, (1 << e) + (1 << (e - 1))]))
        {
            let b = bucket(ns);
            assert!(b < BUCKETS);
            assert!(
                ns < bucket_end(b),
                "{ns} in bucket {b}, which ends at {}",
                bucket_end(b)
            );
            assert!(
                bucket_end(b) as f64 <= (ns.max(1) as f64) * 1.26 + 1.0,
                "{ns}: {}",
                bucket_end(b)
            );
            assert!(ns < 200 || b >= last);
            last = b;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }
}
