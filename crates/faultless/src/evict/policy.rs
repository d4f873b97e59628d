//! Which units go first. Ordinary single-threaded code that can be driven alone: the evictor feeds it what it observes,
//! and so does the simulator of `faultless bench policy`.
//!
//! Loads of resident pages are invisible. What there is to go by are arrivals, refaults, pins, and *rescues*: a unit
//! that is to go is taken out of the map, but its bytes are kept in a cooling area for a while, so that a touch of it
//! becomes visible, and cheap (no device is asked). With that, this is S3-FIFO (Yang et al., SOSP 2023):
//!
//! ```text
//!   a miss ──► fresh ──► cooling log of the fresh ──► gone; a shadow remains
//!                │ seen          │ rescued
//!                ▼               ▼
//!   a miss ──► main ◄────────────┴──────────────┐
//!   with a      │                               │ rescued
//!   near shadow └──────► cooling log of main ───┴──► gone
//! ```
//!
//! * `fresh`: mapped units that arrived cold. Its share is tiny: a unit proves itself in the cooling log, where it can
//!   be seen, which takes the place of S3-FIFO's small queue.
//! * `main`: mapped units that proved themselves.
//! * The logs are rings of slots, used in turn: what lies in the slot that is due is the oldest of its log.
//! * A shadow is a time in the word of an absent unit (as in Linux's `mm/workingset.c`), so that a ghost costs no memory.
//!   Only the fresh leave one, and time counts what they are: so ghosts are the last units that left the first log.
//!
//! Where no cooling area can be had, units are given up at once, and the share of `fresh` is that of S3-FIFO's paper.

use crate::base::ids::{Entry, Serial, Slot};
use crate::space::cooling::credit;
use std::collections::VecDeque;

/// Share of all units that stay in `fresh`, with a cooling area and without, as a divisor.
const FRESH_SHARE: u64 = 200;
const FRESH_SHARE_UNCOOLED: u64 = 10;
/// Shares of the budget that the cooling logs take, in thousandths.
const FRESH_LOG: u64 = 20;
const MAIN_LOG: u64 = 120;
/// Share of the budget that ghosts reach back, in percent.
const GHOSTS: u64 = 60;

/// How many evicted pages a shadow may be old for its unit to count as seen before, with a budget of `pages`.
pub fn ghost_reach(pages: u64) -> u64 {
    pages * GHOSTS / 100
}

/// Where a unit was when it was chosen to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It had not proved itself: it leaves a shadow.
    Fresh,
    /// It had.
    Main,
}

/// A tracked unit: an entry as the fault path names it, and its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Which unit of which map.
    pub entry: Entry,
    /// Memory of the unit, in 4 KiB pages.
    pub pages: u32,
}

/// A unit that is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// Which.
    pub item: Item,
    /// From which queue.
    pub place: Place,
    /// It was marked MADV_FREE: if it is firm by now, it was filled afresh, and has another entry.
    pub soft: bool,
}

/// The queues of mapped units.
#[derive(Debug)]
pub struct Policy {
    fresh: Queue,
    main: Queue,
    cooling: bool,
}

#[derive(Debug, Clone, Copy)]
struct Queued {
    item: Item,
    soft: bool,
    /// How often it stays when its turn to go comes.
    credit: u8,
}

/// First in, first out. The oldest `looked` entries have been offered for softening.
#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<Queued>,
    pages: u64,
    soft_pages: u64,
    looked: usize,
}

impl Queue {
    fn push(&mut self, item: Item, credit: u8) {
        self.push_back(Queued {
            item,
            soft: false,
            credit,
        });
    }

    fn push_back(&mut self, e: Queued) {
        let pages = u64::from(e.item.pages);
        self.pages += pages;
        self.soft_pages += if e.soft { pages } else { 0 };
        self.entries.push_back(e);
    }

