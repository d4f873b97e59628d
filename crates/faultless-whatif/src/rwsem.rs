//! A reader-writer semaphore that sleeps: `kernel/locking/rwsem.c` of Linux 6.18, which `mmap_lock` and the inode's
//! `invalidate_lock` are.
//!
//! What matters of it here:
//!
//! * A reader gets the lock at once when nobody writes and nobody waits. Somebody who waits, and be it a writer behind
//!   readers, stops later readers. There is one exception: where nobody holds the lock just now, a reader may *steal* it from those that
//!   wait and are on their way.
//! * A writer spins before it sleeps, in a queue of spinners, while the owner runs on a processor; behind readers for a few
//!   microseconds only. A spinner steals the lock from those that sleep.
//! * Who lets go wakes the first that sleeps. If that is a writer, it has to try again, and may find the lock stolen; after 4 ms of
//!   that it asks for the *hand-off*, and then nobody steals any more. If it is a reader, all readers of the queue get the lock
//!   at once, up to 256 of them, those behind writers as well.
//! * The lock is free from the release until the wake-up: a spinner gets it in between.
//! * A writer that downgrades to a reader lets the readers in at the head of the queue, if it has any there.
//!
//! Invariant: never a writer together with a reader, or with another writer; checked at each acquisition.

use crate::cpu::{Cpu, Spun, Tid};
use crate::kernel::{Kernel, Turn};
use faultless_trace::Nanos;
use std::cell::RefCell;
use std::collections::VecDeque;

/// `RWSEM_WAIT_TIMEOUT`: 4 ms.
const HANDOFF_AFTER: Nanos = 4_000_000;
/// `MAX_READERS_WAKEUP`.
const READERS_AT_A_TIME: usize = 0x100;
/// How often a spinner looks whether the owner still runs.
const LOOK_EVERY: Nanos = 10_000;

#[derive(Debug, Clone, Copy)]
struct Waiter {
    t: Tid,
    write: bool,
    /// When it asks for the hand-off.
    patience: Nanos,
    /// It has asked.
    handoff: bool,
}

#[derive(Debug, Default)]
struct State {
    writer: Option<Tid>,
    readers: Vec<Tid>,
    waiters: VecDeque<Waiter>,
    handoff: bool,
    spinners: VecDeque<Tid>,
    /// The one that has asked for the hand-off, and spins.
    heir: Option<Tid>,
    /// Readers held it for so long that spinning is in vain.
    not_spinnable: bool,
}

/// What is woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    Any,
    /// Readers hold it: readers alone.
    Readers,
}

/// The semaphore.
#[derive(Debug, Default)]
pub(crate) struct Rwsem {
    state: RefCell<State>,
    /// The lock's word.
    line: Turn,
}

impl State {
    fn is_free(&self) -> bool {
        self.writer.is_none() && self.readers.is_empty()
    }

    fn take_read(&mut self, t: Tid) {
        assert!(self.writer.is_none(), "a reader beside a writer");
        self.readers.push(t);
    }

    fn take_write(&mut self, t: Tid) {
        assert!(self.is_free(), "a writer beside others");
        self.writer = Some(t);
        self.not_spinnable = false;
    }

    /// `rwsem_mark_wake`: who is to be woken. Readers have the lock then.
    ///
    /// A lock that goes in order (`in_order`: Linux before 3.10) lets in the readers at the head alone.
    fn mark(&mut self, how: Wake, now: Nanos, in_order: bool) -> Vec<Tid> {
        let Some(first) = self.waiters.front_mut() else {
            return Vec::new();
        };
        if first.write {
            return match how {
                Wake::Any => vec![first.t],
                Wake::Readers => Vec::new(),
            };
        }
        if self.writer.is_some() {
            // It was stolen.
            if now > first.patience && !first.handoff {
                first.handoff = true;
                self.handoff = true;
            }
            return Vec::new();
        }
        let mut woken = Vec::new();
        let mut kept = VecDeque::with_capacity(self.waiters.len());
        let mut stopped = false;
        for waiter in std::mem::take(&mut self.waiters) {
            stopped |= waiter.write && in_order;
            if waiter.write || stopped || woken.len() >= READERS_AT_A_TIME {
                kept.push_back(waiter);
            } else {
                self.handoff &= !waiter.handoff;
                woken.push(waiter.t);
            }
        }
        self.waiters = kept;
        for &t in &woken {
            self.take_read(t);
        }
        woken
    }

