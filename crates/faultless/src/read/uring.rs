//! One thread that has many reads in flight: io_uring.

use crate::base::ids::Addr;

#[cfg(not(faultless_sim))]
pub(crate) use kernels::Uring;
#[cfg(faultless_sim)]
pub(crate) use simulated::Uring;

/// A read of `len` bytes to `buf`, from `offset` of the file that the ring holds. The token says which one it is.
pub(crate) struct Read {
    pub(crate) token: u64,
    pub(crate) buf: Addr,
    pub(crate) len: usize,
    pub(crate) offset: u64,
}

#[cfg(not(faultless_sim))]
mod kernels {
    #![allow(
        unsafe_code,
        reason = "has the kernel read into memory given by address"
    )]

    use super::Read;
    use faultless_sys::file::FileId;
    use faultless_sys::{fdtable, file, raw};
    use io_uring::{IoUring, opcode, types};
    use std::io;
    use std::mem::ManuallyDrop;
    use std::os::fd::AsRawFd;

    /// A ring, by which one thread at a time has the kernel do reads.
    pub(crate) struct Uring {
        ring: ManuallyDrop<IoUring>,
        /// What its number names.
        id: FileId,
        /// What was queued since the kernel last took what is queued.
        queued: Vec<u64>,
        /// How often in a row the kernel had no memory.
        again: u32,
    }

    /// Naps of 1 ms while the kernel has no memory.
    const AGAIN_MAX: u32 = 10_000;

    impl Uring {
        /// A ring for so many reads in flight.
        pub(crate) fn new(entries: u32) -> io::Result<Self> {
            let ring = IoUring::builder()
                .dontfork()
                .setup_coop_taskrun()
                .build(entries)
                // (Linux before 5.19 knows no such flag.)
                .or_else(|_| IoUring::builder().dontfork().build(entries))?;
            let id = file::status(ring.as_raw_fd())?.id;
            // One place for a file, as yet empty.
            ring.submitter().register_files(&[-1])?;
            Ok(Uring {
                ring: ManuallyDrop::new(ring),
                id,
                queued: Vec::with_capacity(entries as usize),
                again: 0,
            })
        }

        /// Whether its number still names this ring (each has an inode of its own). A program that closes all descriptors closes this
        /// one too, and may have put another file there.
        pub(crate) fn is_open(&self) -> bool {
            let number = self.ring.as_raw_fd();
            // (Before Linux 5.16 they share one with other anonymous files, which their names tell apart where /proc is mounted.)
            file::status(number).is_ok_and(|st| st.id == self.id)
                && (fdtable::is_anonymous(number, "anon_inode:[io_uring]") || !has_proc())
        }

        /// Has reads done on the file that a descriptor names now, whatever becomes of the descriptor.
        pub(crate) fn hold(&mut self, number: i32) -> io::Result<()> {
            let held = self.ring.submitter().register_files_update(0, &[number])?;
            match held {
                1 => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
            }
        }

        /// Lets go of that file. No read may be in flight.
        pub(crate) fn release(&mut self) {
            // (It fails where the program has closed the ring: then the file goes with it.)
            let _ = self.ring.submitter().register_files_update(0, &[-1]);
        }

        /// Queues a read. `false` if the queue is full.
        ///
        /// # Safety
        ///
        /// Its memory must be writable, and no one else may use it, until [`reap`](Self::reap) has given its token back: if that never
        /// happens, for ever.
        pub(crate) unsafe fn queue(&mut self, read: Read) -> bool {
            let (to, len) = (read.buf.get() as *mut u8, read.len as u32);
            let entry = opcode::Read::new(types::Fixed(0), to, len);
            let entry = entry.offset(read.offset).build().user_data(read.token);
            // SAFETY: the caller's promise.
            let queued = unsafe { self.ring.submission().push(&entry).is_ok() };
            if queued {
                self.queued.push(read.token);
            }
            queued
        }

        /// Hands what is queued to the kernel, and waits until something has ended, or for a second.
        pub(crate) fn submit_and_wait(&mut self) -> io::Result<()> {
            let submitted = self.enter();
            let untaken = self.ring.submission().len();
            let taken = self.queued.len().saturating_sub(untaken);
            self.queued.drain(..taken);
            // The calls of a program that has closed the ring may go to a ring of its own.
            if taken == 0 && self.ring.completion().is_empty() && !self.is_open() {
                return Err(io::Error::other("the program closed its descriptor"));
            }
            match submitted {
                Ok(_) => self.again = 0,
                // What has ended already makes room; or there is no memory at this moment.
                Err(e)
                    if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN))
                        && self.again < AGAIN_MAX =>
                {
                    self.again += 1;
                    raw::nap(1_000_000);
                }
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ETIME)) => {}
                Err(e) => return Err(e),
            }
            Ok(())
        }

        fn enter(&mut self) -> io::Result<usize> {
            // (Linux before 5.11 has no bound for the wait.)
            if !self.ring.params().is_feature_ext_arg() {
                return self.ring.submit_and_wait(1);
            }
            let wait = types::Timespec::new().sec(1);
            let args = types::SubmitArgs::new().timespec(&wait);
            self.ring.submitter().submit_with_args(1, &args)
        }

        /// The reads that are queued and that the kernel will never be told of, since it takes no calls.
        pub(crate) fn never_told(&mut self, f: impl FnMut(u64)) {
            self.queued.drain(..).for_each(f);
        }

        /// Leaves the ring as it is, for ever: reads of it may yet end.
        pub(crate) fn leave(self) {
            std::mem::forget(self);
        }

        /// The reads that have ended: the token of each, and how many bytes came, or the error.
        pub(crate) fn reap(&mut self, mut f: impl FnMut(u64, Result<usize, i32>)) {
            for entry in self.ring.completion() {
                let result = entry.result();
                let got = usize::try_from(result).map_err(|_| -result);
                f(entry.user_data(), got);
            }
        }
    }

    fn has_proc() -> bool {
        std::path::Path::new("/proc/self/fd").exists()
    }

    impl Drop for Uring {
        fn drop(&mut self) {
            // What another file has by now is not to be closed.
            if self.is_open() {
                // SAFETY: not used any more.
                unsafe { ManuallyDrop::drop(&mut self.ring) };
            }
        }
    }
}