    fn pop(&mut self) -> Option<Queued> {
        let e = self.entries.pop_front()?;
        self.pages -= u64::from(e.item.pages);
        if e.soft {
            self.soft_pages -= u64::from(e.item.pages);
        }
        self.looked = self.looked.saturating_sub(1);
        Some(e)
    }

    fn firm_pages(&self) -> u64 {
        self.pages - self.soft_pages
    }

    fn next_to_soften(&mut self) -> Option<(usize, Item)> {
        loop {
            let at = self.looked;
            let e = self.entries.get(at)?;
            self.looked += 1;
            if !e.soft {
                return Some((at, e.item));
            }
        }
    }

    fn retain(&mut self, keep: &mut impl FnMut(Item, bool) -> bool) {
        let (mut at, mut looked, mut pages, mut soft_pages) = (0, 0, 0, 0);
        self.entries.retain(|e| {
            let stays = keep(e.item, e.soft);
            if stays {
                looked += usize::from(at < self.looked);
                pages += u64::from(e.item.pages);
                soft_pages += if e.soft { u64::from(e.item.pages) } else { 0 };
            }
            at += 1;
            stays
        });
        (self.looked, self.pages, self.soft_pages) = (looked, pages, soft_pages);
        self.entries.shrink_to(self.entries.len() * 2);
    }
}

/// Names a unit that was offered for softening, until the queues change.
#[derive(Debug, Clone, Copy)]
pub struct Offered {
    place: Place,
    at: usize,
}

impl Policy {
    /// Empty queues. `cooling`: there is a cooling area, in which units can be seen before they go.
    pub fn new(cooling: bool) -> Self {
        Policy {
            fresh: Queue::default(),
            main: Queue::default(),
            cooling,
        }
    }

    /// A unit was filled; `proved` if it was rescued, or seen before. With `credit` it stays so often when its turn to go comes.
    pub fn arrive(&mut self, item: Item, proved: bool, credit: u8) {
        match proved {
            true => self.main.push(item, credit),
            false => self.fresh.push(item, 0),
        }
    }

    /// The next unit to take out of its map. If that cannot be done (it is pinned, or was seen), it goes back to
    /// [`arrive`](Self::arrive), as proved and without credit.
    pub fn next_victim(&mut self) -> Option<Victim> {
        // Each unit has had its credit by then.
        for _ in 0..=self.len() * Entry::CREDIT_MAX as usize {
            let place = self.place_of_next();
            let Queued { item, soft, credit } = self.queue(place).pop()?;
            match credit.checked_sub(1) {
                None => return Some(Victim { item, place, soft }),
                // (It is marked already, if it was.)
                Some(less) => self.main.push_back(Queued {
                    item,
                    soft,
                    credit: less,
                }),
            }
        }
        None
    }

    /// Which queue the next unit leaves.
    fn place_of_next(&self) -> Place {
        let share = if self.cooling {
            FRESH_SHARE
        } else {
            FRESH_SHARE_UNCOOLED
        };
        match self.fresh.pages > self.pages() / share || self.main.entries.is_empty() {
            true => Place::Fresh,
            false => Place::Main,
        }
    }

    /// The next unit to mark MADV_FREE: the oldest of the longer queue. It stays where it is; say
    /// [`softened`](Self::softened) if it was marked.
    pub fn next_to_soften(&mut self) -> Option<(Item, Offered)> {
        let mut order = [Place::Fresh, Place::Main];
        if self.main.firm_pages() > self.fresh.firm_pages() {
            order.reverse();
        }
        order.into_iter().find_map(|place| {
            let (at, item) = self.queue(place).next_to_soften()?;
            Some((item, Offered { place, at }))
        })
    }

    /// Units that were offered and not marked (they were pinned, or being filled) are offered again.
    pub fn offer_again(&mut self) {
        (self.fresh.looked, self.main.looked) = (0, 0);
    }

    /// An offered unit was marked MADV_FREE.
    pub fn softened(&mut self, offered: Offered) {
        let queue = self.queue(offered.place);
        if let Some(e) = queue.entries.get_mut(offered.at)
            && !std::mem::replace(&mut e.soft, true)
        {
            queue.soft_pages += u64::from(e.item.pages);
        }
    }

