//! Many reads in flight at once by one thread: io_uring.

#[cfg(not(faultless_sim))]
pub(crate) use kernels::Uring;
#[cfg(faultless_sim)]
pub(crate) use simulated::Uring;

#[cfg(not(faultless_sim))]
mod kernels {
    #![allow(
        unsafe_code,
        reason = "has the kernel read into memory given by address"
    )]

    use crate::base::ids::Addr;
    use faultless_sys::fdtable;
    use io_uring::{IoUring, opcode, types};
    use std::io;
    use std::mem::ManuallyDrop;
    use std::os::fd::AsRawFd;

    /// A ring, by which one thread at a time has the kernel do reads.
    pub(crate) struct Uring(ManuallyDrop<IoUring>);

    impl Uring {
        /// A ring for so many reads in flight.
        pub(crate) fn new(entries: u32) -> io::Result<Self> {
            let ring = IoUring::builder()
                .dontfork()
                .setup_coop_taskrun()
                .build(entries)
                // (Linux before 5.19 knows no such flag.)
                .or_else(|_| IoUring::builder().dontfork().build(entries))?;
            Ok(Uring(ManuallyDrop::new(ring)))
        }

        /// Whether its number still names a ring. A program that closes all descriptors closes this one too, and may have put
        /// another file there.
        pub(crate) fn is_open(&self) -> bool {
            fdtable::is_anonymous(self.0.as_raw_fd(), "anon_inode:[io_uring]")
        }

        /// Queues a read. `false` if the queue is full.
        ///
        /// # Safety
        ///
        /// `buf` must be writable for `len` bytes, and nobody else may use it, until [`reap`](Self::reap) has given `token` back: if
        /// that never happens, for ever.
        pub(crate) unsafe fn queue(
            &mut self,
            token: u64,
            number: i32,
            buf: Addr,
            len: usize,
            offset: u64,
        ) -> bool {
            let read = opcode::Read::new(types::Fd(number), buf.get() as *mut u8, len as u32);
            let entry = read.offset(offset).build().user_data(token);
            // SAFETY: the caller's promise.
            unsafe { self.0.submission().push(&entry).is_ok() }
        }

        /// Hands what is queued to the kernel, and waits until something has ended.
        pub(crate) fn submit_and_wait(&mut self) -> io::Result<()> {
            loop {
                match self.0.submit_and_wait(1) {
                    Ok(_) => return Ok(()),
                    // What has ended already makes room.
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                        faultless_sys::raw::sched_yield();
                    }
                    Err(e) => return Err(e),
                }
            }
        }

        /// The reads that have ended: the token of each, and how many bytes came, or the error.
        pub(crate) fn reap(&mut self, mut f: impl FnMut(u64, Result<usize, i32>)) {
            for entry in self.0.completion() {
                let result = entry.result();
                let got = usize::try_from(result).map_err(|_| -result);
                f(entry.user_data(), got);
            }
        }
    }

    impl Drop for Uring {
        fn drop(&mut self) {
            // What another file has by now is not to be closed.
            if self.is_open() {
                // SAFETY: not used any more.
                unsafe { ManuallyDrop::drop(&mut self.0) };
            }
        }
    }
}

/// In the simulator reads are done when they are waited for, one at a time, the last first.
#[cfg(faultless_sim)]
mod simulated {
    #![allow(unsafe_code, reason = "reads into memory given by address")]

    use crate::base::ids::Addr;
    use faultless_sys::file;
    use std::io;

    struct Read {
        token: u64,
        number: i32,
        buf: Addr,
        len: usize,
        offset: u64,
    }

    #[derive(Default)]
    pub(crate) struct Uring {
        queued: Vec<Read>,
        ended: Vec<(u64, Result<usize, i32>)>,
    }

    impl Uring {
        pub(crate) fn new(_entries: u32) -> io::Result<Self> {
            Ok(Uring::default())
        }

        pub(crate) fn is_open(&self) -> bool {
            true
        }

        pub(crate) unsafe fn queue(
            &mut self,
            token: u64,
            number: i32,
            buf: Addr,
            len: usize,
            offset: u64,
        ) -> bool {
            self.queued.push(Read {
                token,
                number,
                buf,
                len,
                offset,
            });
            true
        }

        pub(crate) fn submit_and_wait(&mut self) -> io::Result<()> {
            if let Some(read) = self.queued.pop() {
                // SAFETY: the promise of the caller of `queue`.
                let got =
                    unsafe { file::pread(read.number, read.buf.get(), read.len, read.offset) };
                self.ended.push((read.token, got.map_err(|e| e.0)));
            }
            Ok(())
        }

        pub(crate) fn reap(&mut self, mut f: impl FnMut(u64, Result<usize, i32>)) {
            self.ended.drain(..).for_each(|(token, got)| f(token, got));
        }
    }
}
