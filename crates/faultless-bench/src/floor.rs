//! What a miss costs that a signal serves, and nothing else: the bare handler. It reads the page, installs it, and returns. It has no
//! budget, evicts nothing, checks nothing, and ends the process where anything fails.

#![allow(
    unsafe_code,
    reason = "a signal handler, and memory that it installs pages in"
)]

use crate::contender::{Contender, Mapping, PageBuffer, Terms, open_direct};
use anyhow::{Context, bail};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::signal::{self, Action};
use faultless_sys::{file, raw, uffd};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

/// Where the region is, and the descriptors of its file and of its userfaultfd. There is one region at a time; a start of 0: none.
static START: AtomicUsize = AtomicUsize::new(0);
static LEN: AtomicUsize = AtomicUsize::new(0);
static SOURCE: AtomicI32 = AtomicI32::new(-1);
static UFFD: AtomicI32 = AtomicI32::new(-1);

thread_local! {
    /// The page that this thread's handler reads into; 0: there is none yet.
    static BUFFER: Cell<usize> = const { Cell::new(0) };
    /// Misses that this thread's handler has served since the counter was last added up.
    static SERVED: Cell<u64> = const { Cell::new(0) };
}

/// Variant 0 blocks every signal while the handler runs, as the engine's does; variant 1 changes no signal mask.
pub(crate) const VARIANTS: [usize; 2] = [0, 1];

/// How a variant is called in tables.
pub(crate) fn variant_name(variant: usize) -> &'static str {
    match variant {
        0 => "signals blocked",
        _ => "mask unchanged",
    }
}

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for the time of the handler.
    let addr = unsafe { (*info).si_addr() as usize };
    let (start, len) = (START.load(Ordering::Relaxed), LEN.load(Ordering::Relaxed));
    if addr.wrapping_sub(start) >= len || start == 0 {
        end(b"floor: SIGBUS at a foreign address\n");
    }
    let mut buffer = BUFFER.get();
    if buffer == 0 {
        buffer = mem::map_anonymous(PAGE).unwrap_or_else(|_| end(b"floor: no memory\n"));
        BUFFER.set(buffer);
    }
    let at = (addr - start) & !(PAGE - 1);
    let source = SOURCE.load(Ordering::Relaxed);
    // SAFETY: a page of this thread's own.
    let read = unsafe { file::pread(source, buffer, PAGE, at as u64) };
    if read != Ok(PAGE) {
        end(b"floor: cannot read the data file\n");
    }
    // SAFETY: a page of the registered region, which nobody writes to.
    let copied = unsafe {
        uffd::copy(
            UFFD.load(Ordering::Relaxed),
            start + at,
            buffer,
            PAGE,
            false,
        )
    };
    match copied.error.map(|e| e.0) {
        None | Some(libc::EEXIST) => {}
        // (The load runs again, and comes back.)
        Some(libc::EAGAIN) => {}
        Some(_) => end(b"floor: cannot install a page\n"),
    }
    SERVED.set(SERVED.get() + 1);
}

/// Says why, and ends the process. A load that cannot be served would fault for ever.
fn end(why: &[u8]) -> ! {
    // SAFETY: the bytes are valid; both calls may be made in a handler.
    unsafe {
        libc::write(2, why.as_ptr().cast(), why.len());
        libc::abort()
    }
}

/// A file behind the bare handler.
pub(crate) struct Floor {
    map: Mapping,
    former: Action,
    served: AtomicU64,
    _source: File,
    _uffd: OwnedFd,
}

impl Floor {
    pub(crate) fn open(terms: &Terms<'_>) -> anyhow::Result<Self> {
        let source = open_direct(terms.path)?;
        let len = terms.len as usize;
        let number = uffd::open(libc::O_CLOEXEC as u32 | uffd::USER_MODE_ONLY)?;
        // SAFETY: the kernel made it for us.
        let uffd = unsafe { OwnedFd::from_raw_fd(number) };
        uffd::enable(number, uffd::FEATURE_SIGBUS).context("userfaultfd with SIGBUS")?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses the range, which is ours to register.
        let start = unsafe { mem::map(0, len, libc::PROT_READ, flags, -1, 0)? };
        let map = Mapping { start, len };
        // SAFETY: our own mapping.
        unsafe { uffd::register(number, start, len).context("userfaultfd")? };
        let free = START.compare_exchange(0, start, Ordering::Relaxed, Ordering::Relaxed);
        if free.is_err() {
            bail!("a process has one bare handler");
        }
        LEN.store(len, Ordering::Relaxed);
        SOURCE.store(source.as_raw_fd(), Ordering::Relaxed);
        UFFD.store(number, Ordering::Relaxed);
        let mut action = Action::new(on_sigbus, signal::ALL);
        if terms.variant == 1 {
            action.mask = 0;
            action.flags |= libc::SA_NODEFER as usize;
        }
        // SAFETY: the handler touches what is its own only; the former action comes back when this is dropped, and no other
        // contender of this process reads meanwhile.
        let former = unsafe { signal::set_action(libc::SIGBUS, &action) }.context("SIGBUS")?;
        Ok(Floor {
            map,
            former,
            served: AtomicU64::new(0),
            _source: source,
            _uffd: uffd,
        })
    }
}

impl Contender for Floor {
    fn read(
        &self,
        number: u64,
        _: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        check(self.map.page(number));
        let served = SERVED.replace(0);
        if served > 0 {
            self.served.fetch_add(served, Ordering::Relaxed);
        }
        Ok(())
    }

    fn misses(&self) -> Option<u64> {
        Some(self.served.load(Ordering::Relaxed))
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        START.store(0, Ordering::Relaxed);
        // SAFETY: what was there before.
        if unsafe { signal::set_action(libc::SIGBUS, &self.former) }.is_err() {
            raw::sched_yield();
        }
    }
}
