//! Descriptors that survive a program that closes all descriptors.
//!
//! A daemon closes every descriptor; the numbers may then name other files. Each descriptor of the engine is therefore
//! kept twice: in the table that the program's threads share, where the fault path uses it, and in the private table of
//! the engine's keeper thread, which no `close` of the program reaches. Whoever finds the shared one gone or foreign
//! fetches it again from the keeper, in the fault path if need be, with two system calls.

#![allow(unsafe_code, reason = "closes descriptors by number")]

use faultless_sys::{Errno, fdtable, file};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// The keeper's thread id; 0 where there is no private table.
static KEEPER: AtomicU32 = AtomicU32::new(0);

pub(crate) fn set_keeper(tid: u32) {
    KEEPER.store(tid, Ordering::Release);
}

/// The keeper's thread id, if it has a private table.
pub(crate) fn keeper() -> Option<u32> {
    Some(KEEPER.load(Ordering::Acquire)).filter(|&tid| tid != 0)
}

/// Whether descriptors are kept where the program cannot close them.
pub(crate) fn protected() -> bool {
    KEEPER.load(Ordering::Acquire) != 0
}

/// Numbers of the program's table below this are remembered with their owners.
const NUMBERS: usize = 1 << 16;
/// For each number, the last [`Fd`] that had it, by identity.
static OWNERS: [AtomicU32; NUMBERS] = [const { AtomicU32::new(0) }; NUMBERS];
static NEXT_IDENTITY: AtomicU32 = AtomicU32::new(1);

/// A descriptor and its twin in the keeper's table.
#[derive(Debug)]
pub(crate) struct Fd {
    shared: AtomicI32,
    /// −1 where there is no private table.
    kept: i32,
    identity: u32,
}

impl Fd {
    pub(crate) fn new(shared: i32, kept: i32) -> Self {
        let fd = Fd {
            shared: AtomicI32::new(shared),
            kept,
            identity: NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed),
        };
        fd.mark(shared);
        fd
    }

    /// Notes that `number` is this descriptor's from now on. Done before a lease is taken on it, so that whoever finds
    /// a lease under a number also finds whose it is.
    fn mark(&self, number: i32) {
        if let Some(owner) = OWNERS.get(number as usize) {
            owner.store(self.identity, Ordering::SeqCst);
        }
    }

    /// Whether no other descriptor of the engine has been given `number` since; `None` for numbers so large that it is
    /// not remembered.
    pub(crate) fn owns(&self, number: i32) -> Option<bool> {
        let owner = OWNERS.get(number as usize)?;
        Some(owner.load(Ordering::SeqCst) == self.identity)
    }

    /// The number in the program's table.
    #[inline]
    pub(crate) fn get(&self) -> i32 {
        self.shared.load(Ordering::Acquire)
    }

    /// The number in the keeper's table, or −1.
    pub(crate) fn kept(&self) -> i32 {
        self.kept
    }

    /// The number that the keeper's thread, and those that it started, must use.
    pub(crate) fn engine_number(&self) -> i32 {
        if self.kept >= 0 {
            self.kept
        } else {
            self.get()
        }
    }

    /// Whether `number` of the calling thread's table is the very file that the keeper has. Without a keeper, or a
    /// kernel that tells, it counts as such.
    pub(crate) fn is_kept_open_file(&self, number: i32) -> bool {
        keeper()
            .and_then(|tid| fdtable::same_open_file(tid, self.kept, number))
            .unwrap_or(true)
    }

    /// Replaces `lost`, a number that turned out to be closed or foreign, by one fetched from the keeper.
    pub(crate) fn recover(&self, lost: i32) -> Result<i32, Errno> {
        let now = self.get();
        if now != lost {
            return Ok(now);
        }
        let keeper = KEEPER.load(Ordering::Acquire);
        if keeper == 0 || self.kept < 0 {
            return Err(Errno(libc::EBADF));
        }
        let fresh = fdtable::fetch(keeper, self.kept)?;
        self.mark(fresh);
        match self
            .shared
            .compare_exchange(lost, fresh, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => Ok(fresh),
            Err(other) => {
                // Another thread was faster.
                // SAFETY: fetched above, and given to nobody.
                unsafe { file::close(fresh) };
                Ok(other)
            }
        }
    }
}
