//! Prefetches: what is wanted soon is read by other threads.

use crate::api::engine::let_go;
use crate::api::map::Map;
use crate::base::error::Error;
use crate::base::process;
use crate::read::progress::Progress;
use crate::space::pool_core::PoolCore;
use std::fmt;
use std::future::Future;
use std::ops::RangeBounds;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

impl Map {
    /// Asks for a range to be read soon, by other threads, and returns immediately. Parts for which there is no room are dropped (counted
    /// in [`Stats::prefetch_dropped`](crate::Stats::prefetch_dropped)). Many ranges that are asked for one after the other are read at
    /// the depth at which the device works best.
    ///
    /// A program that wants to know when that is done waits for the result, or awaits it; others ignore it.
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 1_000_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(path)?;
    /// # drop(file);
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = pool.map(&reader)?;
    /// let index = map.prefetch(..500_000)?;
    /// map.prefetch(500_000..)?;
    /// assert_eq!(index.wait().dropped, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Kernel`] if the worker threads cannot be started; [`Error::Forked`].
    pub fn prefetch(&self, range: impl RangeBounds<usize>) -> Result<Prefetching, Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        let progress = Progress::new(&self.pool.0.workers.wakers);
        if !bytes.is_empty() {
            self.backing.prefetch(&bytes, &self.pool, &progress)?;
        }
        Ok(Prefetching {
            progress,
            pool: self.backing.core().map(|core| Arc::downgrade(&core.pool)),
            pid: process::pid(),
        })
    }
}

/// A prefetch. Dropping this leaves it to itself.
///
/// It is over when each of its parts is in memory, is being read by another thread, or was dropped: because there was no room, because it
/// could not be read, or because the map is gone. (On the mmap backend it is over when the kernel was told, and of a live map when a thread
/// was: nothing says more.)
///
/// Two threads do not wait for it, and find what is not there yet among what was dropped: one in a forked child, where nobody reads it, and
/// one that reads a source of the same pool, since the threads that are to read it may wait for that source.
pub struct Prefetching {
    progress: Arc<Progress>,
    pool: Option<Weak<PoolCore>>,
    /// The process that asked.
    pid: u32,
}

/// What a prefetch came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prefetched {
    /// Bytes of whole units that are not in memory, because there was no room or they could not be read.
    pub dropped: u64,
}

impl Prefetching {
    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.progress.is_over()
    }

    /// Waits until it is over.
    pub fn wait(&self) -> Prefetched {
        self.progress.wait(|| self.is_in_vain());
        self.outcome()
    }

    /// Whether the calling thread must not wait for it.
    fn is_in_vain(&self) -> bool {
        if process::forked() || process::pid() != self.pid {
            return true;
        }
        let Some(pool) = &self.pool else {
            return false;
        };
        // (Nobody reads for a pool that is gone.)
        pool.upgrade().is_none_or(|pool| {
            let reads = pool.reads_sources();
            let_go(pool);
            reads
        })
    }

    fn outcome(&self) -> Prefetched {
        Prefetched {
            dropped: self.progress.missing(),
        }
    }
}

impl fmt::Debug for Prefetching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefetching")
            .field("is_over", &self.is_over())
            .finish_non_exhaustive()
    }
}

impl Future for Prefetching {
    type Output = Prefetched;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Prefetched> {
        let over = self.is_over() || self.is_in_vain();
        match over || self.progress.poll(context.waker()) {
            true => Poll::Ready(self.outcome()),
            false => Poll::Pending,
        }
    }
}
