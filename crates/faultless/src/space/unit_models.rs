//! Models of one unit: a few threads that run the table's and the word's own code, around a kernel that is reduced to what it does to
//! one page. (What lies above that, `fault/` with all that it calls, runs in the simulator, which may switch threads at each of its
//! atomic operations.)

use crate::base::ids::{Slot, Unit};
use crate::space::page::{From, Left, Page, State};
use crate::space::table::Table;
use loom::sync::atomic::{AtomicUsize, Ordering as O};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// The unit.
const UNIT: Unit = Unit::new(0);

/// States of the page-table entry.
const NONE: usize = 0;
const THERE: usize = 1;
const LAZY: usize = 2;

struct World {
    table: Table,
    /// The page-table entry. The kernel changes it under a lock, one change at a time.
    kernel: Mutex<usize>,
    fillers: AtomicUsize,
    frames: AtomicUsize,
    /// What lies in the one slot of the cooling area: 0 nothing, 1 the page's bytes, 2 another page's.
    slot: AtomicUsize,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(World {
            table: Table::new(1).expect("memory"),
            kernel: Mutex::new(NONE),
            fillers: AtomicUsize::new(0),
            frames: AtomicUsize::new(0),
            slot: AtomicUsize::new(0),
        })
    }

    fn page(&self) -> &Page {
        self.table.page(UNIT)
    }

    fn look(&self) -> usize {
        *self.kernel.lock().unwrap()
    }

    fn discard(&self) {
        *self.kernel.lock().unwrap() = NONE;
    }

    /// Changes the entry if it is `from`.
    fn entry(&self, from: usize, to: usize) {
        let mut entry = self.kernel.lock().unwrap();
        if *entry == from {
            *entry = to;
        }
    }

    /// UFFDIO_COPY: installs if nothing is there (EEXIST otherwise, which is as good).
    fn copy(&self) {
        self.entry(NONE, THERE);
    }

    fn fill(&self, me: u32, from: From, pin: bool, fails: bool) -> bool {
        assert_eq!(
            self.fillers.fetch_add(1, O::AcqRel),
            0,
            "two fillers at once"
        );
        if from != From::Resident {
            self.frames.fetch_add(1, O::AcqRel);
        }
        if pin && from == From::Resident {
            self.discard(); // renewal discards first
        }
        if let From::Cool(_) = from {
            // The bytes are read from the slot, which is given up afterwards.
            assert_eq!(self.slot.swap(0, O::AcqRel), 1, "the slot was taken away");
        }
        if !fails {
            self.copy();
        }
        if fails {
            self.discard(); // a failed refill discards what may still be there
            self.frames.fetch_sub(1, O::AcqRel);
            self.fillers.fetch_sub(1, O::AcqRel);
            let _ = self.table.give_up(UNIT, me, 0).expect("still ours");
            return false;
        }
        self.fillers.fetch_sub(1, O::AcqRel);
        self.page()
            .finish(me, 1, pin, false, false)
            .expect("still ours");
        true
    }

    /// A load, up to `tries` looks: spinning for ever would be outside what loom can explore.
    fn load(&self, me: u32, tries: usize, fails: bool) -> bool {
        for _ in 0..tries {
            if self.look() != NONE {
                return true;
            }
            let w = self.page().load();
            match w.state() {
                State::Filling => thread::yield_now(),
                _ => {
                    if let Ok(from) = self.table.claim(UNIT, w, me, || ()) {
                        if !self.fill(me, from, false, fails) {
                            return false;
                        }
                    }
                }
            }
        }
        false
    }

    fn pin(&self, me: u32, tries: usize) -> bool {
        for _ in 0..tries {
            let w = self.page().load();
            if self.page().pin(w).is_ok() {
                return true;
            }
            if w.batch() || w.state() == State::Filling || w.state() == State::Evicting {
                thread::yield_now();
                continue;
            }
            if let Ok(from) = self.table.claim(UNIT, w, me, || ()) {
                return self.fill(me, from, true, false);
            }
        }
        false
    }

    /// Tries to pin, with so many looks. A pinned page is present, and the kernel may not take it.
    fn pin_for_a_while(&self, me: u32, tries: usize) {
        if self.pin(me, tries) {
            assert_eq!(self.look(), THERE);
            self.page().unpin();
        }
    }

    fn evict(&self) {
        if self.page().begin_evict().is_some() {
            self.discard();
            let _ = self.table.settle(UNIT, Left::Shadow(1));
            self.frames.fetch_sub(1, O::AcqRel);
        }
    }

    /// An eviction that finds, after it began, that nothing may go.
    fn evict_in_vain(&self) {
        if let Some(was_soft) = self.page().begin_evict()
            && self.page().cancel_evict(was_soft).claimed
        {
            self.frames.fetch_sub(1, O::AcqRel);
        }
    }

    fn soften_in_vain(&self) {
        if self.page().begin_soften() {
            self.page().cancel_soften();
        }
    }

    /// Evicts into the slot, if it is free.
    fn cool(&self) {
        if self.page().begin_evict().is_some() {
            let free = self.slot.load(O::Acquire) == 0;
            self.discard();
            if free {
                self.slot.store(1, O::Release);
            }
            let left = if free {
                Left::Slot(Slot::new(0))
            } else {
                Left::Shadow(1)
            };
            if !self.table.settle(UNIT, left).absent && free {
                self.slot.store(0, O::Release);
            }
            self.frames.fetch_sub(1, O::AcqRel);
        }
    }

    /// Takes the slot for another page.
    fn overwrite(&self) {
        let seen = self.page().load();
        if seen.cool() && self.table.claim(UNIT, seen, 8, || ()).is_ok() {
            assert_eq!(self.slot.swap(2, O::AcqRel), 1, "somebody else's slot");
            self.slot.store(0, O::Release);
            let _ = self.table.give_up(UNIT, 8, 1).expect("still ours");
        }
    }

    fn soften(&self) {
        if self.page().begin_soften() {
            self.entry(THERE, LAZY);
            self.page().settle(Left::Shadow(1));
        }
    }

    /// The kernel takes a MADV_FREE'd page back.
    fn reclaim(&self) {
        self.entry(LAZY, NONE);
    }

    fn check_at_rest(&self) {
        let w = self.page().load();
        assert!(!w.batch());
        let counts = w.state() == State::Resident || w.cool();
        assert_eq!(self.table.live(UNIT), u32::from(counts));
        let frames = self.frames.load(O::Acquire);
        match w.state() {
            State::Absent => assert_eq!((frames, self.look()), (0, NONE)),
            State::Resident => assert_eq!(frames, 1),
            other => panic!("at rest in {other:?}"),
        }
    }
}

