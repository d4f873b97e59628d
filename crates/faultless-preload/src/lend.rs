//! What the kernel reads instead of memory that may be absent.
//!
//! The kernel cannot be interrupted by SIGBUS in the middle of a system call: an absent page of ours is EFAULT to it. So a
//! function that hands memory on hands on one of two things instead, and makes its call once, so that what the kernel
//! promises of one call holds: an append in one piece, a datagram, a write to a pipe.
//!
//! * Little memory is read in and pinned for the time of the call.
//! * For more than that, and in children of vfork, the call gets the address of the kernel's own mapping of the same bytes.
//!
//! Of a live mapping, which is the kernel's own, the markers are kept away for the time of the call; of one that the kernel is to write
//! to, for ever.

#![allow(unsafe_code, reason = "fills arrays that the kernel reads")]

use crate::counters::Counter;
use crate::mappings::reaches;
use crate::probe;
use crate::real::Errno;
use crate::{state, waiting};
use faultless::live::{self, Opened};
use faultless::standin::{self, Held, Lent};
use faultless_sys::mem;
use libc::iovec;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes that are pinned for one call.
static PINNED_MAX: AtomicUsize = AtomicUsize::new(64 << 10);

/// Says how much one call may pin: little enough that many calls can, in the budget as it is now.
pub(crate) fn set_pinned_max(bytes: usize) {
    PINNED_MAX.store(bytes, Ordering::Relaxed);
}

pub(crate) fn range(at: *const c_void, len: usize) -> Range<usize> {
    at as usize..(at as usize).saturating_add(len)
}

/// One buffer, as the kernel is to read it.
pub(crate) struct Given {
    at: usize,
    _held: Option<Held>,
    lent: Option<Lent>,
    opened: Option<Opened>,
}

impl Given {
    /// What to give the kernel for `len` bytes at `at`.
    #[inline]
    pub(crate) fn new(at: *const c_void, len: usize) -> Self {
        let range = range(at, len);
        if reaches(&range) {
            Self::of_ours(range)
        } else {
            Given {
                at: at as usize,
                _held: None,
                lent: None,
                opened: None,
            }
        }
    }

    #[cold]
    fn of_ours(range: Range<usize>) -> Self {
        let _errno = Errno::keep();
        let mut given = Given {
            at: range.start,
            _held: None,
            lent: None,
            opened: opened(&range),
        };
        if !standin::touches(&range) {
            return given;
        }
        let foreign = state::foreign();
        if !foreign && range.len() <= PINNED_MAX.load(Ordering::Relaxed) {
            let mut held = Held::new();
            held.hold(range.clone());
            if held.holds() {
                given._held = Some(held);
                return given;
            }
        }
        if let Some(lent) = standin::lend(&range) {
            given.at = lent.at();
            given.lent = Some(lent);
        } else if !foreign {
            // More than one mapping has a part of it.
            let reason = "one system call needs more of it than can be pinned";
            state::lock().hand_back_over(&range, reason);
        }
        given
    }

    pub(crate) fn at(&self) -> *const c_void {
        self.at as *const c_void
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        // The call's own errno is the program's.
        let _errno = Errno::keep();
        self._held = None;
        self.lent = None;
        self.opened = None;
    }
}

/// Keeps markers away from what live mappings have of a range.
pub(crate) fn opened(range: &Range<usize>) -> Option<Opened> {
    live::touches(range).then(|| {
        let mut opened = Opened::default();
        open(&mut opened, range);
        opened
    })
}

/// The same for one range more. (A child of vfork may never return here: it only removes the markers.)
fn open(opened: &mut Opened, range: &Range<usize>) {
    match state::foreign() {
        true => Opened::open_in_passing(range),
        false => opened.open(range),
    }
}

/// The kernel is to write to a range.
#[inline]
pub(crate) fn filled(range: &Range<usize>) {
    if live::may_be_writable(range) {
        fill(range);
    }
}

#[cold]
fn fill(range: &Range<usize>) {
    if live::touches(range) {
        let _errno = Errno::keep();
        live::open_for_writing(range, state::foreign());
    }
}

/// The kernel may write something short where one of some words points to.
#[inline]
pub(crate) fn filled_through(words: &[usize]) {
    if live::any_writable() {
        for &word in words.iter().filter(|word| **word >= mem::PAGE) {
            filled(&(word..word.saturating_add(SHORT)));
        }
    }
}

