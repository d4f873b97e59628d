//! The life of one fill unit (a page, by default), in one atomic word. The state machine is written here and nowhere else.
//!
//! ```text
//!                 claim (miss)                 finish
//!     ┌────────┐ ───────────────► ┌─────────┐ ─────────────► ┌──────────┐
//!     │ ABSENT │                  │ FILLING │                │ RESIDENT │◄─┐ begin_soften / settle
//!     └────────┘ ◄─────────────── └─────────┘ ◄───────────── └──────────┘──┘ (MADV_FREE in flight)
//!         ▲        abandon           ▲    ▲  claim: the kernel    │
//!         │                          │    │  took the page back,  │ begin_evict: only if unpinned
//!         │                          │    │  or a pin renews it   ▼
//!         │          claim: a miss on │   └───────────────── ┌──────────┐
//!         └───────────────────────────┴───────────────────── │ EVICTING │
//!                    settle (the batch is through)            └──────────┘
//! ```
//!
//! Beside the state, the word carries six flags, the number of pins, and one number: the owner's number while
//! FILLING, the slot while COOL, otherwise the pool's eviction clock when the unit last came or went (an absent unit's
//! shadow, from which a refault's distance is known).
//!
//! * COOL — of an ABSENT unit: its bytes are in a slot of the pool's cooling area, whose number the word carries. A miss
//!   claims the unit and takes them from there (it is *rescued*); until then the evictor may take the slot away. Whoever
//!   clears COOL, which a claim does, owns the slot: so a slot is never read and written concurrently.
//! * WAITERS — somebody sleeps on the low half of the word; whoever changes the state wakes them.
//! * BATCH — a batched `process_madvise` that covers the unit may be in flight. The batch's author alone sets and
//!   clears it. A *load* that misses meanwhile is served at once, but nobody may pin the unit until it is clear, because
//!   the batch may still strike what has just been filled.
//! * SOFT — the bytes may vanish without our doing: the unit was marked MADV_FREE, or was filled under a batch that may
//!   have struck afterwards. Such a unit is RESIDENT as a hint only: a load that finds it gone fills it again, and a
//!   pin *renews* it first (claims, discards, fills).
//! * TRACKED — the evictor has, or is about to get, an entry for the unit. A soft unit that is filled afresh gets a
//!   second one; the first, among the soft ones, is then stale.
//! * SEEN — an access was observed (a pin, or a refault soon after eviction) since the evictor last looked.
//!
//! Invariants, checked by the loom models in `unit_models.rs`:
//!
//! 1. At most one thread owns a unit in FILLING; only the owner leaves that state.
//! 2. A pinned unit is never EVICTING, BATCH or SOFT: nothing of ours discards it, and the kernel may not.
//! 3. EVICTING is left exactly once for each entry: by `settle`, or by a claim, after which `settle` only clears BATCH.
//! 4. Each slot is given up exactly once for each time that it was filled: by the thread that cleared COOL.
//! 5. Every state change that a waiter may be waiting for clears WAITERS and reports that a wake is due.

use crate::base::ids::Slot;
use crate::base::primitive::{AtomicU64, Ordering};

const STATE: u64 = 0b11;
const ABSENT: u64 = 0;
const FILLING: u64 = 1;
const RESIDENT: u64 = 2;
const EVICTING: u64 = 3;

const WAITERS: u64 = 1 << 2;
const BATCH: u64 = 1 << 3;
const SOFT: u64 = 1 << 4;
const TRACKED: u64 = 1 << 5;
const SEEN: u64 = 1 << 6;
const COOL: u64 = 1 << 7;

const PIN_SHIFT: u32 = 8;
const PIN_ONE: u64 = 1 << PIN_SHIFT;
/// Most pins that one unit can carry at once.
pub(crate) const PINS_MAX: u64 = (1 << 24) - 1;
const PINS: u64 = PINS_MAX << PIN_SHIFT;

const NUMBER_SHIFT: u32 = 32;

/// The states of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Absent,
    Filling,
    Resident,
    Evicting,
}

/// A copy of a unit's word: what it was when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(u64);

