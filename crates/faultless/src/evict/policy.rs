//! Which units go first. Ordinary single-threaded code that can be driven alone: the evictor feeds it what it observes.
//!
//! Loads of resident pages are invisible, so what there is to go by are arrivals, refaults (a unit that comes back soon
//! after it was evicted arrives *hot*), and pins. Three queues, all first-in-first-out:
//!
//! * `probation`: units that arrived cold.
//! * `protected`: units that arrived hot or were seen again; at most half of all pages.
//! * `cold`: the oldest of both, which the evictor has marked MADV_FREE: the kernel may take them when memory is short,
//!   and they are the next to go when the budget is.
//!
//! This is the shape of S3-FIFO (Yang et al., SOSP 2023) with the shadow entries of Linux's `mm/workingset.c` for
//! ghosts: the shadow lives in the absent unit's word, so a ghost costs no memory here.

use std::collections::VecDeque;

/// A tracked unit: an entry as the fault path names it, and its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) entry: u64,
    /// Memory of the unit, in 4 KiB pages.
    pub(crate) pages: u32,
}

/// A unit that is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Victim {
    pub(crate) item: Item,
    /// It was among the cold ones.
    pub(crate) cold: bool,
}

/// The order of eviction.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    probation: Queue,
    protected: Queue,
    cold: Queue,
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    pages: u64,
}

impl Queue {
    fn push(&mut self, item: Item) {
        self.pages += u64::from(item.pages);
        self.items.push_back(item);
    }
    fn pop(&mut self) -> Option<Item> {
        let item = self.items.pop_front()?;
        self.pages -= u64::from(item.pages);
        Some(item)
    }
    fn retain(&mut self, mut keep: impl FnMut(Item) -> bool) {
        let pages = &mut self.pages;
        self.items.retain(|&i| {
            let stays = keep(i);
            if !stays {
                *pages -= u64::from(i.pages);
            }
            stays
        });
        self.items.shrink_to(self.items.len() * 2);
    }
}

impl Policy {
    /// A unit was filled; `hot` if it was seen before.
    pub(crate) fn arrive(&mut self, item: Item, hot: bool) {
        if hot {
            self.protected.push(item)
        } else {
            self.probation.push(item)
        }
    }

    /// The next unit to mark MADV_FREE. If it could be, it goes to [`cooled`](Self::cooled), else back to
    /// [`arrive`](Self::arrive).
    pub(crate) fn next_to_cool(&mut self) -> Option<Item> {
        // Hot units beyond their share are the ones that have gone unseen longest among the hot.
        if self.protected.pages > self.pages() / 2 || self.probation.items.is_empty() {
            self.protected.pop()
        } else {
            self.probation.pop()
        }
    }

    /// A unit was marked MADV_FREE.
    pub(crate) fn cooled(&mut self, item: Item) {
        self.cold.push(item);
    }

    /// The next unit to evict. If it cannot be (it is pinned, or was seen), it goes back to [`arrive`](Self::arrive).
    pub(crate) fn next_victim(&mut self) -> Option<Victim> {
        if let Some(item) = self.cold.pop() {
            return Some(Victim { item, cold: true });
        }
        self.next_to_cool().map(|item| Victim { item, cold: false })
    }

    /// Units tracked.
    pub(crate) fn len(&self) -> usize {
        self.probation.items.len() + self.protected.items.len() + self.cold.items.len()
    }

    /// Pages tracked.
    pub(crate) fn pages(&self) -> u64 {
        self.firm_pages() + self.cold.pages
    }

    /// Pages that are not marked MADV_FREE.
    pub(crate) fn firm_pages(&self) -> u64 {
        self.probation.pages + self.protected.pages
    }

    /// Memory that the queues take.
    pub(crate) fn bytes(&self) -> u64 {
        [&self.probation, &self.protected, &self.cold]
            .iter()
            .map(|q| q.items.capacity() * size_of::<Item>())
            .sum::<usize>() as u64
    }

    /// Forgets the units for which `keep` is false.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(Item) -> bool) {
        self.probation.retain(&mut keep);
        self.protected.retain(&mut keep);
        self.cold.retain(&mut keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(entry: u64) -> Item {
        Item { entry, pages: 1 }
    }

    #[test]
    fn what_came_first_goes_first_and_hot_goes_last() {
        let mut p = Policy::default();
        (1..=6).for_each(|i| p.arrive(item(i), i % 3 == 0));
        let order: Vec<_> = std::iter::from_fn(|| p.next_victim())
            .map(|v| v.item.entry)
            .collect();
        assert_eq!(
            order,
            [1, 2, 4, 3, 5, 6],
            "3 goes before 5: by then the hot are more than half"
        );
        assert_eq!(p.pages(), 0);
    }

    #[test]
    fn hot_units_beyond_half_lose_their_protection() {
        let mut p = Policy::default();
        (1..=8).for_each(|i| p.arrive(item(i), i > 2));
        assert_eq!(
            p.next_to_cool().map(|i| i.entry),
            Some(3),
            "six of eight are hot: the oldest of them"
        );
    }

    #[test]
    fn cooled_units_go_before_all_others() {
        let mut p = Policy::default();
        (1..=3).for_each(|i| p.arrive(item(i), false));
        let first = p.next_to_cool().expect("one");
        p.cooled(first);
        p.arrive(item(4), false);
        assert_eq!(p.firm_pages(), 3);
        assert_eq!(
            p.next_victim(),
            Some(Victim {
                item: first,
                cold: true
            })
        );
        p.retain(|i| i.entry != 3);
        assert_eq!(
            std::iter::from_fn(|| p.next_victim())
                .map(|v| v.item.entry)
                .collect::<Vec<_>>(),
            [2, 4]
        );
    }
}
