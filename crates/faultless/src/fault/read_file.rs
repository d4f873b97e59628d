//! Reading a map's file, and making sure that what was read is the file's.

#![allow(unsafe_code, reason = "reads into raw buffers")]

use crate::base::clock;
use crate::base::ids::{Addr, FileAt, Nanos};
use crate::fault::install::{DESCRIPTOR_TRIES, SCARCE_MAX, another_descriptor};
use crate::fault::refusal::Refusal;
use crate::space::fds::Fd;
use crate::space::map_core::{MapCore, Reading};
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, file};

/// Naps of 1 ms for a source that says EAGAIN.
const AGAIN_MAX: u32 = 2_000;

/// Short reads that bring nothing new, before the file is believed to deliver no more.
const IN_VAIN_MAX: u32 = 64;

/// Whether what was just read through `number` came from the map's file, under its lease.
///
/// A number that the program closed may name another file by now. Under a lease one question answers both: of all
/// descriptors only those of leased maps hold one, and `fds` knows which map has which number. Without a lease, device
/// and inode are compared.
fn verify(core: &MapCore, fd: &Fd, number: i32) -> Result<(), Refusal> {
    let Reading::File { id, leased, .. } = &core.reading else {
        return Ok(());
    };
    if !*leased {
        return match file::status(number) {
            Ok(st) if st.id == *id => Ok(()),
            _ => Err(Refusal::Read(libc::EBADF)),
        };
    }
    // While the lease is being broken F_GETLEASE no longer tells it apart from one that is gone; the kernel's list does.
    let held = match file::holds_read_lease(number) {
        true => Ok(true),
        false => file::lease_still_listed(number),
    };
    // A program that closes all descriptors closes also the one by which the list is read.
    let held = held.map_err(|_| Refusal::Read(libc::EBADF))?;
    // Numbers too large to be remembered are compared as files.
    let ours = fd
        .owns(number)
        .unwrap_or_else(|| file::status(number).is_ok_and(|st| st.id == *id));
    match (held, ours) {
        (true, true) => Ok(()),
        (true, false) => Err(Refusal::Read(libc::EBADF)),
        // Gone for good if this is our descriptor; otherwise the real one may still have it.
        (false, _) if file::status(number).is_ok_and(|st| st.id == *id) => {
            Err(Refusal::LeaseBroken)
        }
        (false, _) => Err(Refusal::Read(libc::EBADF)),
    }
}

/// Reads `len` bytes of the map's file, fewer only at its end, and makes sure that they are the file's.
pub(crate) fn read_file(
    core: &MapCore,
    fd: &Fd,
    buf: Addr,
    len: usize,
    offset: FileAt,
) -> Result<usize, Refusal> {
    let mut number = fd.get();
    let mut last = None;
    let mut patience = SCARCE_MAX;
    // Once with the descriptor as it is, once with one that the keeper kept; more often while the program closes descriptors.
    for _ in 0..DESCRIPTOR_TRIES {
        let noted = Fd::noted(number);
        let read = read_whole(number, buf, len, data_from(core, offset), offset);
        let verified = verify(core, fd, number);
        if noted.is_none() || Fd::noted(number) != noted {
            // Meanwhile it may have named another file.
            last = Some(Refusal::Read(libc::EBADF));
            continue;
        }
        match (read, verified) {
            (Ok(got), Ok(())) => return whole_or_end(core, number, got, len, offset),
            (Err(e), Ok(())) if e != libc::EBADF => return Err(Refusal::Read(e)),
            // The right file without the lease: ours, or one of the program's own under our number. The keeper knows.
            // (It is asked before and after: meanwhile the number may have come to name another open file, or ours again.)
            (_, Err(Refusal::LeaseBroken))
                if fd.is_kept_open_file(number)
                    && verify(core, fd, number) == Err(Refusal::LeaseBroken)
                    && fd.is_kept_open_file(number) =>
            {
                return Err(Refusal::LeaseBroken);
            }
            (_, Err(why)) => last = Some(why),
            _ => last = Some(Refusal::Read(libc::EBADF)),
        }
        // A foreign or closed number, or a lease that this number does not hold: ask for the real one.
        number = another_descriptor(core, fd, number, &mut patience);
    }
    Err(last.unwrap_or(Refusal::Read(libc::EBADF)))
}

