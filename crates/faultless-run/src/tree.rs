//! One memory budget for a tree of processes.
//!
//! Each process has a slot in a page of shared memory (a file in `/dev/shm`): what it was granted, what it uses, and
//! whether it wants more. Four times a second each of them works out the same fair shares from the same slots, and takes
//! its own: first what it must give up, and of what it may have more, only as much as others have given up by then, or do not
//! use. So grants never add up to more than the budget, but for the least that a new process needs to begin; what is used can
//! exceed it by what is filled in the quarter of a second until all have noticed.

#![allow(unsafe_code, reason = "shares memory between processes")]

use std::ffi::CString;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Processes that can share one budget. Further ones are granted [`LEAST`] and are not seen by the others.
pub const SLOTS: usize = 256;
/// Files that a process tells the others of.
pub const FILES: usize = 16;
/// What a process is granted at least, in bytes.
pub const LEAST: u64 = 4 << 20;
/// How long to wait for others that look at the slots.
const PATIENCE: Duration = Duration::from_millis(50);

#[repr(C)]
struct File {
    device: AtomicU64,
    inode: AtomicU64,
    resident: AtomicU64,
}

#[repr(C)]
struct Slot {
    pid: AtomicU32,
    /// The process has used up what it was granted.
    pressed: AtomicU32,
    granted: AtomicU64,
    used: AtomicU64,
    files: [File; FILES],
}

#[repr(C)]
struct Page {
    total: AtomicU64,
    /// The process that works on the slots; 0: none.
    owner: AtomicU32,
    slots: [Slot; SLOTS],
}

/// This process's place among those that share a budget.
#[derive(Debug)]
pub struct Share {
    page: *const Page,
    slot: Option<usize>,
    pid: u32,
    total: u64,
    name: CString,
}

// SAFETY: the page is shared memory that is never unmapped while the share lives, and all of it is atomic.
unsafe impl Send for Share {}
// SAFETY: as above.
unsafe impl Sync for Share {}

fn alive(pid: u32) -> bool {
    // SAFETY: signal 0 only asks.
    let there = unsafe { libc::kill(pid as i32, 0) } == 0;
    there || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

/// What the processes get of `total`: each what it demands, unless that is more than an equal share of what is left.
fn shares(total: u64, demands: &[u64]) -> Vec<u64> {
    let mut order: Vec<usize> = (0..demands.len()).collect();
    order.sort_by_key(|&i| demands[i]);
    let mut shares = vec![0; demands.len()];
    let mut left = total;
    for (done, &i) in order.iter().enumerate() {
        let equal = left / (demands.len() - done) as u64;
        shares[i] = demands[i].min(equal);
        left -= shares[i];
    }
    // What nobody demands is everybody's, in equal parts.
    if let Some(n) = std::num::NonZeroU64::new(demands.len() as u64) {
        shares.iter_mut().for_each(|s| *s += left / n);
    }
    shares
}

/// How often to join where the memory is removed meanwhile.
const JOIN_TRIES: usize = 100;

/// Opens, or makes, the shared memory.
fn open_page(name: &CString) -> io::Result<(i32, *const Page)> {
    // SAFETY: a NUL-terminated name; no other pointers.
    let fd = unsafe { libc::shm_open(name.as_ptr(), libc::O_RDWR | libc::O_CREAT, 0o600) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let len = size_of::<Page>();
    // SAFETY: a descriptor of our own; growing a file of zeros, which all processes grow to the same length.
    unsafe {
        let page = if libc::ftruncate(fd, len as i64) == 0 {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, 0)
        } else {
            libc::MAP_FAILED
        };
        if page == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            libc::close(fd);
            return Err(error);
        }
        Ok((fd, page as *const Page))
    }
}

/// Whether a file has a name yet.
fn has_name(fd: i32) -> bool {
    let mut st = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: fills the structure; zeros are valid for all of it.
    unsafe {
        libc::fstat(fd, st.as_mut_ptr());
        st.assume_init().st_nlink > 0
    }
}

impl Share {
    /// Joins the processes that share the budget of `name`, `total` bytes; the first one makes it.
    ///
    /// # Errors
    ///
    /// There is no `/dev/shm`, or it is full.
    pub fn join(name: &str, total: u64, pid: u32) -> io::Result<Share> {
        let name = CString::new(format!("/{name}"))?;
        // The last one to leave removes it, perhaps just now.
        for _ in 0..JOIN_TRIES {
            let (fd, page) = open_page(&name)?;
            let mut share = Share {
                page,
                slot: None,
                pid,
                total,
                name: name.clone(),
            };
            share.take_slot();
            if has_name(fd) {
                // SAFETY: opened above, and given to nobody.
                unsafe { libc::close(fd) };
                return Ok(share);
            }
            // SAFETY: as above; the mapping is nobody's any more.
            unsafe {
                libc::close(fd);
                libc::munmap(page.cast_mut().cast(), size_of::<Page>());
            }
        }
        Err(io::Error::other("it is removed again and again"))
    }

