//! Descriptor tables: a thread can have one of its own, and fetch descriptors from another thread's.

#![allow(unsafe_code, reason = "closes descriptors by number")]

use crate::mem::{PIDFD_THREAD, pidfd_open};
use crate::raw::{Errno, check, syscall};

/// `CLOSE_RANGE_UNSHARE`: first give the calling thread a descriptor table of its own.
const CLOSE_RANGE_UNSHARE: usize = 2;

/// Gives the calling thread an empty table of its own, in which 0, 1 and 2 name nothing of use.
///
/// The other threads' table is untouched, and so are the POSIX record locks that belong to it: the kernel drops a
/// table's locks on a file when *that* table closes a descriptor of the file.
///
/// # Safety
///
/// No code that runs on this thread (or on threads that it spawns later) may count on any descriptor made before.
pub unsafe fn privatise() -> Result<(), Errno> {
    // SAFETY: the caller's promise; no pointers.
    check(unsafe {
        syscall(
            libc::SYS_close_range,
            [0, u32::MAX as usize, CLOSE_RANGE_UNSHARE, 0, 0, 0],
        )
    })?;
    // A stray message must not land in one of the descriptors that are opened here later.
    for _ in 0..3 {
        // SAFETY: no pointers. Needs no path, so it works in any root directory; if it fails the table is private anyway.
        let _ = unsafe {
            syscall(
                libc::SYS_eventfd2,
                [0, libc::EFD_CLOEXEC as usize, 0, 0, 0, 0],
            )
        };
    }
    Ok(())
}

/// Whether descriptor `a` of thread `of` and descriptor `b` of this thread name the same open file (`kcmp(2)`); `None`
/// where the kernel will not say.
pub fn same_open_file(of: u32, a: i32, b: i32) -> Option<bool> {
    let me = crate::raw::gettid() as usize;
    // SAFETY: no pointers; 0 is KCMP_FILE.
    let ret = unsafe {
        syscall(
            libc::SYS_kcmp,
            [of as usize, me, 0, a as usize, b as usize, 0],
        )
    };
    match check(ret) {
        Ok(order) => Some(order == 0),
        Err(Errno(libc::EBADF)) => Some(false),
        Err(_) => None,
    }
}

/// Whether two processes have one table of descriptors (`kcmp(2)`, `KCMP_FILES`); `false` where the kernel will not say.
pub fn share_table(a: u32, b: u32) -> bool {
    const KCMP_FILES: usize = 2;
    // SAFETY: no pointers.
    let order = unsafe {
        syscall(
            libc::SYS_kcmp,
            [a as usize, b as usize, KCMP_FILES, 0, 0, 0],
        )
    };
    check(order) == Ok(0)
}

/// Copies descriptor `fd` of thread `tid`, of this process, into the calling thread's table (close-on-exec). Needs
/// `PIDFD_THREAD` (6.9). May be called in a signal handler.
pub fn fetch(tid: u32, fd: i32) -> Result<i32, Errno> {
    let thread = pidfd_open(tid, PIDFD_THREAD)?;
    // SAFETY: no pointers.
    let got = check(unsafe {
        syscall(
            libc::SYS_pidfd_getfd,
            [thread as usize, fd as usize, 0, 0, 0, 0],
        )
    });
    // SAFETY: opened above, and given to nobody.
    unsafe { crate::file::close(thread) };
    got.map(|fd| fd as i32)
}

/// Copies descriptor `fd` to the lowest free number from `floor` on (close-on-exec).
pub fn duplicate_above(fd: i32, floor: i32) -> Result<i32, Errno> {
    let (fd, floor) = (fd as usize, floor as usize);
    // SAFETY: no pointers.
    check(unsafe {
        syscall(
            libc::SYS_fcntl,
            [fd, libc::F_DUPFD_CLOEXEC as usize, floor, 0, 0, 0],
        )
    })
    .map(|fd| fd as i32)
}

/// Whether a number of this process's table is an anonymous file of a kind, such as `anon_inode:[userfaultfd]`.
pub fn is_anonymous(number: i32, kind: &str) -> bool {
    if number < 0 {
        return false;
    }
    let mut path = [0u8; 64];
    let path = crate::file::numbered_path("/proc/self/fd/", number, &mut path);
    let mut target = [0u8; 64];
    // SAFETY: a NUL-terminated path, and a buffer of the length that is given.
    let len = check(unsafe {
        syscall(
            libc::SYS_readlinkat,
            [
                libc::AT_FDCWD as usize,
                path.as_ptr() as usize,
                target.as_mut_ptr() as usize,
                target.len(),
                0,
                0,
            ],
        )
    });
    len.is_ok_and(|len| &target[..len] == kind.as_bytes())
}