    /// `rwsem_cond_wake_waiter`.
    fn mark_if_possible(&mut self, now: Nanos, in_order: bool) -> Vec<Tid> {
        if self.writer.is_some() || self.handoff {
            return Vec::new();
        }
        if self.readers.is_empty() {
            self.not_spinnable = false;
            self.mark(Wake::Any, now, in_order)
        } else {
            self.mark(Wake::Readers, now, in_order)
        }
    }

    /// `rwsem_try_write_lock`, of one that waits.
    fn try_write(&mut self, t: Tid, now: Nanos, in_order: bool) -> bool {
        let is_first = self.waiters.front().is_some_and(|w| w.t == t);
        if in_order && !is_first {
            return false;
        }
        if self.handoff && !is_first && self.waiters.front().is_some_and(|w| w.handoff) {
            return false;
        }
        if !self.is_free() {
            let me = self.waiters.iter().find(|w| w.t == t);
            if !self.handoff && me.is_some_and(|w| now > w.patience) {
                self.handoff = true;
                if let Some(first) = self.waiters.front_mut() {
                    first.handoff = true;
                }
            }
            return false;
        }
        self.waiters.retain(|w| w.t != t);
        self.handoff = false;
        self.take_write(t);
        true
    }
}

impl Rwsem {
    /// Whoever holds it: the writer, or readers.
    pub(crate) fn holders(&self) -> Vec<Tid> {
        let s = self.state.borrow();
        s.writer.iter().chain(&s.readers).copied().collect()
    }

    /// Whether a thread sleeps for it that nobody will wake: the lock is free, and the first that waits for it sleeps; or
    /// the thread holds it.
    pub(crate) fn has_forgotten(&self, cpu: &Cpu, t: Tid) -> bool {
        let s = self.state.borrow();
        let first = s.waiters.front().map(|w| w.t);
        s.readers.contains(&t)
            || (s.is_free() && s.spinners.is_empty() && first.is_some_and(|f| cpu.is_blocked(f)))
    }

    /// The first writer that waits.
    pub(crate) fn queued_writer(&self) -> Option<Tid> {
        let s = self.state.borrow();
        s.waiters.iter().find(|w| w.write).map(|w| w.t)
    }

    /// Whether somebody waits (`rwsem_is_contended`).
    pub(crate) fn is_contended(&self) -> bool {
        !self.state.borrow().waiters.is_empty()
    }

    /// Whether somebody holds it to write.
    pub(crate) fn is_written(&self) -> bool {
        self.state.borrow().writer.is_some()
    }

    /// Takes it for reading if that needs no waiting.
    pub(crate) async fn try_read(&self, k: &Kernel, t: Tid) -> bool {
        self.line.pass(k, t, None, 0).await;
        let mut s = self.state.borrow_mut();
        let can = s.writer.is_none() && s.waiters.is_empty() && !s.handoff;
        if can {
            s.take_read(t);
        }
        can
    }

    /// Takes it for reading. Whether it had to wait.
    pub(crate) async fn read(&self, k: &Kernel, t: Tid) -> bool {
        if self.try_read(k, t).await {
            return false;
        }
        let woken = {
            let mut s = self.state.borrow_mut();
            let now = k.cpu.now();
            if k.steals && s.is_free() && !s.handoff {
                // Stolen, and shared with the readers that wait at the head.
                s.take_read(t);
                Err(s.mark(Wake::Readers, now, false))
            } else {
                s.waiters.push_back(Waiter {
                    t,
                    write: false,
                    patience: now + HANDOFF_AFTER,
                    handoff: false,
                });
                Ok(s.mark_if_possible(now, !k.steals))
            }
        };
        match woken {
            Err(woken) => {
                wake_all(k, t, &woken).await;
                false
            }
            Ok(woken) => {
                wake_all(k, t, &woken).await;
                while !self.state.borrow().readers.contains(&t) {
                    k.cpu.block(t).await;
                }
                true
            }
        }
    }

