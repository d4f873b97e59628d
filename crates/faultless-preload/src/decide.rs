//! Which mappings are taken over, and why others are not.

#![allow(unsafe_code, reason = "borrows the program's descriptor")]

use crate::state::{self, Entry, STANDING, State};
use crate::trap;
use faultless::standin::{StandIn, Wanted};
use faultless::{Error, LeaseRefusal, Reads};
use faultless_run::{Reads as Wish, Settings, matches};
use faultless_sys::file::{self, Status};
use faultless_sys::mem::PAGE;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A call of mmap for reading a file, with a length of whole pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) addr: usize,
    pub(crate) len: usize,
    pub(crate) flags: i32,
    pub(crate) fd: i32,
    pub(crate) offset: u64,
}

/// File systems whose files are memory already.
const IN_MEMORY: [u64; 3] = [
    0x0102_1994, // tmpfs, and memfd
    0x8584_58F6, // ramfs
    0x9584_58F6, // hugetlbfs
];

/// Flags of mmap that concern the making of a mapping, or nothing at all.
const IDLE: i32 =
    libc::MAP_POPULATE | libc::MAP_NONBLOCK | libc::MAP_DENYWRITE | libc::MAP_EXECUTABLE;
/// Flags that a mapping may have and still be taken over.
const ALLOWED: i32 = libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_NORESERVE | IDLE;