fn resident() -> Arc<World> {
    let w = World::new();
    assert!(w.load(9, 3, false));
    w
}

fn run(start: fn() -> Arc<World>, parts: Vec<fn(&World)>) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let world = start();
        let threads: Vec<_> = parts
            .iter()
            .map(|&part| {
                let world = world.clone();
                thread::spawn(move || part(&world))
            })
            .collect();
        for t in threads {
            t.join().unwrap();
        }
        world.check_at_rest();
    });
}

#[test]
fn two_loads_of_an_absent_page_and_an_eviction() {
    run(
        World::new,
        vec![
            |w| _ = w.load(1, 3, false),
            |w| _ = w.load(2, 3, false),
            |w| w.evict(),
        ],
    );
}

#[test]
fn a_load_under_an_eviction() {
    run(
        resident,
        vec![|w| _ = w.load(1, 3, false), |w| w.evict(), |w| {
            _ = w.load(2, 3, false)
        }],
    );
}

#[test]
fn a_failing_fill_beside_a_good_one() {
    run(
        World::new,
        vec![|w| _ = w.load(1, 2, true), |w| _ = w.load(2, 3, false)],
    );
}

#[test]
fn a_pin_against_an_eviction() {
    run(
        resident,
        vec![|w| w.pin_for_a_while(1, 4), |w| w.evict(), |w| {
            _ = w.load(2, 2, false)
        }],
    );
}

#[test]
fn a_pin_against_softening_and_the_kernel_s_reclaim() {
    run(
        resident,
        vec![|w| w.pin_for_a_while(1, 4), |w| w.soften(), |w| {
            w.reclaim();
            _ = w.load(2, 2, false);
        }],
    );
}

#[test]
fn two_pins_of_a_soft_page() {
    run(
        soft,
        vec![
            |w| w.pin_for_a_while(1, 4),
            |w| w.pin_for_a_while(2, 4),
            |w| w.reclaim(),
        ],
    );
}

fn soft() -> Arc<World> {
    let w = resident();
    w.soften();
    w
}

/// The kernel takes the page back, a load claims it from a batch that has not struck yet, and then it is pinned.
#[test]
fn a_pin_after_a_load_that_came_before_the_batch() {
    run(
        soft,
        vec![|w| w.evict(), |w| {
            w.reclaim();
            _ = w.load(1, 2, false);
            w.pin_for_a_while(1, 4);
        }],
    );
}

/// The same, with a fill that fails in between.
#[test]
fn a_pin_after_a_failed_load_that_came_before_the_batch() {
    run(
        soft,
        vec![|w| w.evict(), |w| {
            w.reclaim();
            _ = w.load(1, 1, true);
            _ = w.load(1, 2, false);
            w.pin_for_a_while(1, 4);
        }],
    );
}

/// What is taken back leaves no frame charged twice, no flag behind, and no pin of what may go.
#[test]
fn evictions_and_softenings_that_are_taken_back() {
    run(
        resident,
        vec![
            |w| w.evict_in_vain(),
            |w| {
                w.soften_in_vain();
                assert!(w.look() != LAZY);
            },
            |w| {
                _ = w.load(1, 2, false);
                w.pin_for_a_while(1, 4);
            },
        ],
    );
    run(
        soft,
        vec![|w| w.evict_in_vain(), |w| {
            w.reclaim();
            _ = w.load(1, 2, false);
            w.pin_for_a_while(1, 4);
        }],
    );
}

#[test]
fn a_cool_unit_is_rescued_by_a_load_or_a_pin_or_gives_its_slot_up() {
    run(
        || {
            let w = resident();
            w.cool();
            w
        },
        vec![
            |w| {
                w.overwrite();
                w.cool();
            },
            |w| _ = w.load(1, 2, false),
            |w| w.pin_for_a_while(2, 3),
        ],
    );
    run(
        resident,
        vec![
            |w| {
                w.cool();
                w.overwrite();
            },
            |w| _ = w.load(1, 2, true),
            |w| w.evict(),
        ],
    );
}

#[test]
fn release_and_eviction_do_not_both_take_the_frame() {
    run(
        resident,
        vec![|w| w.evict(), |w| w.evict(), |w| _ = w.load(1, 2, false)],
    );
}