/// In the simulator reads are done when they are waited for, one at a time, the last first.
#[cfg(faultless_sim)]
mod simulated {
    #![allow(unsafe_code, reason = "reads into memory given by address")]

    use super::Read;
    use faultless_sys::file;
    use std::io;

    /// So many calls, then no more.
    const CALLS: u32 = 300;

    #[derive(Default)]
    pub(crate) struct Uring {
        number: i32,
        calls: u32,
        told: usize,
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

        pub(crate) fn hold(&mut self, number: i32) -> io::Result<()> {
            self.number = number;
            Ok(())
        }

        pub(crate) fn release(&mut self) {
            self.number = -1;
        }

        pub(crate) unsafe fn queue(&mut self, read: Read) -> bool {
            self.queued.push(read);
            true
        }

        pub(crate) fn submit_and_wait(&mut self) -> io::Result<()> {
            self.calls += 1;
            if self.calls <= CALLS {
                self.told = self.queued.len();
            }
            // (What the kernel was told of ends, whether it takes calls or not.)
            if self.told > 0 {
                self.told -= 1;
                let read = self.queued.remove(self.told);
                // SAFETY: the promise of the caller of `queue`.
                let got =
                    unsafe { file::pread(self.number, read.buf.get(), read.len, read.offset) };
                self.ended.push((read.token, got.map_err(|e| e.0)));
            }
            match self.calls <= CALLS {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::EPERM)),
            }
        }

        pub(crate) fn never_told(&mut self, mut f: impl FnMut(u64)) {
            let rest = self.queued.drain(self.told..);
            rest.for_each(|read| f(read.token));
        }

        pub(crate) fn leave(self) {}

        pub(crate) fn reap(&mut self, mut f: impl FnMut(u64, Result<usize, i32>)) {
            self.ended.drain(..).for_each(|(token, got)| f(token, got));
        }
    }
}