/// Takes a mapping over, if it should be and can be. Returns its address.
pub(crate) fn take(call: Call) -> Option<usize> {
    let settings = state::settings()?;
    if !state::STARTED.load(Ordering::Acquire) || state::foreign() {
        return None;
    }
    // What the kernel refuses, it refuses itself.
    let status = file::status(call.fd).ok()?;
    if !call.offset.is_multiple_of(PAGE as u64) || status.mode & libc::S_IFMT != libc::S_IFREG {
        return None;
    }
    let access = file::open_flags(call.fd).ok()?;
    if access & libc::O_ACCMODE == libc::O_WRONLY || access & libc::O_PATH != 0 {
        return None;
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", call.fd)).unwrap_or_default();
    let trusted = matches(&settings.trust, &path);
    // Before the lock: this asks the dynamic linker, which may be at work on behalf of a thread that waits for us.
    let ring = uses_io_uring();

    let mut state = state::lock();
    state::LOOKED.store(true, Ordering::Relaxed);
    if let Err(why) = permitted(
        &state, settings, &call, &status, access, &path, trusted, ring,
    ) {
        state.leave(why, call.len, &path);
        return None;
    }
    match stand_in(&mut state, settings, &call, &path, trusted) {
        Ok(at) => at,
        Err(why) => {
            state.leave(why, call.len, &path);
            None
        }
    }
}

/// What can be known before anything is tried.
#[allow(clippy::too_many_arguments, reason = "what is known, in one place")]
fn permitted(
    state: &State,
    settings: &Settings,
    call: &Call,
    status: &Status,
    access: i32,
    path: &Path,
    trusted: bool,
    ring: bool,
) -> Result<(), String> {
    let no = |why: &str| Err(why.to_owned());
    if let Some(why) = state.closed {
        return no(why);
    }
    if ring {
        return no("the program uses io_uring, whose requests the kernel serves on its own");
    }
    if !settings.only.is_empty() && !matches(&settings.only, path) {
        return no("--only does not name it");
    }
    if matches(&settings.skip, path) {
        return no("--skip names it");
    }
    if call.flags & !ALLOWED != 0 {
        return match call.flags & !ALLOWED {
            f if f & libc::MAP_LOCKED != 0 => no("it is to be locked in memory (MAP_LOCKED)"),
            f if f & libc::MAP_FIXED != 0 => no("the program chose its address (MAP_FIXED)"),
            f => Err(format!(
                "it has flags of mmap that the engine does not know ({f:#x})"
            )),
        };
    }
    if file::holds_lease(call.fd) {
        return no("the program has a lease on its file");
    }
    if file::fs_magic(call.fd).is_ok_and(|m| IN_MEMORY.contains(&m)) {
        return no("its file is in memory (tmpfs, memfd)");
    }
    if call.flags & libc::MAP_SHARED != 0 && access & libc::O_ACCMODE == libc::O_RDWR {
        return no(
            "it is shared and its descriptor open for writing, so that mprotect could make it writable",
        );
    }
    if call.offset >= status.len {
        return no("it begins beyond the end of the file");
    }
    if trusted && call.offset + call.len as u64 > status.len.next_multiple_of(PAGE as u64) {
        return no("it reaches beyond the end of a file that may grow (--trust takes no lease)");
    }
    if state.write_locked.contains(&status.id) {
        return no("the program has taken POSIX locks for writing on it");
    }
    Ok(())
}

/// Whether the program has a ring, or the library with which rings are made: what the requests in a ring point to, the kernel
/// reads when it likes. (Rings that are made later, the service thread notices.)
fn uses_io_uring() -> bool {
    unsafe extern "C" fn look(
        info: *mut libc::dl_phdr_info,
        _: usize,
        found: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: the linker passes a valid structure, whose name is a string.
        let name = unsafe { std::ffi::CStr::from_ptr((*info).dlpi_name) };
        let ring = name.to_bytes().windows(8).any(|w| w == b"liburing");
        // SAFETY: the caller's variable.
        unsafe { *found.cast::<bool>() |= ring };
        libc::c_int::from(ring)
    }
    let mut found = false;
    // SAFETY: the function and what it is given live for the time of the call.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut found).cast()) };
    found || (STANDING.load(Ordering::Relaxed) == 0 && has_ring())
}

/// Whether a descriptor is a ring.
pub(crate) fn has_ring() -> bool {
    let Ok(all) = std::fs::read_dir("/proc/self/fd") else {
        return false;
    };
    all.flatten().any(|fd| {
        std::fs::read_link(fd.path()).is_ok_and(|l| l.as_os_str() == "anon_inode:[io_uring]")
    })
}

fn stand_in(
    state: &mut State,
    settings: &Settings,
    call: &Call,
    path: &Path,
    trusted: bool,
) -> Result<Option<usize>, String> {
    let pool = state.pool()?;
    // SAFETY: the program's own descriptor, which it keeps open for the time of its call.
    let file = unsafe { BorrowedFd::borrow_raw(call.fd) };
    let reads = match settings.reads {
        Wish::Direct => Reads::Direct,
        Wish::Buffered => Reads::Buffered,
        Wish::Auto => {
            let cached = file::cached_pages(call.fd, call.offset, call.len as u64).unwrap_or(0);
            if cached >= (call.len / PAGE / 2) as u64 {
                Reads::Buffered
            } else {
                Reads::Auto
            }
        }
    };
    let wanted = Wanted {
        file,
        place: if trap::active() {
            trap::place(call.len)
        } else {
            call.addr
        },
        len: call.len,
        offset: call.offset,
        flags: call.flags & !IDLE,
        leased: !trusted,
        reads,
    };
    let standin = StandIn::new(&pool, &wanted).map_err(|e| reason(&e))?;
    let at = standin.range().start;
    if trap::active() && !trap::in_window(at) {
        return Err("there is no room in the window of addresses that --compat watches".to_owned());
    }
    if settings.dry_run {
        // It could be had: that is all that was asked.
        let past = state.files.entry(path.to_owned()).or_default();
        past.mappings += 1;
        past.bytes += call.len as u64;
        past.trusted = trusted;
        return Ok(None);
    }
    if call.flags & libc::MAP_POPULATE != 0 {
        let _ = standin.map().prefetch(..);
    }
    let path: Arc<Path> = Arc::from(PathBuf::from(path));
    state.insert(Entry { standin, path });
    Ok(Some(at))
}

/// An error of the engine's, without what differs from file to file.
fn reason(e: &Error) -> String {
    match e {
        Error::Lease { reason, .. } => match reason {
            LeaseRefusal::OpenForWriting => {
                "its file is open for writing, so no lease can be had (--trust, if its bytes do not change)".to_owned()
            }
            LeaseRefusal::NotOwner => {
                "its file belongs to another user, so no lease can be had (--trust, if its bytes do not change)".to_owned()
            }
            LeaseRefusal::FileSystem { file_system } => format!(
                "it is on {file_system}, where leases do not guard the bytes (--trust, if they do not change)"
            ),
            other => format!("no lease can be had: {other}"),
        },
        Error::Kernel { what, error } => {
            // "cannot open NAME for reading: …": the name is the example's.
            let what = what.split(" /").next().unwrap_or(what);
            format!("{what}: {error}")
        }
        other => other.to_string(),
    }
}