    /// Lets go.
    pub(crate) async fn unlock_read(&self, k: &Kernel, t: Tid) {
        self.line.pass(k, t, None, 0).await;
        let is_last = {
            let mut s = self.state.borrow_mut();
            let at = s.readers.iter().position(|&r| r == t);
            // (The order stays: the first has held it for longest.)
            s.readers
                .remove(at.expect("a reader lets go of what it holds"));
            s.readers.is_empty()
        };
        if is_last {
            self.state.borrow_mut().not_spinnable = false;
            self.wake_next(k, t).await;
        }
    }

    /// `rwsem_wake`, of one that has let go. A spinner sees before that the lock is free, and takes it.
    async fn wake_next(&self, k: &Kernel, t: Tid) {
        k.waking.set(k.waking.get() + 1);
        let spinner = {
            let s = self.state.borrow();
            s.heir.or(s.spinners.front().copied())
        };
        if let Some(spinner) = spinner {
            k.cpu.notify(spinner, k.costs.line.max(1));
            // The line goes to the spinner first, then back for the list of those that wait.
            k.cpu.work(t, 2 * k.costs.line.max(1)).await;
        }
        let woken = self
            .state
            .borrow_mut()
            .mark(Wake::Any, k.cpu.now(), !k.steals);
        wake_all(k, t, &woken).await;
        k.waking.set(k.waking.get() - 1);
    }

    /// Takes it for writing. Whether it had to wait.
    pub(crate) async fn write(&self, k: &Kernel, t: Tid) -> bool {
        self.line.pass(k, t, None, 0).await;
        {
            let mut s = self.state.borrow_mut();
            if s.is_free() && s.waiters.is_empty() && !s.handoff {
                s.take_write(t);
                return false;
            }
        }
        if k.steals && self.spin_for_it(k, t).await {
            return true;
        }
        let woken = {
            let mut s = self.state.borrow_mut();
            let now = k.cpu.now();
            let others = !s.waiters.is_empty();
            s.waiters.push_back(Waiter {
                t,
                write: true,
                patience: now + HANDOFF_AFTER,
                handoff: false,
            });
            if others {
                s.mark_if_possible(now, !k.steals)
            } else {
                Vec::new()
            }
        };
        wake_all(k, t, &woken).await;
        loop {
            if self.state.borrow_mut().try_write(t, k.cpu.now(), !k.steals) {
                return true;
            }
            // Who has asked for the hand-off spins while the owner runs.
            if k.steals && self.spins_for_handoff(k, t).await {
                continue;
            }
            k.cpu.block(t).await;
        }
    }

    /// `rwsem_spin_on_owner`, of a writer that has asked for the hand-off: whether the owner has let go.
    async fn spins_for_handoff(&self, k: &Kernel, t: Tid) -> bool {
        loop {
            let owner = {
                let s = self.state.borrow();
                let has_asked = s.waiters.front().is_some_and(|w| w.t == t && w.handoff);
                s.writer.filter(|_| has_asked)
            };
            let Some(owner) = owner else { return false };
            if !k.cpu.is_running(owner) || k.cpu.must_reschedule(t) {
                return false;
            }
            self.state.borrow_mut().heir = Some(t);
            let how = k.cpu.spin(t, LOOK_EVERY).await;
            self.state.borrow_mut().heir = None;
            match how {
                Spun::Reschedule => return false,
                Spun::Notified => return true,
                Spun::TimedOut => {}
            }
        }
    }

    /// Lets go.
    pub(crate) async fn unlock_write(&self, k: &Kernel, t: Tid) {
        self.line.pass(k, t, None, 0).await;
        {
            let mut s = self.state.borrow_mut();
            assert_eq!(s.writer, Some(t), "a writer lets go of what it holds");
            s.writer = None;
        }
        self.wake_next(k, t).await;
    }