    fn queue(&mut self, place: Place) -> &mut Queue {
        match place {
            Place::Fresh => &mut self.fresh,
            Place::Main => &mut self.main,
        }
    }

    /// Units tracked.
    pub fn len(&self) -> usize {
        self.fresh.entries.len() + self.main.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pages tracked.
    pub fn pages(&self) -> u64 {
        self.fresh.pages + self.main.pages
    }

    /// Pages that are not marked MADV_FREE.
    pub fn firm_pages(&self) -> u64 {
        self.fresh.firm_pages() + self.main.firm_pages()
    }

    /// Memory that the queues take, in bytes.
    pub fn bytes(&self) -> u64 {
        [&self.fresh, &self.main]
            .iter()
            .map(|q| q.entries.capacity() * size_of::<Queued>())
            .sum::<usize>() as u64
    }

    /// Forgets the units for which `keep` is false, which is told whether the unit was marked MADV_FREE.
    pub fn retain(&mut self, mut keep: impl FnMut(Item, bool) -> bool) {
        self.fresh.retain(&mut keep);
        self.main.retain(&mut keep);
    }
}

/// Whether it pays to keep the fresh for a while: where nothing is ever rescued, since all units are touched alike or
/// once only, most copies can be saved. A few are made all the same, so that a change is noticed.
#[derive(Debug, Default)]
pub struct Worth {
    sparse: bool,
    turn: u32,
    /// Slots that came round since the last verdict, and of these, units that had been rescued.
    rounds: u32,
    rescued: u32,
}

/// Slots that come round between two verdicts.
const WORTH_ROUNDS: u32 = 2048;
/// With less than one rescue in so many, few are kept; with more than one in so many of those, all are again.
const WORTH_LEAVE: u32 = 100;
const WORTH_RETURN: u32 = 20;
/// Of so many, one is kept then.
const WORTH_SPARSE: u32 = 8;

impl Worth {
    /// Whether the next fresh unit that goes is to be kept in a slot.
    pub fn keeps(&mut self) -> bool {
        self.turn = (self.turn + 1) % WORTH_SPARSE;
        !self.sparse || self.turn == 0
    }

    /// A slot of the log of the fresh came round; what lay there had been rescued, or not.
    pub fn came_round(&mut self, rescued: bool) {
        self.rounds += 1;
        self.rescued += u32::from(rescued);
        if self.rounds == WORTH_ROUNDS {
            let share = if self.sparse {
                WORTH_RETURN
            } else {
                WORTH_LEAVE
            };
            self.sparse = self.rescued < WORTH_ROUNDS / share;
            (self.rounds, self.rescued) = (0, 0);
        }
    }
}

/// What lies in a slot: a unit's entry, and a number by which its owner tells whether it still is that unit. An entry of
/// zero is nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Occupant {
    /// Which unit of which map.
    pub entry: Entry,
    /// The map's serial number.
    pub serial: Serial,
}

/// The order in which the slots of the cooling area are used: two logs, each a ring.
#[derive(Debug, Default)]
pub struct Logs {
    slots: Vec<Occupant>,
    fresh_len: usize,
    fresh_at: usize,
    main_at: usize,
    /// Slots used at least once, in each log: the first lap is what costs memory.
    fresh_used: usize,
    main_used: usize,
}

impl Logs {
    /// Slots of the logs for a budget of `pages` 4 KiB pages: of the fresh, and of main.
    pub fn slots_for(pages: u64) -> (usize, usize) {
        let share = |thousandths| (pages * thousandths / 1000) as usize;
        (share(FRESH_LOG), share(MAIN_LOG))
    }

    /// Logs for a budget of `pages` 4 KiB pages.
    pub fn new(pages: u64) -> Self {
        let (fresh_len, main_len) = Self::slots_for(pages);
        Logs {
            slots: vec![Occupant::default(); fresh_len + main_len],
            fresh_len,
            ..Logs::default()
        }
    }

