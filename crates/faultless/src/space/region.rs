//! Reserved address space: the range in which a map lies.

#![allow(unsafe_code, reason = "reserves and replaces address space")]

use crate::space::registry::GRANULE;
use faultless_sys::mem;

/// The kernel's mapping that lay where a region lies now, of the file with the number in the caller's table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Former {
    pub(crate) number: i32,
    pub(crate) flags: i32,
    pub(crate) offset: u64,
    pub(crate) advice: i32,
}

/// A range of address space that begins at a granule. Dropping it unmaps it, or puts back what it replaced.
pub(crate) struct Region {
    pub(crate) start: usize,
    pub(crate) len: usize,
    former: Option<Former>,
}

impl Former {
    /// Puts it back.
    ///
    /// # Safety
    ///
    /// The range is the one where it lay.
    unsafe fn put_back(&self, start: usize, len: usize) -> Result<(), faultless_sys::Errno> {
        let flags = self.flags | libc::MAP_FIXED;
        let map = || {
            // SAFETY: the caller's promise.
            unsafe { mem::map(start, len, libc::PROT_READ, flags, self.number, self.offset) }
        };
        map().or_else(|_| map())?;
        if self.advice != libc::MADV_NORMAL {
            // SAFETY: mapped just now; this advice changes no contents.
            let _ = unsafe { mem::madvise(start, len, self.advice) };
        }
        Ok(())
    }
}

impl Region {
    /// Where the kernel finds room.
    pub(crate) fn anywhere(len: usize) -> std::io::Result<Self> {
        // Without access until it is armed: under mlockall the kernel would fill it with zeros at once.
        let raw = mem::map_reserved(len + GRANULE)?;
        let start = raw.next_multiple_of(GRANULE);
        // SAFETY: the parts before and behind the aligned range are ours, and nobody knows them.
        unsafe {
            if start > raw {
                let _ = mem::unmap(raw, start - raw);
            }
            let end = raw + len + GRANULE;
            if end > start + len {
                let _ = mem::unmap(start + len, end - start - len);
            }
        }
        Self::prepare(start, len)
    }

    /// At `place`, if that is not 0, begins a granule, and is free; otherwise anywhere.
    pub(crate) fn exact(len: usize, place: usize) -> std::io::Result<Self> {
        if place != 0 && place.is_multiple_of(GRANULE) {
            let flags = libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_NORESERVE
                | mem::MAP_FIXED_NOREPLACE;
            // SAFETY: replaces nothing.
            if let Ok(at) = unsafe { mem::map(place, len, libc::PROT_NONE, flags, -1, 0) } {
                if at == place && mem::unlock(at, len).is_ok() {
                    return Self::prepare(at, len);
                }
                // SAFETY: mapped just now, shown to nobody.
                let _ = unsafe { mem::unmap(at, len) };
            }
        }
        Self::anywhere(len)
    }

    /// In the place of a mapping of the kernel's, which nobody touches meanwhile.
    pub(crate) fn over(place: usize, len: usize, former: Former) -> std::io::Result<Self> {
        if place == 0 || !place.is_multiple_of(GRANULE) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // Before anything is replaced: a call that fails may have unmapped what was there.
        let region = Region {
            start: place,
            len,
            former: Some(former),
        };
        // SAFETY: the caller of `StandIn::new` vouches that a mapping of the same bytes lies there, and that no thread uses it
        // before the stand-in is complete.
        unsafe { mem::map(place, len, libc::PROT_NONE, flags, -1, 0)? };
        mem::unlock(place, len)?;
        region.advise()?;
        Ok(region)
    }

    fn prepare(start: usize, len: usize) -> std::io::Result<Self> {
        let region = Region {
            start,
            len,
            former: None,
        };
        region.advise()?;
        Ok(region)
    }

    fn advise(&self) -> std::io::Result<()> {
        let Region { start, len, .. } = *self;
        // SAFETY: ours; no contents yet.
        unsafe {
            mem::madvise(start, len, libc::MADV_DONTFORK)?;
            mem::madvise(start, len, libc::MADV_DONTDUMP)?;
            let _ = mem::madvise(start, len, libc::MADV_NOHUGEPAGE);
        }
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: ours; a Region is forgotten once it became a map. What comes back holds the bytes that were there before.
        let _ = unsafe {
            match self.former {
                Some(former) => former.put_back(self.start, self.len),
                None => mem::unmap(self.start, self.len),
            }
        };
    }
}
