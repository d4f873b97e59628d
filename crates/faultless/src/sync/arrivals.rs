//! Units that were filled, on their way to the evictor.
//!
//! There is a ring for each processor, so that threads on several write no cache line that they share. The evictor takes some entries of
//! each in turn: those of one processor arrive in order, and those of several roughly so.

use crate::base::ids::Entry;
use crate::base::padded::Padded;
use crate::base::primitive::{AtomicU64, AtomicUsize, Ordering};
use crate::base::process;
use crate::sync::portions::{Portions, SHARDS};
use crate::sync::ring::{LEAST, Ring};

/// Entries that are taken from one ring before the next one's turn: a cache line of them.
const RUN: usize = 8;

/// Entries of several producers, for one consumer.
#[derive(Debug)]
pub(crate) struct Arrivals {
    rings: Box<[Ring]>,
    /// Bytes of the units in the rings, and the rests of portions.
    bytes: Padded<AtomicU64>,
    at_hand: Portions,
    /// How many entries the consumer has looked for. (It alone uses it.)
    looks: Padded<AtomicUsize>,
}

impl Arrivals {
    /// With room for at least so many entries, told from at most so many processors without contention.
    pub(crate) fn new(entries: u64, processors: usize) -> std::io::Result<Self> {
        // (Where there is little to keep, a few pages of slots would be too many.)
        let count = (entries / LEAST).clamp(1, SHARDS as u64) as usize;
        let count = floor_to_power_of_two(count.min(processors.next_power_of_two()));
        let each = entries.div_ceil(count as u64);
        let rings: std::io::Result<Box<[Ring]>> = (0..count).map(|_| Ring::new(each)).collect();
        Ok(Arrivals {
            rings: rings?,
            bytes: Padded::default(),
            at_hand: Portions::default(),
            looks: Padded::default(),
        })
    }

    /// Counts the bytes of a unit that is about to be pushed, in portions of that size.
    pub(crate) fn count(&self, bytes: u64, portion: u64) {
        if bytes > portion {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else if !self.at_hand.take(bytes) {
            self.bytes.fetch_add(bytes + portion, Ordering::Relaxed);
            self.take_off(self.at_hand.leave(portion));
        }
    }

    /// Appends `entry`; `false` if there is no room.
    pub(crate) fn push(&self, entry: Entry) -> bool {
        let mine = process::shard(self.rings.len());
        let (before, after) = self.rings.split_at(mine);
        after.iter().chain(before).any(|ring| ring.push(entry))
    }

    /// Takes an entry. Only one thread may call this.
    pub(crate) fn pop(&self) -> Option<Entry> {
        let mut looks = self.looks.load(Ordering::Relaxed);
        let mut found = None;
        for _ in 0..=self.rings.len() {
            let at = (looks / RUN) % self.rings.len();
            found = self.rings[at].pop();
            looks = match found {
                Some(_) => looks.wrapping_add(1),
                None => (looks / RUN).wrapping_add(1).wrapping_mul(RUN),
            };
            if found.is_some() {
                break;
            }
        }
        self.looks.store(looks, Ordering::Relaxed);
        found
    }

    /// Units of so many bytes were popped, and are now counted elsewhere.
    pub(crate) fn take_off(&self, bytes: u64) {
        if bytes > 0 {
            self.bytes.fetch_sub(bytes, Ordering::Release);
        }
    }

    /// No portion is kept.
    pub(crate) fn gather(&self) {
        self.take_off(self.at_hand.gather());
    }

    /// Bytes of the units that are on their way: never less than there are, and more by a portion for each processor at most.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Whether no unit is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        self.rings.iter().all(Ring::is_empty)
    }

    /// Bytes that the rings occupy once every slot was used.
    pub(crate) fn memory(&self) -> u64 {
        self.rings.iter().map(Ring::bytes).sum()
    }
}

fn floor_to_power_of_two(n: usize) -> usize {
    1 << n.ilog2()
}

#[cfg(all(test, not(loom), not(faultless_sim)))]
mod tests {
    use super::*;