    /// From writer to reader.
    pub(crate) async fn downgrade(&self, k: &Kernel, t: Tid) {
        self.line.pass(k, t, None, 0).await;
        let woken = {
            let mut s = self.state.borrow_mut();
            assert_eq!(s.writer, Some(t), "a writer downgrades what it holds");
            s.writer = None;
            s.take_read(t);
            s.mark(Wake::Readers, k.cpu.now(), !k.steals)
        };
        wake_all(k, t, &woken).await;
    }

    /// `rwsem_optimistic_spin`: whether that got the lock.
    async fn spin_for_it(&self, k: &Kernel, t: Tid) -> bool {
        if !self.can_spin(k, t) {
            return false;
        }
        self.state.borrow_mut().spinners.push_back(t);
        let got = self.spin_in_turn(k, t).await;
        let next = {
            let mut s = self.state.borrow_mut();
            s.spinners.retain(|&s| s != t);
            s.spinners.front().copied()
        };
        if let Some(next) = next {
            k.cpu.notify(next, k.costs.line);
        }
        got
    }

    async fn spin_in_turn(&self, k: &Kernel, t: Tid) -> bool {
        while self.state.borrow().spinners.front() != Some(&t) {
            if k.cpu.spin(t, Nanos::MAX).await == Spun::Reschedule {
                return false;
            }
        }
        let mut behind_readers_until = None;
        loop {
            {
                let mut s = self.state.borrow_mut();
                if s.is_free() && !s.handoff {
                    s.take_write(t);
                    return true;
                }
            }
            if !self.can_spin(k, t) {
                return false;
            }
            let most = {
                let s = self.state.borrow();
                if s.readers.is_empty() {
                    behind_readers_until = None;
                    LOOK_EVERY
                } else {
                    // `rwsem_rspin_threshold`: (20 + readers) / 2 microseconds, of at most 30 readers.
                    let threshold = (20 + s.readers.len().min(30) as Nanos) * 500;
                    let until = *behind_readers_until.get_or_insert(k.cpu.now() + threshold);
                    until.saturating_sub(k.cpu.now())
                }
            };
            if most == 0 {
                self.state.borrow_mut().not_spinnable = true;
                return false;
            }
            if k.cpu.spin(t, most).await == Spun::Reschedule {
                return false;
            }
        }
    }

    /// `rwsem_can_spin_on_owner`.
    fn can_spin(&self, k: &Kernel, t: Tid) -> bool {
        let s = self.state.borrow();
        !k.cpu.must_reschedule(t)
            && !s.not_spinnable
            && s.writer.is_none_or(|w| k.cpu.is_running(w))
    }
}

