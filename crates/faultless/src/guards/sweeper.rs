//! The thread that does the rounds of the sweep in programs that have live maps with markers. (Under `faultless run`, the preloaded library
//! has one of its own.)

use crate::base::primitive::{AtomicUsize, Mutex, MutexGuard, Ordering, lock};
use crate::base::thread::{block_signals, spawn};
use crate::base::{clock, ids::Nanos, process};
use crate::coherence::keeper;
use crate::guards::handler::SIGSEGV;
use crate::guards::{files, sweep, table};
use std::io;

/// The pause between two rounds, and between two parts if there is more to do.
const PAUSE: Nanos = Nanos::from_millis(250);
const MORE: Nanos = Nanos::from_millis(1);

/// How many maps want rounds.
static MAPS: AtomicUsize = AtomicUsize::new(0);
/// The process in which the thread runs; 0: none.
static RUNS_IN: Mutex<u32> = Mutex::new(0);

/// The lock on the thread's start and end, held across `fork`.
pub(crate) fn freeze() -> MutexGuard<'static, u32> {
    lock(&RUNS_IN)
}

/// A map wants rounds, until [`one_less`].
///
/// # Errors
///
/// The system refuses a thread.
pub(crate) fn one_more() -> io::Result<()> {
    let mut runs_in = lock(&RUNS_IN);
    let here = process::pid();
    if *runs_in != here {
        // (In a forked child, the maps of its parent want none.)
        MAPS.store(0, Ordering::SeqCst);
        spawn(c"faultless-sweep", rounds)?;
        *runs_in = here;
    }
    MAPS.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

pub(crate) fn one_less() {
    MAPS.fetch_sub(1, Ordering::SeqCst);
}

fn rounds() {
    block_signals();
    loop {
        if SIGSEGV.is_lost() {
            // The program has installed a handler of its own, which knows nothing of markers.
            table::for_each(|live| {
                live.hold();
                live.leave_to_kernel();
            });
        }
        let more = round();
        clock::nap(if more { MORE } else { PAUSE });
        let mut runs_in = lock(&RUNS_IN);
        if MAPS.load(Ordering::SeqCst) == 0 {
            *runs_in = 0;
            return;
        }
    }
}

/// A round of the work that is done beside the program: installing the markers of large mappings, and putting markers back. Returns whether
/// there is more to do immediately.
pub(crate) fn round() -> bool {
    // (Other requests to the keeper wait for one part of a round at most.)
    let mut more = false;
    for _ in 0..sweep::PARTS {
        more = keeper::apart(sweep::part_of_round).unwrap_or(false);
    }
    settle();
    more
}

/// Frees what mappings that have ended held, where no thread is in them any more.
pub(crate) fn settle() {
    table::free();
    files::close_unused();
}
