//! Contenders that have many reads in flight for each thread: a raw loop of io_uring, and this project's batches and futures.

#![allow(unsafe_code, reason = "has the kernel read into buffers by address")]

use crate::contender::{Contender, PageBuffer, Terms, open_direct};
use anyhow::{Context as _, ensure};
use faultless::Map;
use faultless_sys::mem::PAGE;
use io_uring::{IoUring, opcode, types};
use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

/// A thread's ring, and a page for each of its reads.
struct Ring {
    ring: IoUring,
    pages: Vec<Box<PageBuffer>>,
}

thread_local! {
    static RING: RefCell<Option<Ring>> = const { RefCell::new(None) };
}

/// `io_uring` as a careful program would use it: direct reads into pages of its own, submitted and reaped together.
pub(crate) struct Uring {
    file: File,
    depth: usize,
}

impl Uring {
    pub(crate) fn open(terms: &Terms<'_>) -> anyhow::Result<Self> {
        // (Whether it is permitted, is found out here.)
        IoUring::new(terms.depth as u32).context("io_uring_setup")?;
        Ok(Uring {
            file: open_direct(terms.path)?,
            depth: terms.depth,
        })
    }

    fn read_into(&self, ring: &mut Ring, numbers: &[u64]) -> anyhow::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        for (i, (number, page)) in numbers.iter().zip(&mut ring.pages).enumerate() {
            let read = opcode::Read::new(fd, page.as_mut_ptr(), PAGE as u32);
            let entry = read.offset(number * PAGE as u64).build();
            let entry = entry.user_data(i as u64);
            // SAFETY: each read has a page of its own, and all have ended before this returns.
            unsafe { ring.ring.submission().push(&entry) }.context("the queue is full")?;
        }
        ring.ring.submit_and_wait(numbers.len())?;
        let mut ended = 0;
        for entry in ring.ring.completion() {
            ensure!(
                entry.result() == PAGE as i32,
                "a read returned {}",
                entry.result()
            );
            ended += 1;
        }
        ensure!(ended == numbers.len(), "a read has not ended");
        Ok(())
    }
}

impl Contender for Uring {
    fn read(
        &self,
        number: u64,
        _: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        self.read_many(&[number], &mut |_, bytes| check(bytes))
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn read_many(&self, numbers: &[u64], check: &mut dyn FnMut(u64, &[u8])) -> anyhow::Result<()> {
        RING.with_borrow_mut(|ring| {
            let ring = match ring {
                Some(ring) => ring,
                none => none.insert(Ring {
                    ring: IoUring::new(self.depth as u32)?,
                    pages: (0..self.depth).map(|_| PageBuffer::new()).collect(),
                }),
            };
            self.read_into(ring, numbers)?;
            for (&number, page) in numbers.iter().zip(&ring.pages) {
                check(number, page.bytes());
            }
            Ok(())
        })
    }
}

fn pages(numbers: &[u64]) -> Vec<Range<usize>> {
    let range = |&number: &u64| {
        let at = number as usize * PAGE;
        at..at + PAGE
    };
    numbers.iter().map(range).collect()
}

/// Reads pages by [`Map::load_many`].
pub(crate) fn load_many(
    map: &Map,
    numbers: &[u64],
    check: &mut dyn FnMut(u64, &[u8]),
) -> anyhow::Result<()> {
    let loaded = map.load_many(&pages(numbers));
    for (bytes, &number) in loaded.into_iter().zip(numbers) {
        check(number, bytes?);
    }
    Ok(())
}

/// Wakes the thread that made it.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Reads pages by [`Map::load_async`], with all futures in flight.
pub(crate) fn load_async(
    map: &Map,
    numbers: &[u64],
    check: &mut dyn FnMut(u64, &[u8]),
) -> anyhow::Result<()> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut waiting: Vec<_> = pages(numbers)
        .into_iter()
        .zip(numbers)
        .map(|(range, &number)| (number, Box::pin(map.load_async(range))))
        .collect();
    loop {
        let mut failed = None;
        waiting.retain_mut(|(number, future)| {
            match Pin::as_mut(future).poll(&mut context) {
                Poll::Pending => return true,
                Poll::Ready(Ok(bytes)) => check(*number, bytes),
                Poll::Ready(Err(e)) => failed = Some(e),
            }
            false
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        if waiting.is_empty() {
            return Ok(());
        }
        std::thread::park();
    }
}
