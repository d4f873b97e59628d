//! Queues that take turns: what holds up the threads of one holds up no other's.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

struct Lane<T> {
    queue: VecDeque<T>,
    /// Threads that are at something that was taken from it.
    busy: usize,
}

/// A queue for each key, with so many threads at most that are at what was taken from it.
pub(crate) struct Lanes<K, T> {
    lanes: HashMap<K, Lane<T>>,
    /// The keys of those that are not empty, in the order of their turns.
    turns: VecDeque<K>,
    len: usize,
    busy_max: usize,
}

impl<K: Copy + Eq + Hash, T> Lanes<K, T> {
    pub(crate) fn new(busy_max: usize) -> Self {
        Lanes {
            lanes: HashMap::new(),
            turns: VecDeque::new(),
            len: 0,
            busy_max,
        }
    }

    /// Queued in all lanes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn push(&mut self, key: K, item: T) {
        let lane = self.lanes.entry(key).or_insert_with(|| Lane {
            queue: VecDeque::new(),
            busy: 0,
        });
        if lane.queue.is_empty() {
            self.turns.push_back(key);
        }
        lane.queue.push_back(item);
        self.len += 1;
    }

    /// The lane whose turn it is, of those from which something may be taken.
    pub(crate) fn next(&self) -> Option<K> {
        let may = |key: &&K| {
            let lane = self.lanes.get(key);
            lane.is_some_and(|lane| lane.busy < self.busy_max)
        };
        self.turns.iter().find(may).copied()
    }

    /// Takes so many items of a lane at most, and counts a thread that is at them, until [`done`](Self::done).
    pub(crate) fn take(&mut self, key: K, most: usize) -> Vec<T> {
        let Some(lane) = self.lanes.get_mut(&key) else {
            return Vec::new();
        };
        lane.busy += 1;
        let n = lane.queue.len().min(most);
        let some: Vec<T> = lane.queue.drain(..n).collect();
        self.len -= n;
        let more = !lane.queue.is_empty();
        self.turns.retain(|&other| other != key);
        if more {
            self.turns.push_back(key);
        }
        some
    }

    /// A thread is through with what it took.
    pub(crate) fn done(&mut self, key: K) {
        if let Some(lane) = self.lanes.get_mut(&key) {
            lane.busy = lane.busy.saturating_sub(1);
            if lane.busy == 0 && lane.queue.is_empty() {
                self.lanes.remove(&key);
            }
        }
    }

    /// Takes the items out that `f` says.
    pub(crate) fn take_out(&mut self, f: impl Fn(&T) -> bool) -> Vec<T> {
        let mut out = Vec::new();
        for key in &self.turns {
            let Some(lane) = self.lanes.get_mut(key) else {
                continue;
            };
            let all = std::mem::take(&mut lane.queue);
            for item in all {
                match f(&item) {
                    true => out.push(item),
                    false => lane.queue.push_back(item),
                }
            }
        }
        self.len -= out.len();
        let Self { lanes, turns, .. } = self;
        turns.retain(|key| lanes.get(key).is_some_and(|lane| !lane.queue.is_empty()));
        lanes.retain(|_, lane| lane.busy > 0 || !lane.queue.is_empty());
        out
    }
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;

    #[test]
    fn lanes_take_turns_and_each_has_its_share_of_threads() {
        let mut lanes = Lanes::new(2);
        for i in 0..5 {
            lanes.push('a', i);
        }
        lanes.push('b', 10);
        assert_eq!((lanes.len(), lanes.next()), (6, Some('a')));
        assert_eq!(lanes.take('a', 2), [0, 1]);
        assert_eq!(lanes.next(), Some('b'));
        assert_eq!(lanes.take('b', 9), [10]);
        assert_eq!(lanes.take('a', 2), [2, 3]);
        // Two threads are at a's, and b has nothing.
        assert_eq!((lanes.next(), lanes.len()), (None, 1));
        lanes.push('b', 11);
        assert_eq!(lanes.next(), Some('b'));
        lanes.done('a');
        assert_eq!(lanes.next(), Some('a'));
        assert_eq!(lanes.take_out(|&i| i == 11), [11]);
        assert_eq!(lanes.take('a', 9), [4]);
        lanes.done('a');
        lanes.done('a');
        lanes.done('b');
        assert_eq!((lanes.len(), lanes.next()), (0, None));
        assert!(lanes.lanes.is_empty() && lanes.turns.is_empty());
    }
}