impl Word {
    #[inline]
    pub(crate) fn state(self) -> State {
        match self.0 & STATE {
            ABSENT => State::Absent,
            FILLING => State::Filling,
            RESIDENT => State::Resident,
            _ => State::Evicting,
        }
    }
    pub(crate) fn soft(self) -> bool {
        self.0 & SOFT != 0
    }
    pub(crate) fn batch(self) -> bool {
        self.0 & BATCH != 0
    }
    pub(crate) fn tracked(self) -> bool {
        self.0 & TRACKED != 0
    }
    /// Absent, with its bytes in a slot: [`number`](Self::number).
    pub(crate) fn cool(self) -> bool {
        self.0 & COOL != 0
    }
    pub(crate) fn seen(self) -> bool {
        self.0 & SEEN != 0
    }
    pub(crate) fn pins(self) -> u64 {
        (self.0 & PINS) >> PIN_SHIFT
    }
    /// The owner's thread id (FILLING), the slot (COOL), or the eviction clock.
    pub(crate) fn number(self) -> u32 {
        (self.0 >> NUMBER_SHIFT) as u32
    }
    /// The slot of a cool unit.
    pub(crate) fn slot(self) -> Slot {
        Slot::new(self.number())
    }
    pub(crate) fn bits(self) -> u64 {
        self.0
    }
}

/// What a claim was made from. It decides what is charged to the budget and what is restored if the fill fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// A miss. The number is the eviction clock when the unit was evicted, 0 if it never was.
    Absent(u32),
    /// A miss of a unit whose bytes are in this slot of the cooling area. The slot is the claimer's now.
    Cool(Slot),
    /// The unit counted as resident, and its memory is still charged: the kernel took the page back, or a pin renews it.
    Resident,
    /// An eviction was under way, and will release the old memory: the new is charged anew.
    Evicting,
}

/// What is due after a state change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Due {
    /// Somebody waits on the word.
    pub(crate) wake: bool,
    /// The evictor has no entry for the unit: push one. (TRACKED is set by the change that reports this.)
    pub(crate) track: bool,
}

/// What an evicted unit leaves in its word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// The eviction clock, 0 for nothing.
    Shadow(u32),
    /// The slot that holds its bytes.
    Slot(Slot),
}

/// What became of an eviction that was taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cancelled {
    /// A miss had claimed the unit: its old memory must be released.
    pub(crate) claimed: bool,
    /// Somebody waits on the word.
    pub(crate) wake: bool,
}