    /// Slots in all.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Slots that were ever used.
    pub fn used(&self) -> usize {
        self.fresh_used + self.main_used
    }

    /// The slot whose turn it is for a unit from `place`, and what lies in it. The turn passes to the next.
    pub fn turn(&mut self, place: Place) -> Option<(Slot, Occupant)> {
        let (start, len, at, used) = match place {
            Place::Fresh => (0, self.fresh_len, &mut self.fresh_at, &mut self.fresh_used),
            Place::Main => (
                self.fresh_len,
                self.slots.len() - self.fresh_len,
                &mut self.main_at,
                &mut self.main_used,
            ),
        };
        if len == 0 {
            return None;
        }
        let slot = start + *at;
        *used = (*used).max(*at + 1);
        *at = (*at + 1) % len;
        Some((Slot::new(slot as u32), self.slots[slot]))
    }

    /// Which log a slot belongs to: where its occupant came from.
    pub fn place(&self, slot: Slot) -> Place {
        if (slot.get() as usize) < self.fresh_len {
            Place::Fresh
        } else {
            Place::Main
        }
    }

    /// The slots of main: their first, their number, and which of them is due next.
    pub fn main_slots(&self) -> [u32; 3] {
        let len = self.slots.len() - self.fresh_len;
        [self.fresh_len, len, self.main_at].map(|n| n as u32)
    }

    /// The credit of a unit that is rescued from a slot now.
    pub fn credit(&self, slot: Slot) -> u8 {
        let [first, len, next] = self.main_slots();
        credit(slot, first, len, next)
    }

    /// What lies in a slot.
    pub fn at(&self, slot: Slot) -> Occupant {
        self.slots[slot.get() as usize]
    }

    /// Notes what lies in a slot now.
    pub fn put(&mut self, slot: Slot, occupant: Occupant) {
        self.slots[slot.get() as usize] = occupant;
    }