/// The kernel is to write to the parts of a vector.
pub(crate) fn filled_parts(vector: *const iovec, count: usize) {
    if !live::any_writable() || count > libc::UIO_MAXIOV as usize {
        return;
    }
    filled(&range(vector.cast(), count * size_of::<iovec>()));
    if probe::readable(vector as usize, count * size_of::<iovec>()) {
        for i in 0..count {
            // SAFETY: found to be there; the program's own vector.
            let part = unsafe { vector.add(i).read_unaligned() };
            filled(&range(part.iov_base, part.iov_len));
        }
    }
}

/// Whether [`kept`] may have something to do.
#[inline]
pub(crate) fn may_be_kept() -> bool {
    live::any_writable() || waiting::any()
}

/// Some memory is given to a user which bears no markers. A writable live mapping that has a part of it is handed back, and one that waits
/// for a second thread will not be served.
pub(crate) fn kept(range: &Range<usize>, reason: &'static str) {
    waiting::changing(range);
    if live::may_be_writable(range)
        && live::touches(range)
        && !state::foreign()
        && !state::forking()
    {
        state::lock().hand_back_over(range, reason);
    }
}

/// Elements that an array has room for without memory of its own.
const INLINE: usize = 16;

/// A short array. It asks no allocator for memory: the call may come from a signal handler that has interrupted one.
struct Array<T> {
    inline: [MaybeUninit<T>; INLINE],
    /// A mapping with room for all, where there are more.
    mapped: usize,
    room: usize,
    len: usize,
}

impl<T> Array<T> {
    /// With room for so many elements. `None` if there is no memory.
    fn new(room: usize) -> Option<Self> {
        let mapped = if room > INLINE {
            mem::map_anonymous(room * size_of::<T>()).ok()?
        } else {
            0
        };
        Some(Array {
            inline: [const { MaybeUninit::uninit() }; INLINE],
            mapped,
            room,
            len: 0,
        })
    }

    fn start(&self) -> *const T {
        match self.mapped {
            0 => self.inline.as_ptr().cast(),
            mapped => mapped as *const T,
        }
    }

    fn push(&mut self, value: T) {
        assert!(self.len < self.room.max(INLINE), "made with room for all");
        // SAFETY: inside the array, which is writable.
        unsafe { self.start().cast_mut().add(self.len).write(value) };
        self.len += 1;
    }
}

impl<T> Drop for Array<T> {
    fn drop(&mut self) {
        for i in 0..self.len {
            // SAFETY: an element that was pushed, and is dropped once.
            unsafe { self.start().cast_mut().add(i).drop_in_place() };
        }
        if self.mapped != 0 {
            // SAFETY: mapped in `new`, and nobody has a reference into it.
            let _ = unsafe { mem::unmap(self.mapped, self.room * size_of::<T>()) };
        }
    }
}

/// A vector of buffers, as the kernel is to read it.
pub(crate) struct GivenVector {
    parts: Array<iovec>,
    lent: Array<Lent>,
    _held: Held,
    opened: Opened,
}

/// Parts that can be pinned at the same time.
const PINNED_PARTS: usize = 8;

/// Whether a vector, or a part of it, may lie in a mapping of ours. `false` also where the vector itself cannot be read.
pub(crate) fn vector_reaches(vector: *const iovec, count: usize) -> bool {
    crate::state::STANDING.load(Ordering::Relaxed) != 0
        && part_of_ours(vector, count).is_some_and(|(parts, _)| parts > 0)
}

/// How many parts of a vector lie in mappings of ours, and how many bytes they have. `None` where it cannot be read.
fn part_of_ours(vector: *const iovec, count: usize) -> Option<(usize, usize)> {
    if count > libc::UIO_MAXIOV as usize
        || !probe::readable(vector as usize, count * size_of::<iovec>())
    {
        return None;
    }
    // SAFETY: found to be there; the program's own vector.
    let parts = (0..count).map(|i| unsafe { vector.add(i).read_unaligned() });
    let ours = parts.filter(|p| reaches(&range(p.iov_base, p.iov_len)));
    Some(ours.fold((0, 0), |(n, bytes), p| (n + 1, bytes + p.iov_len)))
}