    /// Takes a free slot, or this process's own from before it executed another program.
    fn take_slot(&mut self) {
        let (pid, total) = (self.pid, self.total);
        let share = self;
        share.page().total.store(total, Ordering::Relaxed);
        share.alone(|share| {
            let slots = &share.page().slots;
            let mine = |s: &Slot| s.pid.load(Ordering::Relaxed) == pid;
            let slot = slots.iter().position(mine).or_else(|| {
                slots.iter().position(|s| {
                    let pid = s.pid.load(Ordering::Relaxed);
                    pid == 0 || !alive(pid)
                })
            });
            if let Some(slot) = slot {
                let s = &slots[slot];
                s.pid.store(pid, Ordering::Relaxed);
                s.granted.store(0, Ordering::Relaxed);
                s.used.store(0, Ordering::Relaxed);
                s.pressed.store(0, Ordering::Relaxed);
                s.files
                    .iter()
                    .for_each(|f| f.resident.store(0, Ordering::Relaxed));
                share.slot = Some(slot);
            }
        });
    }

    fn page(&self) -> &'static Page {
        // SAFETY: mapped in `join`, never unmapped, as large as a Page, zeros at first, which are valid.
        unsafe { &*self.page }
    }

    /// Runs `f` while no other process does. One that died in the middle is not waited for, nor one that takes too long:
    /// what is at stake is a share that is wrong for a quarter of a second.
    fn alone<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let owner = &self.page().owner;
        let began = std::time::Instant::now();
        while let Err(other) =
            owner.compare_exchange(0, self.pid, Ordering::AcqRel, Ordering::Acquire)
        {
            if !alive(other) || began.elapsed() > PATIENCE {
                owner.store(self.pid, Ordering::Release);
                break;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let result = f(self);
        let _ = owner.compare_exchange(self.pid, 0, Ordering::AcqRel, Ordering::Relaxed);
        result
    }

    /// Tells the others what this process uses, and takes its share. Returns the bytes that it is granted.
    pub fn settle(&mut self, used: u64, pressed: bool) -> u64 {
        let Some(slot) = self.slot else { return LEAST };
        self.alone(|share| {
            let slots = &share.page().slots;
            let me = &slots[slot];
            me.used.store(used, Ordering::Relaxed);
            me.pressed.store(u32::from(pressed), Ordering::Relaxed);
            let mut live = Vec::new();
            for (i, s) in slots.iter().enumerate() {
                let pid = s.pid.load(Ordering::Relaxed);
                if pid != 0 && i != slot && !alive(pid) {
                    s.pid.store(0, Ordering::Relaxed);
                } else if pid != 0 {
                    live.push((i, s));
                }
            }
            let needs = |s: &Slot| {
                let used = s.used.load(Ordering::Relaxed);
                (used + used / 4).max(LEAST)
            };
            let demands: Vec<u64> = live
                .iter()
                .map(|(_, s)| match s.pressed.load(Ordering::Relaxed) {
                    0 => needs(s),
                    _ => share.total,
                })
                .collect();
            let fair = shares(share.total, &demands);
            let (mut mine, mut others) = (0, 0);
            for (&(i, s), &fair) in live.iter().zip(&fair) {
                if i == slot {
                    mine = fair;
                } else {
                    others += s.granted.load(Ordering::Relaxed);
                }
            }
            // What others were granted beyond their shares and do not use is taken from them: they notice soon.
            for (&(i, s), &fair) in live.iter().zip(&fair) {
                let granted = s.granted.load(Ordering::Relaxed);
                let missing = (mine + others).saturating_sub(share.total);
                let spare = granted.saturating_sub(fair.max(needs(s))).min(missing);
                if i != slot && spare > 0 {
                    s.granted.store(granted - spare, Ordering::Relaxed);
                    others -= spare;
                }
            }
            let granted = mine.min(share.total.saturating_sub(others)).max(LEAST);
            me.granted.store(granted, Ordering::Relaxed);
            granted
        })
    }

    /// Tells the others how much this process holds of which files (device, inode, bytes).
    pub fn holds(&self, files: impl IntoIterator<Item = (u64, u64, u64)>) {
        let Some(slot) = self.slot else { return };
        let mut files = files.into_iter();
        for f in &self.page().slots[slot].files {
            let (device, inode, resident) = files.next().unwrap_or_default();
            f.resident.store(0, Ordering::Relaxed);
            f.device.store(device, Ordering::Relaxed);
            f.inode.store(inode, Ordering::Relaxed);
            f.resident.store(resident, Ordering::Relaxed);
        }
    }

    /// Bytes that processes hold more than once, as far as they have told: of each file, the sum less the largest.
    pub fn duplicated(&self) -> u64 {
        let mut files = std::collections::HashMap::<(u64, u64), (u64, u64)>::new();
        for slot in &self.page().slots {
            let pid = slot.pid.load(Ordering::Relaxed);
            if pid == 0 || !alive(pid) {
                continue;
            }
            for f in &slot.files {
                let key = (
                    f.device.load(Ordering::Relaxed),
                    f.inode.load(Ordering::Relaxed),
                );
                let resident = f.resident.load(Ordering::Relaxed);
                let (sum, most) = files.entry(key).or_default();
                *sum += resident;
                *most = resident.max(*most);
            }
        }
        files.values().map(|(sum, most)| sum - most).sum()
    }

    /// Wants nothing for now.
    pub fn park(&self) {
        let Some(slot) = self.slot else { return };
        let slot = &self.page().slots[slot];
        slot.pressed.store(0, Ordering::Relaxed);
        slot.used.store(0, Ordering::Relaxed);
        slot.granted.store(0, Ordering::Relaxed);
    }

    /// Leaves; the last one removes the shared memory.
    pub fn leave(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        self.alone(|share| {
            let slots = &share.page().slots;
            slots[slot].pid.store(0, Ordering::Relaxed);
            let empty = slots.iter().all(|s| {
                let pid = s.pid.load(Ordering::Relaxed);
                pid == 0 || !alive(pid)
            });
            if empty {
                // SAFETY: a NUL-terminated name.
                unsafe { libc::shm_unlink(share.name.as_ptr()) };
            }
        });
    }
}

