//! Lending system calls another address for the bytes of a stand-in.

#![allow(unsafe_code, reason = "makes mappings that system calls read")]

use crate::base::ids::Addr;
use crate::base::primitive::{AtomicUsize, Ordering};
use crate::space::alias::{Alias, ORPHAN, free};
use crate::space::map_core::{KernelMapping, MapCore, Reading};
use crate::space::registry;
use faultless_sys::{mem, signal};
use std::ops::Range;

impl Alias {
    fn make(core: &MapCore, kernel: &KernelMapping) -> Option<&'static Alias> {
        let Reading::File { fd, id, .. } = &core.reading else {
            return None;
        };
        let number = fd.current(*id).ok()?;
        let len = core.region_len;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let base = core.base.get();
        let start = mem::map_aside(len, libc::PROT_READ, flags, number, base).ok()?;
        // SAFETY: mapped just now; this advice changes no contents. (A child has its own mappings.)
        unsafe {
            let _ = mem::madvise(start, len, libc::MADV_DONTFORK);
            let _ = mem::madvise(start, len, kernel.advice.load(Ordering::Relaxed));
        }
        // Not from the heap: the system call may come from a handler that has interrupted the allocator.
        let Ok(header) = mem::map_anonymous(mem::PAGE) else {
            // SAFETY: mapped above, shown to nobody.
            let _ = unsafe { mem::unmap(start, len) };
            return None;
        };
        let made = header as *mut Alias;
        // SAFETY: a page of our own, aligned and large enough.
        unsafe {
            made.write(Alias {
                start,
                len,
                users: AtomicUsize::new(0),
            });
        }
        let null = std::ptr::null_mut();
        match kernel
            .alias
            .compare_exchange(null, made, Ordering::AcqRel, Ordering::Acquire)
        {
            // SAFETY: made above; it is freed by the last that uses it, after the map is gone.
            Ok(_) => Some(unsafe { &*made }),
            Err(others) => {
                // SAFETY: made above and shown to nobody; the other one lives as long as the map at least.
                unsafe {
                    free(made);
                    Some(&*others)
                }
            }
        }
    }
}

/// An address for a system call to read from, until this is dropped.
#[derive(Debug)]
pub struct Lent {
    alias: *mut Alias,
    at: usize,
}

impl Lent {
    /// Where the kernel reads the same bytes.
    pub fn at(&self) -> usize {
        self.at
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: it is not freed while a user counts.
        let users = unsafe { &(*self.alias).users };
        if users.fetch_sub(1, Ordering::AcqRel) == ORPHAN | 1 {
            // SAFETY: the map is gone, and this was the last user.
            unsafe { free(self.alias) };
        }
    }
}

/// Another address for the bytes of a range, if all of it lies in one stand-in.
pub fn lend(range: &Range<usize>) -> Option<Lent> {
    let _no_handler_here = signal::Blocked::all();
    let core = registry::find(range.start)?;
    let kernel = core.stands_for.as_ref()?;
    if !core.live.covers(range.start, range.end - range.start) {
        return None;
    }
    let known = kernel.alias.load(Ordering::Acquire);
    // SAFETY: null, or an alias that lives at least as long as the map, in which this thread is.
    let alias = match unsafe { known.as_ref() } {
        Some(alias) => alias,
        None => Alias::make(&core, kernel)?,
    };
    alias.users.fetch_add(1, Ordering::AcqRel);
    Some(Lent {
        alias: std::ptr::from_ref(alias).cast_mut(),
        at: alias.start + (Addr::new(range.start) - core.start),
    })
}