/// Wakes threads, one after the other.
pub(crate) async fn wake_all(k: &Kernel, t: Tid, woken: &[Tid]) {
    k.waking.set(k.waking.get() + woken.len() as u64);
    for &other in woken {
        // One that is awake already, and has not had a processor yet, costs nothing that counts.
        if other != t {
            if k.cpu.is_blocked(other) {
                k.cpu.work(t, k.costs.wake).await;
            }
            k.cpu.wake(other);
        }
        k.waking.set(k.waking.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use crate::script::{Body, MS, holder, play};

    fn order(bodies: Vec<Body>) -> Vec<(f64, String)> {
        play(8, "vma-then-mmap", MS, 1 << 20, bodies)
    }

    fn said(at: f64, what: &str) -> (f64, String) {
        (at, what.to_owned())
    }

    #[test]
    fn readers_share_it_and_a_queued_writer_stops_later_ones() {
        let log = order(vec![
            holder("r1", 0, false, 10 * MS),
            holder("r2", MS, false, 2 * MS),
            holder("w", 4 * MS, true, 5 * MS),
            holder("r3", 5 * MS, false, MS),
        ]);
        let expected = [
            said(0.0, "r1"),
            said(1.0, "r2"),
            said(10.0, "w"),
            said(15.0, "r3"),
        ];
        assert_eq!(log, expected);
    }

    /// mark_wake: the readers behind writers as well.
    #[test]
    fn readers_are_let_in_together_past_the_writers_between_them() {
        let log = order(vec![
            holder("w1", 0, true, 10 * MS),
            holder("r1", MS, false, 3 * MS),
            holder("w2", 2 * MS, true, MS),
            holder("r2", 3 * MS, false, 2 * MS),
        ]);
        let expected = [
            said(0.0, "w1"),
            said(10.0, "r1"),
            said(10.0, "r2"),
            said(13.0, "w2"),
        ];
        assert_eq!(log, expected);
    }

    #[test]
    fn a_downgrade_lets_readers_in_if_they_are_first() {
        let downgrades: Body = Box::new(|k, t, log| {
            Box::pin(async move {
                k.mmap_write(t, &t.mm).await;
                k.cpu.sleep(t.tid, 4 * MS).await;
                t.mm.mmap_lock.downgrade(k, t.tid).await;
                log.tell(k, "downgraded");
                k.cpu.sleep(t.tid, 6 * MS).await;
                t.mm.mmap_lock.unlock_read(k, t.tid).await;
            })
        });
        let log = order(vec![
            downgrades,
            holder("r", MS, false, MS),
            holder("w", 2 * MS, true, MS),
        ]);
        let expected = [said(4.0, "downgraded"), said(4.0, "r"), said(10.0, "w")];
        let mut sorted = log.clone();
        sorted.sort_by(|a, b| a.partial_cmp(b).unwrap());
        assert_eq!(sorted, expected);
    }

    #[test]
    fn a_downgrade_lets_nobody_in_if_a_writer_is_first() {
        let downgrades: Body = Box::new(|k, t, _| {
            Box::pin(async move {
                k.mmap_write(t, &t.mm).await;
                k.cpu.sleep(t.tid, 4 * MS).await;
                t.mm.mmap_lock.downgrade(k, t.tid).await;
                k.cpu.sleep(t.tid, 6 * MS).await;
                t.mm.mmap_lock.unlock_read(k, t.tid).await;
            })
        });
        let log = order(vec![
            downgrades,
            holder("w", MS, true, MS),
            holder("r", 2 * MS, false, MS),
        ]);
        assert_eq!(log, [said(10.0, "w"), said(11.0, "r")]);
    }

    /// While nobody holds it, because the writer that was woken is not there yet, a reader takes it; but not for ever.
    #[test]
    fn a_writer_that_is_robbed_asks_for_the_hand_off() {
        // One that takes the lock for a millisecond, over and over, without a pause in which the writer could get it.
        let greedy: Body = Box::new(|k, t, log| {
            Box::pin(async move {
                for _ in 0..60 {
                    k.mmap_read(t, &t.mm).await;
                    k.cpu.work(t.tid, MS).await;
                    t.mm.mmap_lock.unlock_read(k, t.tid).await;
                }
                log.tell(k, "greedy has done");
            })
        });
        // On one processor the writer cannot run when it is woken, so it is robbed.
        let log = play(
            1,
            "vma-then-mmap",
            MS,
            1 << 20,
            vec![greedy, holder("w", MS / 2, true, MS)],
        );
        let at = log.iter().find(|l| l.1 == "w").expect("it gets it").0;
        // It has patience for 4 ms, and must get a processor to ask, and another time to take it.
        assert!((4.0..24.0).contains(&at), "{log:?}");
    }

    #[test]
    fn a_writer_spins_while_the_owner_runs() {
        let busy: Body = Box::new(|k, t, _| {
            Box::pin(async move {
                k.mmap_write(t, &t.mm).await;
                k.cpu.work(t.tid, 2 * MS).await;
                t.mm.mmap_lock.unlock_write(k, t.tid).await;
            })
        });
        let spins: Body = Box::new(|k, t, log| {
            Box::pin(async move {
                k.cpu.sleep(t.tid, MS).await;
                let before = k.cpu.busy();
                k.mmap_write(t, &t.mm).await;
                // Both have been on their processors all the time.
                assert!(k.cpu.busy() - before >= 2 * MS - 1_000);
                log.tell(k, "spun");
                t.mm.mmap_lock.unlock_write(k, t.tid).await;
            })
        });
        let log = play(2, "vma-then-mmap", MS, 1 << 20, vec![busy, spins]);
        assert_eq!(log, [said(2.0, "spun")]);
    }
}
