//! The rings of a pool: each is lent to one thread at a time.

use crate::base::primitive::{Mutex, lock};
use crate::base::process;
use crate::read::uring::Uring;

/// Reads that one thread has in flight.
pub(crate) const DEPTH: usize = 64;

/// How a pool does reads of which it has many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Way {
    /// It has had none yet.
    Unknown,
    Uring,
    /// One after the other, and why.
    Blocking(String),
}

#[derive(Default)]
struct State {
    idle: Vec<Uring>,
    /// Rings that there are, lent ones included.
    made: usize,
    /// Why there will be none.
    refused: Option<String>,
}

/// Rings that are not lent, and whether there can be more.
#[derive(Default)]
pub(crate) struct Rings(Mutex<State>);

/// As many threads as have processors can keep a device busy, and as many may wait for theirs meanwhile.
fn rings_max() -> usize {
    2 * process::processors()
}

impl Rings {
    /// A ring, unless io_uring is refused or others have all that there may be.
    pub(crate) fn take(&self) -> Option<Uring> {
        let mut state = lock(&self.0);
        if state.refused.is_some() {
            return None;
        }
        if let Some(ring) = state.idle.pop() {
            drop(state);
            return self.still(ring);
        }
        if state.made == rings_max() {
            return None;
        }
        state.made += 1;
        drop(state);
        match Uring::new(DEPTH as u32) {
            Ok(ring) => Some(ring),
            Err(e) => {
                lock(&self.0).made -= 1;
                // (Another error may be gone the next time.)
                let for_good = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EOPNOTSUPP];
                if e.raw_os_error().is_some_and(|e| for_good.contains(&e)) {
                    self.refuse(format!("io_uring_setup: {e}"));
                }
                None
            }
        }
    }

    /// A ring that was lent, if it is one still.
    pub(crate) fn still(&self, ring: Uring) -> Option<Uring> {
        if !ring.is_open() {
            self.refuse("the program closed its descriptor".to_owned());
            return None;
        }
        Some(ring)
    }

    pub(crate) fn give(&self, ring: Uring) {
        lock(&self.0).idle.push(ring);
    }

    /// No more rings are lent.
    pub(crate) fn refuse(&self, why: String) {
        lock(&self.0).refused = Some(why);
    }

    /// Whether there are rings, as far as is known.
    pub(crate) fn are_lent(&self) -> bool {
        lock(&self.0).refused.is_none()
    }

    pub(crate) fn way(&self) -> Way {
        let state = lock(&self.0);
        match &state.refused {
            Some(why) => Way::Blocking(why.clone()),
            None if state.made > 0 => Way::Uring,
            None => Way::Unknown,
        }
    }
}