/// Names of shared memory begin with this.
pub const PREFIX: &str = "faultless-run-";

/// Removes what trees of processes left behind that were killed.
pub fn sweep() {
    let Ok(dir) = std::fs::read_dir("/dev/shm") else {
        return;
    };
    for entry in dir.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|n| n.starts_with(PREFIX));
        // Young ones may be those of a program that is just starting.
        let old = entry
            .metadata()
            .and_then(|m| m.modified())
            .is_ok_and(|t| t.elapsed().is_ok_and(|age| age > Duration::from_secs(60)));
        if !ours || !old {
            continue;
        }
        let Ok(bytes) = std::fs::read(entry.path()) else {
            continue;
        };
        let pids = (0..SLOTS).map(|i| {
            let at = std::mem::offset_of!(Page, slots) + i * size_of::<Slot>();
            bytes
                .get(at..at + 4)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u32::from_ne_bytes)
        });
        if pids.into_iter().all(|pid| pid == 0 || !alive(pid)) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modest_get_what_they_demand_and_the_greedy_share_the_rest() {
        assert_eq!(shares(100, &[100]), [100]);
        assert_eq!(shares(100, &[10, 100]), [10, 90]);
        assert_eq!(shares(100, &[100, 10, 100]), [45, 10, 45]);
        assert_eq!(
            shares(100, &[10, 10]),
            [50, 50],
            "what nobody demands is everybody's"
        );
        assert!(shares(100, &[]).is_empty());
    }

    #[test]
    fn grants_never_exceed_the_budget_once_all_have_settled() {
        const TOTAL: u64 = 1 << 30;
        let name = format!("{PREFIX}test-{}", std::process::id());
        // Processes that certainly live: this one and its ancestors' first.
        let mut a = Share::join(&name, TOTAL, std::process::id()).expect("/dev/shm");
        assert_eq!(a.settle(0, false), TOTAL, "alone");
        assert_eq!(a.settle(TOTAL, true), TOTAL);
        let mut b = Share::join(&name, TOTAL, 1).expect("/dev/shm");
        assert_eq!(b.settle(0, true), LEAST, "the first has all of it yet");
        let first = a.settle(TOTAL, true);
        assert_eq!(first, TOTAL / 2);
        assert_eq!(b.settle(LEAST, true), TOTAL - first);
        a.holds([(1, 7, 100), (1, 8, 5)]);
        b.holds([(1, 7, 60)]);
        assert_eq!(a.duplicated(), 60);
        b.leave();
        assert_eq!(a.settle(TOTAL / 2, true), TOTAL);
        // One who uses little makes room at once.
        assert_eq!(a.settle(TOTAL / 64, false), TOTAL);
        let mut c = Share::join(&name, TOTAL, 1).expect("/dev/shm");
        let granted = c.settle(0, true);
        assert!(granted > TOTAL / 2, "{granted}");
        assert!(granted + a.settle(TOTAL / 64, false) <= TOTAL);
        c.leave();
        a.leave();
        let again = std::path::Path::new("/dev/shm").join(&name);
        assert!(!again.exists(), "the last one removes it");
    }
}
