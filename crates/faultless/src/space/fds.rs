//! Descriptors that survive a program that closes all descriptors.
//!
//! A daemon closes every descriptor; the numbers may then name other files. Each descriptor of the engine is therefore
//! kept twice: in the table that the program's threads share, where the fault path uses it, and in the private table of
//! the engine's keeper thread, which no `close` of the program reaches. Whoever finds the shared one gone or foreign
//! fetches it again from the keeper, in the fault path if need be, with two system calls.

#![allow(unsafe_code, reason = "closes descriptors by number")]

use crate::base::clock;
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::base::process;
use faultless_sys::file::FileId;
use faultless_sys::{Errno, fdtable, file, raw, signal};

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
/// For each number that is the engine's now, its twin's plus one; 0 for all others.
static TWINS: [AtomicI32; NUMBERS] = [const { AtomicI32::new(0) }; NUMBERS];
/// For each number that is the engine's, the inode and the device of what it named when it was noted, mixed.
static NAMED: [AtomicU64; NUMBERS] = [const { AtomicU64::new(0) }; NUMBERS];
/// For each number, how often it was noted as the engine's.
static NOTED: [AtomicU32; NUMBERS] = [const { AtomicU32::new(0) }; NUMBERS];
/// Numbers that were ever noted: how far the least of them is from the end, and the number behind the largest.
static NOTED_RANGE: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];
/// How many threads fetch a descriptor from the keeper, which is in the table before it is noted.
static RECOVERING: AtomicUsize = AtomicUsize::new(0);
/// How long a look at [`NOTED`] waits for them at a time, and how often.
const RECOVER_NAP: Nanos = Nanos::from_micros(50);
const RECOVER_NAPS: u32 = 2000;
/// How many userfaultfds are in the table that all threads share and not noted yet.
static ARRIVING: AtomicUsize = AtomicUsize::new(0);
/// The copy of a process that has closed them.
static FORSAKEN: AtomicU32 = AtomicU32::new(0);
/// The process whose forked child this is, if the fork handlers have prepared it.
static PREPARED: AtomicU32 = AtomicU32::new(0);
/// Descriptors get numbers from here on, out of the way of programs that count on low ones; 0: as they come.
static FLOOR: AtomicI32 = AtomicI32::new(0);

/// Keeps the engine's descriptors out of the way of a program that does not know of them: beyond the numbers that it may use,
/// where its hard limit leaves room for that, so that it finds as many free ones as it would without the engine.
pub(crate) fn keep_high() {
    let limit = file::descriptor_limit(None).unwrap_or(file::Limit {
        soft: 1024,
        hard: 1024,
    });
    let beyond = limit.hard > limit.soft && limit.soft + BEYOND < NUMBERS as u64;
    let floor = if beyond {
        limit.soft
    } else {
        (limit.soft / 4 * 3).min(FLOOR_MAX)
    };
    FLOOR.store(floor as i32, Ordering::Relaxed);
}

/// Numbers beyond the program's limit that the engine may use.
const BEYOND: u64 = 4096;

/// Whether that was asked for: in a program that does not know of the engine.
pub(crate) fn kept_high() -> bool {
    FLOOR.load(Ordering::Relaxed) != 0
}

/// A table of descriptors is as large as the highest number in it.
const FLOOR_MAX: u64 = 4000;

/// Moves a descriptor that nobody else knows yet to a high number, if that is wanted and possible.
///
/// The caller makes sure that closing the low one drops no POSIX lock.
pub(crate) fn lift(number: i32) -> i32 {
    let floor = FLOOR.load(Ordering::Relaxed);
    if number >= floor {
        return number;
    }
    match duplicate_high(number, floor) {
        Ok(high) => {
            // (The program may have closed the low one meanwhile, and have put another file there.)
            if named(number) == named(high) {
                // SAFETY: the caller's own, and known to nobody else.
                unsafe { file::close(number) };
            }
            high
        }
        Err(_) => number,
    }
}

/// Copies a descriptor to a number from `floor` on, with the soft limit raised meanwhile where it is too low for that.
fn duplicate_high(number: i32, floor: i32) -> Result<i32, Errno> {
    let limit = file::descriptor_limit(None)?;
    let wanted = (floor as u64 + BEYOND).min(limit.hard);
    if limit.soft > floor as u64 || wanted <= floor as u64 {
        return fdtable::duplicate_above(number, floor);
    }
    // (The lowest free number is what others get, so they do not notice.)
    file::descriptor_limit(Some(file::Limit {
        soft: wanted,
        ..limit
    }))?;
    let high = fdtable::duplicate_above(number, floor);
    let _ = file::descriptor_limit(Some(limit));
    high
}