/// Runs `f` on each number of this process's table (its first thread's), which it may close. Asks for no memory.
pub fn for_each_open(mut f: impl FnMut(i32)) {
    let Ok(dir) = crate::file::open(
        c"/proc/self/fd",
        libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
    ) else {
        return;
    };
    let mut entries = [0u64; 40];
    loop {
        // SAFETY: a buffer of the length that is given.
        let read = check(unsafe {
            syscall(
                libc::SYS_getdents64,
                [
                    dir as usize,
                    entries.as_mut_ptr() as usize,
                    size_of_val(&entries),
                    0,
                    0,
                    0,
                ],
            )
        });
        let Ok(read @ 1..) = read else { break };
        // SAFETY: the kernel has written so many bytes of the array.
        let bytes = unsafe { core::slice::from_raw_parts(entries.as_ptr().cast::<u8>(), read) };
        each_name(bytes, |name| {
            let number = core::str::from_utf8(name).ok().and_then(|n| n.parse().ok());
            number.into_iter().for_each(&mut f);
        });
    }
    // SAFETY: opened above.
    unsafe { crate::file::close(dir) };
}

/// The names of `struct linux_dirent64`s: the length of an entry lies at byte 16, its name at byte 19.
fn each_name(mut entries: &[u8], mut f: impl FnMut(&[u8])) {
    while let [_, ..] = entries {
        let len = entries
            .get(16..18)
            .map_or(0, |l| u16::from_ne_bytes([l[0], l[1]]) as usize);
        let Some(entry) = entries.get(..len).filter(|_| len > 19) else {
            return;
        };
        let name = &entry[19..];
        f(&name[..name.iter().position(|b| *b == 0).unwrap_or(name.len())]);
        entries = &entries[len..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::sync::mpsc;

    #[test]
    fn every_open_number_is_found_once_and_none_is_taken_for_a_userfaultfd() {
        const KIND: &str = "anon_inode:[userfaultfd]";
        let files: Vec<_> = (0..100)
            .map(|_| std::fs::File::open("/proc/self/exe").expect("the test's own binary"))
            .collect();
        let mut found = Vec::new();
        for_each_open(|number| found.push(number));
        for file in &files {
            let number = file.as_raw_fd();
            assert_eq!(
                found.iter().filter(|n| **n == number).count(),
                1,
                "{number}"
            );
            assert!(!is_anonymous(number, KIND));
        }
        assert!(!is_anonymous(-1, KIND) && !is_anonymous(i32::MAX, KIND));
        if let Ok(uffd) = crate::uffd::open(crate::uffd::USER_MODE_ONLY) {
            assert!(is_anonymous(uffd, KIND));
            // SAFETY: opened above.
            unsafe { crate::file::close(uffd) };
        }
    }

    #[test]
    fn a_descriptor_kept_by_a_private_table_can_be_fetched_after_it_was_closed_here() {
        let file = std::fs::File::open("/proc/self/exe").expect("the test's own binary");
        let (me, number) = (crate::raw::gettid(), file.as_raw_fd());
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let keeper = std::thread::spawn(move || {
            // SAFETY: this thread uses no descriptor made before.
            unsafe { privatise() }.expect("close_range");
            tell.send((crate::raw::gettid(), fetch(me, number)))
                .expect("the test waits");
            let _ = ended.recv();
        });
        let (tid, kept) = told.recv().expect("the keeper starts");
        drop(file);
        match kept.and_then(|kept| fetch(tid, kept)) {
            Ok(fd) => {
                // SAFETY: `fetch` made this descriptor for us.
                let mut again = unsafe { std::fs::File::from_raw_fd(fd) };
                let mut magic = [0u8; 4];
                again.read_exact(&mut magic).expect("an ELF file");
                assert_eq!(&magic, b"\x7fELF");
            }
            Err(e) => assert_eq!(
                e,
                Errno(libc::EINVAL),
                "only a kernel without PIDFD_THREAD may refuse"
            ),
        }
        drop(end);
        keeper.join().expect("the keeper ends");
    }
}
