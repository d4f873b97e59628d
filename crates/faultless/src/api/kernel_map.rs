//! A map that the engine does not serve: the kernel's mapping, perhaps with guard markers, or a copy in memory.

use crate::api::advice::GuardMarkers;
use crate::api::live::{self, Live, Support, Wanted};
use crate::base::error::Error;
use crate::base::ids::Unit;
use crate::base::process;
use crate::base::stats::Stats;
use crate::coherence::mmap::Mmap;
use crate::coherence::{fork, keeper};
use crate::guards::{self, sweeper};
use std::ops::{Deref, Range};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A map that the engine does not serve.
#[derive(Debug)]
pub(crate) struct KernelMap {
    /// Misses of plain loads are told by markers.
    markers: Option<Live>,
    mmap: Mmap,
}

impl Deref for KernelMap {
    type Target = Mmap;

    fn deref(&self) -> &Mmap {
        &self.mmap
    }
}

impl KernelMap {
    /// One whose misses are the kernel's affair.
    pub(crate) fn plain(mmap: Mmap) -> Arc<Self> {
        let markers = None;
        Arc::new(KernelMap { markers, mmap })
    }

    /// A live one, with markers if they are wanted and possible.
    ///
    /// # Safety
    ///
    /// `mmap` was made just now, of `file`.
    #[allow(unsafe_code, reason = "vouches for what lies in the mapping")]
    pub(crate) unsafe fn live(mmap: Mmap, file: BorrowedFd<'_>, when: GuardMarkers) -> Arc<Self> {
        let wanted = match when {
            GuardMarkers::Never => false,
            GuardMarkers::WhereFree => live::support() == Ok(Support::Free),
            GuardMarkers::WherePossible => live::support().is_ok(),
        };
        // SAFETY: the caller's promise is the same.
        let markers = wanted.then(|| unsafe { begin(&mmap, file) }).flatten();
        Arc::new(KernelMap { markers, mmap })
    }

    pub(crate) fn has_markers(&self) -> bool {
        self.markers.is_some()
    }

    /// The addresses of some bytes of the region.
    fn addresses(&self, bytes: &Range<usize>) -> Range<usize> {
        self.mmap.start + bytes.start..self.mmap.start + bytes.end
    }

    /// The markers, in the process that has installed them.
    fn own_markers(&self) -> Option<&Live> {
        let own = !process::forked() && process::pid() == self.mmap.pid;
        self.markers.as_ref().filter(|_| own)
    }

    /// Makes a range resident, without the signal that the touch would be.
    ///
    /// # Errors
    ///
    /// As [`Mmap::populate`].
    pub(crate) fn populate(&self, bytes: &Range<usize>) -> Result<(), Error> {
        self.mmap.populate(bytes)?;
        if let Some(live) = self.own_markers() {
            live.open(&self.addresses(bytes));
        }
        Ok(())
    }

    /// Keeps markers out of a range, for system calls, until [`let_go`](Self::let_go) of what is returned.
    pub(crate) fn keep_open(&self, bytes: &Range<usize>) -> Range<Unit> {
        let kept = self.own_markers().map_or(0, |live| {
            live.keep_open(&self.addresses(bytes));
            1
        });
        Unit::new(0)..Unit::new(kept)
    }

    pub(crate) fn let_go(&self, kept: &Range<Unit>) {
        if let Some(live) = self.own_markers()
            && kept.start < kept.end
        {
            live.let_go();
        }
    }

    /// Says how all of it will be read (`MADV_…`).
    pub(crate) fn will_be_read(&self, advice: i32) {
        self.mmap.will_be_read(advice);
        if let Some(live) = self.own_markers() {
            live.advise(advice);
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let misses = self.markers.as_ref().map_or(0, |l| l.counts().misses);
        Stats {
            misses,
            ..Stats::default()
        }
    }
}

/// Installs the first markers. `None` where that cannot be: then the kernel serves all.
///
/// # Safety
///
/// `mmap` was made just now, of `file`.
#[allow(unsafe_code, reason = "vouches for what lies in the mapping")]
unsafe fn begin(mmap: &Mmap, file: BorrowedFd<'_>) -> Option<Live> {
    fork::watch();
    guards::fork::watch();
    keeper::start().ok()?;
    sweeper::one_more().ok()?;
    let wanted = Wanted {
        file,
        at: mmap.start,
        len: mmap.len,
        writable: false,
        offset: mmap.base(),
        flags: libc::MAP_SHARED,
        // Our descriptor is for reading.
        may_be_written: false,
        advice: libc::MADV_NORMAL,
    };
    // SAFETY: a shared mapping for reading, which holds nothing but the file's bytes; the threads run, and forks are watched.
    let live = unsafe { Live::new(&wanted) };
    if live.is_err() {
        sweeper::one_less();
    }
    live.ok()
}

impl Drop for KernelMap {
    fn drop(&mut self) {
        // (In a forked child, they are its parent's.)
        if self.own_markers().is_some()
            && let Some(live) = self.markers.take()
        {
            // (The mapping goes with the next field.)
            let _ = live.unmap_with::<()>(|| Ok(0));
            sweeper::one_less();
        }
    }
}