impl GivenVector {
    /// What to give the kernel for a vector that [reaches](vector_reaches) memory of ours. `None` where there is nothing better
    /// than the vector itself.
    pub(crate) fn new(vector: *const iovec, count: usize) -> Option<Self> {
        let _errno = Errno::keep();
        let (ours, bytes) = part_of_ours(vector, count)?;
        let pin = !state::foreign()
            && ours <= PINNED_PARTS
            && bytes <= PINNED_MAX.load(Ordering::Relaxed);
        if pin && let Some(given) = Self::made(vector, count, 0, true) {
            return Some(given);
        }
        // Too much to be pinned, or something of it is being handed back.
        Self::made(vector, count, ours, false)
    }

    /// With all parts pinned, or with up to `ours` of them at other addresses. `None` if that cannot be.
    fn made(vector: *const iovec, count: usize, ours: usize, pin: bool) -> Option<Self> {
        let mut given = GivenVector {
            parts: Array::new(count)?,
            lent: Array::new(ours)?,
            _held: Held::new(),
            opened: Opened::default(),
        };
        for i in 0..count {
            // SAFETY: found to be there by `part_of_ours`.
            let mut part = unsafe { vector.add(i).read_unaligned() };
            let range = range(part.iov_base, part.iov_len);
            if live::touches(&range) {
                open(&mut given.opened, &range);
            }
            if !standin::touches(&range) {
            } else if pin {
                given._held.hold(range);
                if !given._held.holds() {
                    return None;
                }
            } else if given.lent.len < ours
                && let Some(lent) = standin::lend(&range)
            {
                part.iov_base = lent.at() as *mut c_void;
                given.lent.push(lent);
            } else if !state::foreign() {
                let reason = "one system call needs more of it than can be pinned";
                state::lock().hand_back_over(&range, reason);
            }
            given.parts.push(part);
        }
        Some(given)
    }

    pub(crate) fn parts(&self) -> *const iovec {
        self.parts.start()
    }
}

impl Drop for GivenVector {
    fn drop(&mut self) {
        let errno = Errno::keep();
        self._held = Held::new();
        self.opened = Opened::default();
        drop(errno);
    }
}

/// Words that a call may take for pointers, with those into mappings of ours replaced by addresses that the kernel can read.
pub(crate) struct GivenWords<const N: usize> {
    pub(crate) words: [usize; N],
    _lent: [Option<Lent>; N],
    _opened: Opened,
}

/// As much as a call reads or writes through a pointer whose length is not known here: a path, a structure, a string of `execve`.
const SHORT: usize = 128 << 10;
/// As much as any such call does: a kernel module, a key.
const LONG: usize = 64 << 20;

impl<const N: usize> GivenWords<N> {
    /// What a call that failed with `EFAULT` is to be made again with: addresses that the kernel can read, or the same ones if a
    /// mapping was handed back since `hand_backs` was read, before the call. `None` if the failure is the program's own.
    pub(crate) fn again(
        words: [usize; N],
        hand_backs: u64,
        counter: &'static Counter,
    ) -> Option<Self> {
        if let Some(given) = Self::after_fault(words) {
            counter.add();
            return Some(given);
        }
        (standin::hand_backs() != hand_backs).then(|| GivenWords {
            words,
            _lent: [const { None }; N],
            _opened: Opened::default(),
        })
    }

    /// `None` if none of them points into a mapping of ours.
    pub(crate) fn new(words: [usize; N]) -> Option<Self> {
        Self::of(words, SHORT)
    }

    /// The same for a call that has failed with `EFAULT`: it may read more.
    pub(crate) fn after_fault(words: [usize; N]) -> Option<Self> {
        Self::of(words, LONG)
    }

    fn of(words: [usize; N], most: usize) -> Option<Self> {
        let _errno = Errno::keep();
        let mut given = GivenWords {
            words,
            _lent: [const { None }; N],
            _opened: Opened::default(),
        };
        let mut any = false;
        for (word, keep) in given.words.iter_mut().zip(&mut given._lent) {
            let byte = *word..word.saturating_add(1);
            // (The buffer may begin before the mapping. Then the call is expected to read little.)
            let most = if live::touches(&byte) { most } else { SHORT };
            let part = *word..word.saturating_add(most);
            if *word >= mem::PAGE && live::touches(&part) {
                open(&mut given._opened, &part);
                any = true;
            }
            if *word >= mem::PAGE
                && reaches(&byte)
                && let Some(lent) = standin::lend(&byte)
            {
                *word = lent.at();
                *keep = Some(lent);
                any = true;
            }
        }
        any.then_some(given)
    }
}
