//! Advice on many ranges: one system call takes 1,024, and `mmap_lock` once. Behind somebody who holds that lock for long,
//! what one call can do in a turn is too little, so several threads queue up together and all get their turn at once.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::primitive::mpsc;
use crate::base::thread::{Thread, block_signals};
use faultless_sys::mem::BATCH_MAX;
use faultless_sys::mem::IoVec;
use faultless_sys::{Errno, mem};
use std::collections::VecDeque;
use std::ffi::CStr;
use std::io;

/// Threads that help.
const HELPERS: usize = 15;

struct Work {
    ranges: Vec<IoVec>,
    advice: i32,
}

/// Asks for a thread that shares the evictor's descriptors, and returns immediately. The thread or the error comes through the channel.
/// (One thread of the engine starts all threads that no thread of the program starts.)
pub(crate) type Spawn =
    fn(&'static CStr, Box<dyn FnOnce() + Send + 'static>, mpsc::Sender<io::Result<Thread>>);

/// The threads that give the advice: the evictor's, and helpers once it was held up.
pub(super) struct Crew {
    spawn: Spawn,
    /// Names this process to `process_madvise`; `None` where the kernel will not advise a process on itself.
    pidfd: Option<i32>,
    helpers: Vec<(mpsc::Sender<Work>, Thread)>,
    /// Those that are being started, in order, and what came of the first of them.
    coming: VecDeque<mpsc::Sender<Work>>,
    start: mpsc::Sender<io::Result<Thread>>,
    started: mpsc::Receiver<io::Result<Thread>>,
    told: mpsc::Sender<()>,
    done: mpsc::Receiver<()>,
}

impl Crew {
    pub(super) fn new(pidfd: Option<i32>, spawn: Spawn) -> Self {
        let (told, done) = mpsc::channel();
        let (start, started) = mpsc::channel();
        Crew {
            spawn,
            pidfd,
            helpers: Vec::new(),
            coming: VecDeque::new(),
            start,
            started,
            told,
            done,
        }
    }

    /// Has the helpers started that do not run yet. They help from a later call on.
    pub(super) fn call_helpers(&mut self) {
        while let Some(started) = self.started.try_recv() {
            let give = self.coming.pop_front();
            if let (Ok(thread), Some(give)) = (started, give) {
                self.helpers.push((give, thread));
            }
        }
        while self.pidfd.is_some() && self.helpers.len() + self.coming.len() < HELPERS {
            let (give, take) = mpsc::channel::<Work>();
            let (pidfd, told) = (self.pidfd, self.told.clone());
            let help = move || {
                block_signals();
                for work in take {
                    advise(pidfd, &work.ranges, work.advice);
                    let _ = told.send(());
                }
            };
            self.coming.push_back(give);
            (self.spawn)(c"faultless-evict", Box::new(help), self.start.clone());
        }
    }

    fn hands(&self) -> usize {
        1 + self.helpers.len()
    }

    /// The most ranges to choose for one piece of advice. It leaves a quarter of the helpers free for a second piece.
    pub(super) fn capacity(&self) -> usize {
        BATCH_MAX * (self.hands() - self.hands() / 4)
    }

    /// Most ranges with a second piece of advice, beside so many with the first.
    pub(super) fn capacity_beside(&self, ranges: usize) -> usize {
        let taken = ranges.div_ceil(BATCH_MAX);
        BATCH_MAX * self.hands().saturating_sub(taken).max(1)
    }

    /// Gives each piece of advice on its ranges.
    ///
    /// # Safety
    ///
    /// The ranges must be the caller's, and what the advice does to them must be right.
    pub(super) unsafe fn advise(&self, all: &[(&[IoVec], i32)]) {
        let mut own = Vec::new();
        let mut given = 0;
        let chunks = all
            .iter()
            .flat_map(|&(ranges, advice)| ranges.chunks(BATCH_MAX).map(move |c| (c, advice)));
        for (i, (chunk, advice)) in chunks.enumerate() {
            let helper = i.checked_sub(1).and_then(|i| self.helpers.get(i));
            let work = || Work {
                ranges: chunk.to_vec(),
                advice,
            };
            match helper.map(|(give, _)| give.send(work())) {
                Some(Ok(())) => given += 1,
                _ => own.push((chunk, advice)),
            }
        }
        for (chunk, advice) in own {
            advise(self.pidfd, chunk, advice);
        }
        for _ in 0..given {
            let _ = self.done.recv();
        }
    }

    /// Ends the helpers, those included that are still being started. (A pool that goes needs the keeper, which starts them, in any case.)
    pub(super) fn end(self) {
        for (give, handle) in self.helpers {
            drop(give);
            handle.join();
        }
        drop(self.coming);
        drop(self.start);
        while let Ok(started) = self.started.recv() {
            if let Ok(thread) = started {
                thread.join();
            }
        }
        if let Some(fd) = self.pidfd {
            // SAFETY: given to `new` to be closed here.
            unsafe { faultless_sys::file::close(fd) };
        }
    }
}

/// For [`Crew::advise`], whose caller answers for the ranges.
fn advise(pidfd: Option<i32>, ranges: &[IoVec], advice: i32) {
    let mut rest = ranges;
    while !rest.is_empty() {
        if let Some(pidfd) = pidfd {
            // SAFETY: see above.
            match unsafe { mem::madvise_batch(pidfd, rest, advice) } {
                Ok(mut bytes) => {
                    while let Some(first) = rest.first().filter(|r| r.len <= bytes) {
                        bytes -= first.len;
                        rest = &rest[1..];
                    }
                    if rest.is_empty() {
                        return;
                    }
                }
                Err(Errno(libc::EINTR | libc::EAGAIN)) => continue,
                Err(_) => {}
            }
        }
        // One by one: no batches here, or the first of the rest was refused.
        let Some((first, others)) = rest.split_first() else {
            return;
        };
        // SAFETY: see above.
        unsafe {
            match advice {
                libc::MADV_DONTNEED => _ = mem::discard(first.addr, first.len),
                _ => _ = mem::madvise(first.addr, first.len, advice),
            }
        }
        rest = others;
    }
}