/// A descriptor's number as it is before a read that another thread, or the kernel, does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) number: i32,
    noted: Option<u32>,
}

impl Seen {
    pub(crate) fn of(fd: &Fd) -> Self {
        let number = fd.get();
        Seen {
            number,
            noted: Fd::noted(number),
        }
    }

    /// Whether reads that ended before now were of the map's file, under its lease. (If not, [`file_piece`] finds out why.)
    pub(crate) fn was_right(self, core: &MapCore, fd: &Fd) -> bool {
        self.noted.is_some()
            && verify(core, fd, self.number).is_ok()
            && Fd::noted(self.number) == self.noted
    }
}

/// Whether `got` bytes are all that a read of `len` from `offset` on is to bring.
pub(crate) fn is_whole(core: &MapCore, got: usize, len: usize, offset: FileAt) -> bool {
    got as u64 >= data_from(core, offset).min(len as u64)
}

/// Takes a short read for the end of the file only if the file says so: zeros in the place of bytes that a storage did
/// not deliver would be wrong bytes.
fn whole_or_end(
    core: &MapCore,
    number: i32,
    got: usize,
    len: usize,
    offset: FileAt,
) -> Result<usize, Refusal> {
    if is_whole(core, got, len, offset) {
        return Ok(got);
    }
    let ours = |st: &file::Status| match &core.reading {
        Reading::File { id, .. } => st.id == *id,
        Reading::Source { .. } => true,
    };
    match file::status(number) {
        // The number was closed since, and names another file.
        Ok(st) if !ours(&st) => Err(Refusal::Read(libc::EBADF)),
        Ok(st) if st.len <= (offset + got as u64).get() => Ok(got),
        Ok(_) => Err(Refusal::Read(libc::EIO)),
        Err(Errno(e)) => Err(Refusal::Read(e)),
    }
}

/// Bytes that the map has from an offset of its file on.
fn data_from(core: &MapCore, offset: FileAt) -> u64 {
    let end = core.base + core.data_len;
    end.max(offset) - offset
}

/// `pread` until `len` bytes are there or the file ends. Where it is expected to have `data` bytes, it ends before them only if
/// nothing new comes again and again.
fn read_whole(number: i32, buf: Addr, len: usize, data: u64, offset: FileAt) -> Result<usize, i32> {
    let mut got = 0;
    let (mut again, mut in_vain) = (0, 0);
    while got < len {
        // A direct read continues only at a page: after an odd count, the last page is read again.
        let from = got & !(PAGE - 1);
        let (to, at) = ((buf + from).get(), (offset + from as u64).get());
        // SAFETY: the staging buffer is on loan to this thread and `from <= got < len`, its length at most.
        match unsafe { patient_pread(number, to, len - from, at, &mut again) } {
            Ok(0) => return Ok(got),
            Ok(n) if from + n <= got => {
                in_vain += 1;
                if got as u64 >= data || in_vain == IN_VAIN_MAX {
                    return Ok(got);
                }
            }
            Ok(n) => got = from + n,
            Err(Errno(e)) => return Err(e),
        }
    }
    Ok(got)
}

/// `pread`, again after a signal, and for a while if the file says EAGAIN. `again` counts the naps.
///
/// # Safety
///
/// As for [`file::pread`]: `len` bytes from `to` on are the caller's to write to.
pub(crate) unsafe fn patient_pread(
    number: i32,
    to: usize,
    len: usize,
    at: u64,
    again: &mut u32,
) -> Result<usize, Errno> {
    loop {
        // SAFETY: the caller's promise.
        match unsafe { file::pread(number, to, len, at) } {
            Err(Errno(libc::EINTR)) => {}
            Err(Errno(libc::EAGAIN)) if *again < AGAIN_MAX => {
                *again += 1;
                clock::nap(Nanos::from_millis(1));
            }
            done => return done,
        }
    }
}
