//! Signals that end a program, while its threads serve misses.
//!
//! A thread that serves a miss has every signal blocked, for as long as the storage takes. If all threads of a program wait for
//! storage that never answers, SIGTERM finds no thread that takes it. The kernel's own fault can be killed; so must ours be.
//!
//! Each thread says, as it begins to serve, which of four signals it had open. The evictor looks now and then: a signal that is
//! pending for the process, that the program neither catches nor ignores, and that such a thread had open, would have ended the
//! process under the kernel's own fault. The evictor opens it in its own mask, and the kernel ends the process. A program that
//! keeps a signal blocked in all of its threads (for `sigwait` or a signalfd) had it open in none, and nothing happens.
//! (A child of `vfork` that loads from a map is counted among its parent's threads.)

use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::{clock, process, text};
use faultless_sys::signal::{self, SigSet};

/// The signals with which people and service managers end programs.
const SIGNALS: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];
/// Bits of a counter that belong to one of them: enough for 65,535 threads that serve misses on one shard's processors.
const FIELD: u32 = u64::BITS / SIGNALS.len() as u32;

/// How long a signal must be pending at least.
const LOOK_AGAIN: Nanos = Nanos::from_millis(20);

/// Counters, spread by processor.
const SHARDS: usize = 16;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Shard(AtomicU64);

/// Threads of the program that serve misses, counted for each signal that they had open.
#[derive(Debug, Default)]
pub(crate) struct Withheld([Shard; SHARDS]);

/// A thread that serves a miss, until this is dropped.
pub(crate) struct Serving<'a> {
    counter: &'a AtomicU64,
    counted: u64,
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

impl Withheld {
    /// The calling thread has blocked all signals; `before` is what it had blocked until then.
    pub(crate) fn serving(&self, before: SigSet) -> Serving<'_> {
        let counted = (0..SIGNALS.len())
            .filter(|&i| before & signal::set_of(SIGNALS[i]) == 0)
            .fold(0, |sum, i| sum | 1 << (FIELD * i as u32));
        let counter = &self.0[process::shard(SHARDS)].0;
        counter.fetch_add(counted, Ordering::Relaxed);
        Serving { counter, counted }
    }

    /// The signals that some of these threads had open.
    fn open(&self) -> SigSet {
        let field = |n: u64, i: usize| n >> (FIELD * i as u32) & ((1 << FIELD) - 1);
        let counters = || self.0.iter().map(|shard| shard.0.load(Ordering::Relaxed));
        (0..SIGNALS.len())
            .filter(|&i| counters().any(|n| field(n, i) > 0))
            .fold(0, |set, i| set | signal::set_of(SIGNALS[i]))
    }

    /// Ends the process if a pending signal is to do so. Called by a thread of the engine with all of these signals blocked.
    pub(crate) fn take(&self) {
        if self.due() == 0 {
            return;
        }
        // A thread that takes it by name (`sigwait`) may just be on its way, and a miss may just have ended.
        clock::nap(LOOK_AGAIN);
        let due = self.due() & self.due();
        if due != 0 {
            // The kernel delivers it before this returns. (If the program has just begun to catch it, its handler runs here.)
            let mask = signal::set_mask(signal::ALL & !due);
            signal::set_mask(mask);
        }
    }
}

impl Withheld {
    /// The signals that are pending for the process, and would have ended it.
    fn due(&self) -> SigSet {
        let before = self.open();
        if before == 0 {
            return 0;
        }
        let status = text::read("/proc/self/status");
        // A thread that serves a miss before and after the look had the signal open while it was pending.
        status.map_or(0, |status| due(&status, before & self.open()))
    }
}

/// Which of some signals are pending for the process and have their default action, by the text of `/proc/self/status`.
fn due(status: &str, open: SigSet) -> SigSet {
    let set = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        SigSet::from_str_radix(value.trim(), 16).ok()
    };
    match (set("ShdPnd:"), set("SigIgn:"), set("SigCgt:")) {
        (Some(pending), Some(ignored), Some(caught)) => open & pending & !ignored & !caught,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_in_one_thread_is_open() {
        let (int, term) = (signal::set_of(libc::SIGINT), signal::set_of(libc::SIGTERM));
        let withheld = Withheld::default();
        assert_eq!(withheld.open(), 0);
        let all_blocked = withheld.serving(signal::ALL);
        assert_eq!(withheld.open(), 0);
        let one = withheld.serving(signal::ALL & !term);
        let two = withheld.serving(signal::ALL & !(term | int));
        assert_eq!(withheld.open(), term | int);
        drop((one, all_blocked));
        assert_eq!(withheld.open(), term | int);
        drop(two);
        assert_eq!(withheld.open(), 0);
        let _unblocked = withheld.serving(0);
        assert_eq!(withheld.open().count_ones() as usize, SIGNALS.len());
    }

    #[test]
    fn a_signal_is_due_that_is_pending_and_neither_caught_nor_ignored() {
        let status = |pending, ignored, caught| {
            format!(
                "Name:\tx\nSigPnd:\tffffffffffffffff\nShdPnd:\t{pending:016x}\nSigBlk:\t0\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n"
            )
        };
        let term = signal::set_of(libc::SIGTERM);
        assert_eq!(due(&status(term, 0, 0), term), term);
        assert_eq!(due(&status(term, 0, 0), 0), 0, "open nowhere");
        assert_eq!(due(&status(0, 0, 0), term), 0, "not pending");
        assert_eq!(due(&status(term, term, 0), term), 0, "ignored");
        assert_eq!(due(&status(term, 0, term), term), 0, "caught");
        assert_eq!(due("ShdPnd:\tzzz\n", term), 0);
    }
}