    /// All slots, and what lies in them.
    pub fn slots(&self) -> impl Iterator<Item = (Slot, Occupant)> + '_ {
        self.slots
            .iter()
            .enumerate()
            .map(|(i, &o)| (Slot::new(i as u32), o))
    }

    /// Memory of the log itself, in bytes.
    pub fn bytes(&self) -> u64 {
        (self.slots.capacity() * size_of::<Occupant>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(entry: u64) -> Item {
        Item {
            entry: Entry::new(entry),
            pages: 1,
        }
    }

    fn order(p: &mut Policy) -> Vec<u64> {
        std::iter::from_fn(|| p.next_victim())
            .map(|v| v.item.entry.get())
            .collect()
    }

    #[test]
    fn what_has_not_proved_itself_goes_first_and_oldest_first() {
        let mut p = Policy::new(true);
        (1..=6).for_each(|i| p.arrive(item(i), i % 3 == 0, 0));
        assert_eq!(order(&mut p), [1, 2, 4, 5, 3, 6]);
        assert_eq!((p.pages(), p.firm_pages()), (0, 0));
    }

    #[test]
    fn credit_lets_a_unit_stay_so_often() {
        let mut p = Policy::new(true);
        for (i, credit) in [(1, 2), (2, 0), (3, 1), (4, 0)] {
            p.arrive(item(i), true, credit);
        }
        let (first, offered) = p.next_to_soften().expect("one");
        assert_eq!(first, item(1));
        p.softened(offered);
        assert_eq!((p.len(), p.pages(), p.firm_pages()), (4, 4, 3));
        let all: Vec<_> = std::iter::from_fn(|| p.next_victim()).collect();
        let order: Vec<_> = all.iter().map(|v| (v.item.entry.get(), v.soft)).collect();
        assert_eq!(order, [(2, false), (4, false), (3, false), (1, true)]);
        assert_eq!((p.pages(), p.firm_pages()), (0, 0));
    }

    #[test]
    fn without_a_cooling_area_the_fresh_keep_a_tenth() {
        let mut p = Policy::new(false);
        (1..=100).for_each(|i| p.arrive(item(i), i > 5, 0));
        let first = p.next_victim().expect("one");
        assert_eq!((first.item.entry.get(), first.place), (6, Place::Main));
        (101..=110).for_each(|i| p.arrive(item(i), false, 0));
        assert_eq!(p.next_victim().expect("one").item, item(1));
    }

    #[test]
    fn the_oldest_are_softened_where_they_are() {
        let mut p = Policy::new(true);
        (1..=4).for_each(|i| p.arrive(item(i), false, 0));
        let (first, offered) = p.next_to_soften().expect("one");
        assert_eq!(first, item(1));
        p.softened(offered);
        let (second, _) = p.next_to_soften().expect("another");
        assert_eq!((second, p.firm_pages(), p.pages()), (item(2), 3, 4));
        p.retain(|i, _| i != item(2));
        assert_eq!(p.next_to_soften().expect("the next").0, item(3));
        let v = p.next_victim().expect("one");
        assert_eq!((v.item, v.soft), (item(1), true));
        assert!(!p.next_victim().expect("one").soft);
        assert_eq!((p.firm_pages(), p.pages()), (1, 1));
    }

    #[test]
    fn what_could_not_be_softened_is_offered_again() {
        let mut p = Policy::new(true);
        (1..=3).for_each(|i| p.arrive(item(i), false, 0));
        let (_, pinned) = p.next_to_soften().expect("one");
        let (_, second) = p.next_to_soften().expect("another");
        p.softened(second);
        p.next_to_soften().expect("the last");
        assert!(p.next_to_soften().is_none());
        p.offer_again();
        assert_eq!(p.next_to_soften().expect("the first").0, item(1));
        assert_eq!(p.next_to_soften().expect("the last").0, item(3));
        assert!(p.next_to_soften().is_none(), "the second is soft");
        p.softened(pinned);
        assert_eq!(p.firm_pages(), 1);
    }

    #[test]
    fn copies_are_saved_where_nothing_is_rescued_and_made_again_where_something_is() {
        let kept = |w: &mut Worth| (0..800).filter(|_| w.keeps()).count();
        let mut w = Worth::default();
        assert_eq!(kept(&mut w), 800);
        (0..WORTH_ROUNDS).for_each(|i| w.came_round(i % 200 == 0));
        assert_eq!(kept(&mut w), 100, "half a percent is not worth it");
        (0..WORTH_ROUNDS).for_each(|i| w.came_round(i % 50 == 0));
        assert_eq!(
            kept(&mut w),
            100,
            "with eight times the time to be rescued in"
        );
        (0..WORTH_ROUNDS).for_each(|i| w.came_round(i % 10 == 0));
        assert_eq!(kept(&mut w), 800);
    }

    #[test]
    fn slots_come_round_in_the_order_in_which_they_were_used() {
        let mut logs = Logs::new(1000);
        assert_eq!((logs.len(), logs.used()), (140, 0));
        let one = Occupant {
            entry: Entry::new(7),
            serial: Serial::new(1),
        };
        let (slot, was) = logs.turn(Place::Fresh).expect("slots");
        assert_eq!(
            (slot, was, logs.place(slot)),
            (Slot::new(0), Occupant::default(), Place::Fresh)
        );
        logs.put(slot, one);
        for _ in 0..19 {
            logs.turn(Place::Fresh);
        }
        assert_eq!(logs.turn(Place::Fresh), Some((Slot::new(0), one)));
        let (slot, _) = logs.turn(Place::Main).expect("slots");
        assert_eq!(slot, Slot::new(20));
        assert_eq!((logs.place(slot), logs.used()), (Place::Main, 21));
        assert_eq!(Logs::new(8).turn(Place::Main), None, "too small for any");
    }
}