#[allow(unsafe_code, reason = "promises that zero is a valid word")]
// SAFETY: a transparent atomic word, and zero is ABSENT.
unsafe impl crate::base::array::Word for Page {
    #[cfg(loom)]
    fn zero() -> Self {
        Page::new()
    }
    #[cfg(loom)]
    fn clear(&self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

/// One unit's word.
#[repr(transparent)]
#[derive(Debug)]
pub(crate) struct Page(AtomicU64);

impl Page {
    #[cfg(any(test, loom))]
    pub(crate) fn new() -> Self {
        Page(AtomicU64::new(0))
    }

    #[inline]
    pub(crate) fn load(&self) -> Word {
        Word(self.0.load(Ordering::Acquire))
    }

    /// Address of the half that a futex watches (the low one, on the little-endian machines supported).
    #[cfg(not(loom))]
    pub(crate) fn futex(&self) -> *const u32 {
        const _: () = assert!(cfg!(target_endian = "little"));
        self.0.as_ptr().cast()
    }

    fn swap(&self, from: Word, to: u64) -> Result<Word, Word> {
        match self
            .0
            .compare_exchange(from.0, to, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => Ok(Word(to)),
            Err(now) => Err(Word(now)),
        }
    }

    /// Becomes the owner of the unit, from any state but FILLING. `seen` as was `word`, or the word as it is now.
    pub(crate) fn claim(&self, seen: Word, owner: u32) -> Result<From, Word> {
        let from = match seen.state() {
            State::Absent if seen.cool() => From::Cool(seen.slot()),
            State::Absent => From::Absent(seen.number()),
            State::Resident => From::Resident,
            State::Evicting => From::Evicting,
            State::Filling => return Err(seen),
        };
        // A batch in flight may strike after the fill: the unit stays soft. Otherwise it starts afresh, and if it was
        // soft, as a new one for the evictor, who has it among those that are.
        let drop = if seen.soft() && !seen.batch() {
            SOFT | TRACKED
        } else {
            0
        };
        let keep = (WAITERS | BATCH | SOFT | TRACKED | SEEN | PINS) & !drop;
        let to = (seen.0 & keep) | FILLING | (u64::from(owner) << NUMBER_SHIFT);
        self.swap(seen, to).map(|_| from)
    }

    fn change(&self, mut f: impl FnMut(Word) -> Option<u64>) -> Option<(Word, Word)> {
        let mut now = self.load();
        loop {
            let to = f(now)?;
            match self.swap(now, to) {
                Ok(to) => return Some((now, to)),
                Err(other) => now = other,
            }
        }
    }

    fn owned_by(word: Word, owner: u32) -> bool {
        word.state() == State::Filling && word.number() == owner
    }

    /// The owner's fill succeeded. `None`: the claim was no longer the owner's (it was taken for dead).
    ///
    /// With `pin`, the unit is pinned in the same step; the caller has made sure that no batch was in flight when it
    /// claimed, and none can begin before the state is RESIDENT.
    ///
    /// With `soft`, some of the unit's pages were there before and may be marked MADV_FREE. A pinned unit never is, so
    /// it never becomes soft.
    pub(crate) fn finish(
        &self,
        owner: u32,
        clock: u32,
        pin: bool,
        seen: bool,
        soft: bool,
    ) -> Option<Due> {
        let (was, _) = self.change(|w| {
            Self::owned_by(w, owner).then(|| {
                let mut to = (w.0 & (BATCH | SOFT | SEEN | PINS)) | RESIDENT | TRACKED;
                to |= u64::from(clock) << NUMBER_SHIFT;
                if pin {
                    debug_assert!(!w.batch() && !w.soft() && w.pins() < PINS_MAX);
                    to = (to + PIN_ONE) | SEEN;
                }
                if seen {
                    to |= SEEN;
                }
                if soft && w.pins() == 0 && !pin {
                    to |= SOFT;
                }
                to
            })
        })?;
        Some(Due {
            wake: was.0 & WAITERS != 0,
            track: !was.tracked(),
        })
    }

    /// The owner has read the unit, but put its bytes into `slot` instead: it is absent, and cool. `None` if the claim
    /// was no longer the owner's, or a batch is in flight (which may not be forgotten).
    pub(crate) fn finish_cool(&self, owner: u32, slot: Slot) -> Option<Due> {
        let (was, _) = self.change(|w| {
            (Self::owned_by(w, owner) && !w.batch())
                .then_some((w.0 & PINS) | ABSENT | COOL | (u64::from(slot.get()) << NUMBER_SHIFT))
        })?;
        Some(Due {
            wake: was.0 & WAITERS != 0,
            track: false,
        })
    }

    /// The owner's fill failed: the unit is absent again. `None` as for [`finish`](Self::finish).
    ///
    /// The evictor's entry, if there is one, becomes stale. While a batch is in flight, SOFT stays: whoever fills the
    /// unit next may still be struck by it.
    pub(crate) fn abandon(&self, owner: u32, clock: u32) -> Option<Due> {
        let (was, _) = self.change(|w| {
            let keep = if w.batch() { BATCH | SOFT | PINS } else { PINS };
            Self::owned_by(w, owner)
                .then(|| (w.0 & keep) | ABSENT | (u64::from(clock) << NUMBER_SHIFT))
        })?;
        Some(Due {
            wake: was.0 & WAITERS != 0,
            track: false,
        })
    }

    /// Takes an eviction back whose batch has not been sent: the unit is resident again, as soft as it was. If a miss
    /// has claimed it meanwhile, the eviction counts as done, though nothing was discarded: the old memory is released,
    /// since the claim has charged the new.
    pub(crate) fn cancel_evict(&self, was_soft: bool) -> Cancelled {
        let mut claimed = false;
        let change = self.change(|w| {
            claimed = w.state() != State::Evicting;
            Some(if claimed {
                w.0 & !(BATCH | WAITERS)
            } else {
                let soft = if was_soft { SOFT } else { 0 };
                (w.0 & !(STATE | BATCH | WAITERS | SOFT)) | RESIDENT | TRACKED | soft
            })
        });
        Cancelled {
            claimed,
            wake: change.is_some_and(|(was, _)| was.0 & WAITERS != 0),
        }
    }

    /// Takes a softening back whose batch has not been sent. Returns whether a wake is due.
    pub(crate) fn cancel_soften(&self) -> bool {
        let change = self.change(|w| {
            // Claimed meanwhile or not: nothing was marked.
            Some(w.0 & !(BATCH | SOFT | WAITERS))
        });
        change.is_some_and(|(was, _)| was.0 & WAITERS != 0)
    }

    /// Notes that somebody is about to wait for `seen` to change. The word to wait on, or the word as it is now.
    pub(crate) fn announce_waiter(&self, seen: Word) -> Result<Word, Word> {
        if seen.0 & WAITERS != 0 {
            return Ok(seen);
        }
        self.swap(seen, seen.0 | WAITERS)
    }

    /// Pins a unit that is resident for sure. Fails with the word as it is now where that is in doubt.
    pub(crate) fn pin(&self, seen: Word) -> Result<(), Word> {
        if seen.state() != State::Resident
            || seen.0 & (BATCH | SOFT) != 0
            || seen.pins() == PINS_MAX
        {
            return Err(seen);
        }
        self.swap(seen, (seen.0 + PIN_ONE) | SEEN).map(drop)
    }

    /// Takes one pin away.
    pub(crate) fn unpin(&self) {
        let was = Word(self.0.fetch_sub(PIN_ONE, Ordering::AcqRel));
        debug_assert!(was.pins() > 0, "unpinned more often than pinned");
    }

    /// Starts to evict, if the unit is resident, unpinned and in no batch. Whoever starts must [`settle`](Self::settle),
    /// or [`cancel`](Self::cancel_evict). Returns whether the unit was soft.
    pub(crate) fn begin_evict(&self) -> Option<bool> {
        self.change(|w| {
            (w.state() == State::Resident && w.pins() == 0 && !w.batch())
                .then_some((w.0 & !(STATE | TRACKED | SEEN)) | EVICTING | BATCH | SOFT)
        })
        .map(|(was, _)| was.soft())
    }

    /// Starts to mark the unit MADV_FREE, if it is resident, unpinned, in no batch and not marked yet. Whoever starts
    /// must [`settle`](Self::settle).
    pub(crate) fn begin_soften(&self) -> bool {
        self.change(|w| {
            (w.state() == State::Resident && w.pins() == 0 && w.0 & (BATCH | SOFT) == 0)
                .then_some(w.0 | BATCH | SOFT)
        })
        .is_some()
    }

    /// The batch is through. `left` is what an evicted unit leaves. Returns whether the unit became absent by it, and
    /// whether a wake is due.
    pub(crate) fn settle(&self, left: Left) -> (bool, Due) {
        let mut evicted = false;
        let change = self.change(|w| {
            debug_assert!(w.batch(), "settled twice");
            evicted = w.state() == State::Evicting;
            Some(if evicted {
                let (flag, number) = match left {
                    Left::Shadow(clock) => (0, clock),
                    Left::Slot(slot) => (COOL, slot.get()),
                };
                (w.0 & TRACKED) | ABSENT | flag | (u64::from(number) << NUMBER_SHIFT)
            } else {
                // Those who wait for the batch are woken; those who wait for a fill are woken in vain and wait again.
                w.0 & !(BATCH | WAITERS)
            })
        });
        let wake = change.is_some_and(|(was, _)| was.0 & WAITERS != 0);
        (evicted, Due { wake, track: false })
    }

    /// The evictor took its entry off the queue and will not put it back. Only an absent unit may lose it: one that is
    /// being filled counts on it.
    pub(crate) fn untrack_absent(&self) -> bool {
        self.change(|w| (w.state() == State::Absent).then_some(w.0 & !TRACKED))
            .is_some()
    }

    /// Reads and clears SEEN.
    pub(crate) fn take_seen(&self) -> bool {
        Word(self.0.fetch_and(!SEEN, Ordering::AcqRel)).seen()
    }
}

/// The bits that a waiter's futex compares: all of the low half.
pub(crate) const fn futex_bits(word: Word) -> u32 {
    word.0 as u32
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_miss_is_filled_by_one_owner() {
        let page = Page::new();
        let w = page.load();
        assert_eq!(page.claim(w, 7), Ok(From::Absent(0)));
        assert!(
            page.claim(w, 8).is_err(),
            "a second claim from the same word"
        );
        assert!(page.claim(page.load(), 8).is_err(), "a claim while filling");
        assert_eq!(
            page.finish(8, 1, false, false, false),
            None,
            "only the owner finishes"
        );
        assert_eq!(
            page.finish(7, 1, false, false, false),
            Some(Due {
                wake: false,
                track: true
            })
        );
        assert_eq!(page.load().state(), State::Resident);
    }

    #[test]
    fn a_refill_pushes_no_second_entry() {
        let page = Page::new();
        page.claim(page.load(), 7).expect("absent");
        page.finish(7, 1, false, false, false).expect("owned");
        page.claim(page.load(), 7).expect("the kernel took it back");
        assert_eq!(
            page.finish(7, 2, false, false, false),
            Some(Due {
                wake: false,
                track: false
            })
        );
    }

    #[test]
    fn a_pinned_unit_is_neither_evicted_nor_softened() {
        let page = Page::new();
        page.claim(page.load(), 7).expect("absent");
        page.finish(7, 1, true, false, false).expect("owned");
        assert_eq!(page.begin_evict(), None);
        assert!(!page.begin_soften());
        page.unpin();
        assert!(page.begin_soften());
        assert!(page.pin(page.load()).is_err(), "a batch is in flight");
        page.settle(Left::Shadow(0));
        assert!(page.pin(page.load()).is_err(), "soft: renew first");
        assert_eq!(page.begin_evict(), Some(true));
        assert!(page.settle(Left::Shadow(9)).0);
        assert_eq!(page.load().number(), 9, "the shadow");
    }

    #[test]
    fn a_unit_filled_under_an_eviction_stays_soft() {
        let page = Page::new();
        page.claim(page.load(), 7).expect("absent");
        page.finish(7, 1, false, false, false).expect("owned");
        assert_eq!(page.begin_evict(), Some(false));
        assert_eq!(page.claim(page.load(), 8), Ok(From::Evicting));
        assert_eq!(
            page.finish(8, 1, false, false, false),
            Some(Due {
                wake: false,
                track: true
            })
        );
        assert!(!page.settle(Left::Shadow(2)).0, "the claim won");
        let w = page.load();
        assert_eq!(
            (w.state(), w.soft(), w.batch()),
            (State::Resident, true, false)
        );
    }

    #[test]
    fn a_pinned_unit_never_becomes_soft() {
        let page = Page::new();
        page.claim(page.load(), 7).expect("absent");
        page.finish(7, 1, true, false, false).expect("owned");
        // A load that took it for gone, and found all of it there.
        assert_eq!(page.claim(page.load(), 8), Ok(From::Resident));
        page.finish(8, 1, false, false, true).expect("owned");
        assert!(!page.load().soft());
    }

    #[test]
    fn what_is_taken_back_is_as_it_was() {
        let page = Page::new();
        page.claim(page.load(), 7).expect("absent");
        page.finish(7, 1, false, false, false).expect("owned");
        let before = page.load();
        let was_soft = page.begin_evict().expect("resident");
        let no = Cancelled {
            claimed: false,
            wake: false,
        };
        assert_eq!(page.cancel_evict(was_soft), no);
        assert_eq!(page.load(), before);
        assert!(page.begin_soften());
        assert!(!page.cancel_soften());
        assert_eq!(page.load(), before);
        let was_soft = page.begin_evict().expect("resident");
        page.claim(page.load(), 8).expect("evicting");
        assert!(page.cancel_evict(was_soft).claimed);
        assert!(page.finish(8, 1, false, false, false).expect("owned").track);
    }

    #[test]
    fn a_cool_unit_is_rescued_or_dropped_and_never_both() {
        let page = Page::new();
        page.claim(page.load(), 7).expect("absent");
        page.finish(7, 1, false, false, false).expect("owned");
        page.begin_evict().expect("resident");
        assert!(page.settle(Left::Slot(Slot::new(5))).0);
        let w = page.load();
        assert_eq!(
            (w.state(), w.cool(), w.slot().get()),
            (State::Absent, true, 5)
        );
        assert_eq!(page.claim(w, 8), Ok(From::Cool(Slot::new(5))));
        assert!(page.claim(w, 9).is_err(), "rescued");
        page.finish(8, 1, false, true, false).expect("owned");
        assert!(!page.load().cool());
        page.begin_evict().expect("resident");
        assert!(page.settle(Left::Slot(Slot::new(6))).0);
        assert_eq!(page.claim(page.load(), 7), Ok(From::Cool(Slot::new(6))));
        page.abandon(7, 9).expect("owned: given up");
        let w = page.load();
        assert_eq!((w.state(), w.cool(), w.number()), (State::Absent, false, 9));
    }

    #[test]
    fn waiters_are_announced_once_and_reported_once() {
        let page = Page::new();
        page.claim(page.load(), 7).expect("absent");
        let w = page.announce_waiter(page.load()).expect("unchanged");
        assert_eq!(page.announce_waiter(w), Ok(w));
        assert!(page.abandon(7, 0).expect("owned").wake);
        assert_eq!(page.load().state(), State::Absent);
    }
}