    #[test]
    fn a_small_pool_has_one_ring_and_a_large_one_has_one_for_each_processor() {
        let rings = |entries, processors| {
            let arrivals = Arrivals::new(entries, processors).expect("memory");
            assert!(arrivals.memory() / 8 >= entries);
            arrivals.rings.len()
        };
        assert_eq!(rings(512, 16), 1);
        assert_eq!(rings(3000, 16), 4);
        assert_eq!(
            [1, 2, 3, 16, 100].map(|p| rings(1 << 20, p)),
            [1, 2, 4, 16, 16]
        );
    }

    /// If the ring of this processor is full, entries go to the other rings. All entries arrive.
    #[test]
    fn a_full_ring_leaves_entries_to_the_others() {
        let arrivals = Arrivals::new(2 * LEAST, 2).expect("memory");
        let most = arrivals.memory() / 8;
        for lap in 0..3 {
            assert!(arrivals.is_empty());
            let entries = lap * most + 1..=(lap + 1) * most;
            assert!(entries.clone().all(|n| arrivals.push(Entry::new(n))));
            assert!(!arrivals.push(Entry::new(7)), "full");
            let mut all: Vec<u64> = std::iter::from_fn(|| arrivals.pop())
                .map(Entry::get)
                .collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(entries));
        }
    }

    #[test]
    fn entries_of_all_rings_are_taken_in_turn() {
        let arrivals = Arrivals::new(2 * LEAST, 2).expect("memory");
        for n in 0..64 {
            assert!(arrivals.rings[0].push(Entry::new(1_000 + n)));
            assert!(arrivals.rings[1].push(Entry::new(2_000 + n)));
        }
        let first: Vec<u64> = (0..4 * RUN)
            .filter_map(|_| arrivals.pop())
            .map(Entry::get)
            .collect();
        let of_first = first.iter().filter(|&&n| n < 2_000).count();
        assert_eq!((first.len(), of_first), (4 * RUN, 2 * RUN));
    }

    #[test]
    fn bytes_are_never_fewer_than_there_are() {
        let arrivals = Arrivals::new(LEAST, 1).expect("memory");
        let portion = 16 << 10;
        for n in 1..100u64 {
            arrivals.count(4096, portion);
            let there = n * 4096;
            let most = there + portion * SHARDS as u64;
            assert!((there..=most).contains(&arrivals.bytes()));
        }
        arrivals.count(1 << 20, portion);
        arrivals.gather();
        assert_eq!(arrivals.bytes(), 99 * 4096 + (1 << 20));
        arrivals.count(4096, 0);
        assert_eq!(arrivals.bytes(), 100 * 4096 + (1 << 20));
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Producers on two processors, one of which has more than its ring has room for; a consumer that looks meanwhile. Each entry arrives
    /// once.
    #[test]
    fn what_is_pushed_from_several_processors_arrives_once() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(|| {
            let arrivals = Arc::new(Arrivals::new(4, 2).expect("memory"));
            assert_eq!(arrivals.rings.len(), 2);
            let producers = [(0, [1, 2, 3]), (1, [11, 12, 13])].map(|(processor, entries)| {
                let arrivals = arrivals.clone();
                thread::spawn(move || -> Vec<u64> {
                    process::PROCESSOR.with(|p| p.set(processor));
                    let went_in = |&n: &u64| arrivals.push(Entry::new(n));
                    entries.into_iter().filter(went_in).collect()
                })
            });
            let mut seen: Vec<u64> = (0..2)
                .filter_map(|_| arrivals.pop())
                .map(Entry::get)
                .collect();
            let pushed = producers.map(|p| p.join().unwrap());
            seen.extend(std::iter::from_fn(|| arrivals.pop()).map(Entry::get));
            let mut pushed = pushed.concat();
            assert!(pushed.len() >= 4, "as many as there is room for");
            pushed.sort_unstable();
            seen.sort_unstable();
            assert_eq!(seen, pushed);
            assert!(arrivals.is_empty());
        });
    }
}