/// Whether `number` of the program's table is a descriptor of the engine's.
pub(crate) fn is_engines(number: i32) -> bool {
    let Some(twin) = TWINS.get(number as usize).filter(|_| !process::forked()) else {
        return false;
    };
    match twin.load(Ordering::SeqCst) {
        0 => false,
        twin => keeper()
            .and_then(|tid| fdtable::same_open_file(tid, twin - 1, number))
            .unwrap_or(true),
    }
}

/// Forgets that `number` is the engine's: the program has put something else there, or it is closed.
pub(crate) fn forget(number: i32) {
    if let Some(twin) = TWINS.get(number as usize) {
        twin.store(0, Ordering::SeqCst);
    }
}

/// A userfaultfd is about to come into the table that all threads share. Dropped when it is noted there.
pub(crate) struct Arrival(());

pub(crate) fn arriving() -> Arrival {
    ARRIVING.fetch_add(1, Ordering::SeqCst);
    Arrival(())
}

impl Drop for Arrival {
    fn drop(&mut self) {
        ARRIVING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether it can be noted that a number is the engine's.
pub(crate) fn can_note(number: i32) -> bool {
    (0..NUMBERS as i32).contains(&number)
}

/// What a number names, as far as the kernel remembers.
fn named(number: i32) -> u64 {
    file::cached_id(number).map_or(0, |id| id.ino ^ id.dev.rotate_left(48) | 1 << 63)
}

/// Whether this is a copy of the process that the fork handlers did not prepare.
#[inline]
pub(crate) fn is_bare_copy() -> bool {
    process::forked()
        && PREPARED.load(Ordering::SeqCst) != process::pid()
        && FORKING.load(Ordering::SeqCst) != this_thread()
}

/// The thread that is in the fork handlers, by the address of its `errno`, which it has in the child as well; 0: none.
static FORKING: AtomicUsize = AtomicUsize::new(0);

fn this_thread() -> usize {
    // SAFETY: the address of the calling thread's own variable.
    unsafe { libc::__errno_location() as usize }
}

/// This thread is in the fork handlers from now on. Other handlers in the child may call what calls [`forsake`], before ours have
/// made what they make from the descriptors.
pub(crate) fn forking() {
    FORKING.store(this_thread(), Ordering::SeqCst);
}

/// In the parent: no longer.
pub(crate) fn forked() {
    FORKING.store(0, Ordering::SeqCst);
}

/// In a forked child: it has closed what it has of the engine's.
pub(crate) fn prepared() {
    PREPARED.store(process::pid(), Ordering::SeqCst);
    // (Threads that were at it are not here.)
    RECOVERING.store(0, Ordering::SeqCst);
    FORKING.store(0, Ordering::SeqCst);
    if ARRIVING.swap(0, Ordering::SeqCst) > 0 {
        close_arriving();
    }
}

/// In a copy of the process that was made without fork handlers: closes what it has of the engine's. The userfaultfd would let it
/// write into the memory of the process that it was copied from, and a leased file let it give up the lease.
///
/// Takes no lock and asks for no memory, so that it may be called anywhere. The same must hold for `before`. It is called once, in the
/// memory of the first such copy, while the descriptors are still open.
#[cold]
pub(crate) fn forsake(before: impl FnOnce()) {
    let me = raw::getpid();
    // A child of vfork that such a copy has is in its memory, and has a table of its own.
    let former = FORSAKEN.swap(me, Ordering::SeqCst);
    if former == me {
        return;
    }
    // With CLONE_FILES it has the very table of the process that it was copied from.
    let shared = fdtable::share_table(me, process::pid());
    if former == 0 {
        before();
    }
    if shared {
        return;
    }
    for_each_number(|number| {
        // (The program may have put something of its own there by a system call that nobody saw.)
        if named(number) == NAMED[number as usize].load(Ordering::SeqCst) {
            // SAFETY: a copy of the engine's descriptor, in a table that this copy of the process has for itself.
            unsafe { file::close(number) };
        }
    });
    if ARRIVING.load(Ordering::SeqCst) > 0 {
        close_arriving();
    }
}

/// Closes userfaultfds that came in the moment in which this copy of the process was made: no call had been told their numbers.
fn close_arriving() {
    fdtable::for_each_open(|number| {
        if fdtable::is_anonymous(number, "anon_inode:[userfaultfd]") {
            // SAFETY: as above.
            unsafe { file::close(number) };
        }
    });
}

/// Runs `f` on all numbers that are noted as the engine's.
pub(crate) fn for_each_number(mut f: impl FnMut(i32)) {
    let [from_end, end] = [0, 1].map(|i: usize| NOTED_RANGE[i].load(Ordering::SeqCst));
    let noted = TWINS.iter().enumerate().take(end);
    for (number, twin) in noted.skip(NUMBERS - from_end) {
        if twin.load(Ordering::SeqCst) != 0 {
            f(number as i32);
        }
    }
}

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

    /// Notes that `number` now names a descriptor of the engine's. A reader that used the number before this must not trust what it
    /// read.
    pub(crate) fn came(number: i32) {
        if let Some(noted) = NOTED.get(number as usize) {
            noted.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Notes that `number` is this descriptor's from now on. Done before a lease is taken on it, so that whoever finds
    /// a lease under a number also finds whose it is.
    fn mark(&self, number: i32) {
        if let Some(owner) = OWNERS.get(number as usize) {
            Self::came(number);
            NOTED_RANGE[0].fetch_max(NUMBERS - number as usize, Ordering::SeqCst);
            NOTED_RANGE[1].fetch_max(number as usize + 1, Ordering::SeqCst);
            owner.store(self.identity, Ordering::SeqCst);
            NAMED[number as usize].store(named(number), Ordering::SeqCst);
            TWINS[number as usize].store(self.kept.max(-1) + 1, Ordering::SeqCst);
        }
    }

    /// Whether no other descriptor of the engine has been given `number` since; `None` for numbers so large that it is
    /// not remembered.
    pub(crate) fn owns(&self, number: i32) -> Option<bool> {
        let owner = OWNERS.get(number as usize)?;
        Some(owner.load(Ordering::SeqCst) == self.identity)
    }

    /// How often `number` has been noted as a descriptor of the engine's; `None` if one has been coming for long and is not
    /// noted yet.
    ///
    /// What was read through a number between two equal answers, the second of which comes after a look at what the number
    /// names, came from that: if it named another file meanwhile, the engine's has come back to it, and was noted again. (A
    /// program can still deceive this without the engine: it closes the number, opens another file there for the time of one
    /// read, and then opens the very file of the map there. It would have closed a number that it does not own.)
    pub(crate) fn noted(number: i32) -> Option<u32> {
        let mut naps = 0;
        while RECOVERING.load(Ordering::SeqCst) > 0 {
            if naps == RECOVER_NAPS {
                return None;
            }
            naps += 1;
            clock::nap(RECOVER_NAP);
        }
        let noted = NOTED.get(number as usize);
        Some(noted.map_or(0, |n| n.load(Ordering::SeqCst)))
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

    /// The number in the program's table, if it names file `id`. Nothing is fetched: also for a copy of the process.
    pub(crate) fn if_it_names(&self, id: FileId) -> Option<i32> {
        let number = self.get();
        (file::cached_id(number) == Ok(id)).then_some(number)
    }

    /// The same. If the program has closed the number, or has put another file there, the engine fetches the descriptor again. `None` if it
    /// cannot.
    pub(crate) fn found(&self, id: FileId) -> Option<i32> {
        self.if_it_names(id).or_else(|| self.current(id).ok())
    }

    /// The number in the program's table, made sure to name file `id`.
    pub(crate) fn current(&self, id: FileId) -> Result<i32, Errno> {
        let is_it = |number| file::status(number).is_ok_and(|st| st.id == id);
        let number = self.get();
        if is_it(number) {
            return Ok(number);
        }
        // (Another descriptor may have got the number in the same moment.)
        let number = self.recover(number)?;
        match is_it(number) {
            true => Ok(number),
            false => Err(Errno(libc::EBADF)),
        }
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
        // (It keeps its low number: moving it would close that one again, which may cost the program POSIX locks.)
        let _until_it_is_noted = arriving();
        // (First: it may get this very number, and the number may be another descriptor's by now.)
        let notes = || NOTED.get(lost as usize).map(|n| n.load(Ordering::SeqCst));
        let before = notes();
        if self.owns(lost) == Some(true) {
            if fdtable::same_open_file(keeper, self.kept, lost) == Some(true) {
                // Another thread was faster, and got this number.
                return Ok(lost);
            }
            let twin = &TWINS[lost as usize];
            let forgotten = twin
                .compare_exchange(self.kept + 1, 0, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok();
            if forgotten && notes() != before && self.owns(lost) == Some(true) {
                // Another thread got this very number meanwhile.
                twin.store(self.kept + 1, Ordering::SeqCst);
                return Ok(self.get());
            }
        }
        let fresh = {
            // (No signal handler of this thread's may wait for what this thread does.)
            let _blocked = signal::Blocked::all();
            RECOVERING.fetch_add(1, Ordering::SeqCst);
            let fresh = fdtable::fetch(keeper, self.kept);
            let _ = fresh.map(|number| self.mark(number));
            RECOVERING.fetch_sub(1, Ordering::SeqCst);
            fresh?
        };
        match self
            .shared
            .compare_exchange(lost, fresh, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => Ok(fresh),
            Err(other) => {
                // Another thread was faster.
                // Its copy stays open, and is known as the engine's: closing it here could cost the program a POSIX lock.
                Ok(other)
            }
        }
    }
}
