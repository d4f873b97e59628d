//! One memory budget for a tree of processes.
//!
//! Each process has a slot in a file in `/dev/shm`: what it was granted, what it uses, and whether it wants more. Four times a second
//! each of them works out the same fair shares from the same slots, and takes its own: first what it must give up, and of what it
//! may have more, only as much as others have given up by then, or do not use. So grants never add up to more than the budget, but
//! for the least that a new process needs to begin; what is used can exceed it by what is filled in the quarter of a second until
//! all have noticed.
//!
//! The command makes the file before it becomes the program, in a directory of its own that others can pass but not list, under
//! names that nobody can guess. Processes of the tree that have changed their user share the budget all the same. One of them can
//! write nonsense into the file, or cut it: so it is read and written by system calls and never mapped, its figures are bounded
//! when they are read, and what is missing counts as zero.

#![allow(unsafe_code, reason = "asks whether processes live, locks a file")]

use faultless_untrusted::output::random;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Processes that can share one budget. Further ones are granted [`LEAST`] and are not seen by the others.
pub const SLOTS: usize = 256;
/// Files that a process tells the others of.
pub const FILES: usize = 16;
/// What a process is granted at least, in bytes.
pub const LEAST: u64 = 4 << 20;
/// How long to wait for others that look at the slots.
const PATIENCE: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(100);

/// Where the files are.
const PLACE: &str = "/dev/shm";
/// Names of directories begin with this.
pub const PREFIX: &str = "faultless-run-";
/// Directories that are younger are those of programs that are just starting.
const YOUNG: Duration = Duration::from_secs(60);

/// Words of a slot: the process, whether it has used up what it was granted, what it was granted, what it uses, and of each file
/// device, inode and bytes.
const SLOT: usize = 4 + 3 * FILES;
const WORDS: usize = SLOTS * SLOT;

/// A tree of processes that share a budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// The file with the slots.
    path: PathBuf,
    /// The user who made it.
    owner: u32,
    /// The tree's first process.
    first: u32,
}

impl Tree {
    /// Makes the file, for this process and its descendants.
    ///
    /// # Errors
    ///
    /// There is no `/dev/shm`, or it is full.
    pub fn make() -> io::Result<Tree> {
        let first = std::process::id();
        // (The number tells a later sweep whether the tree may still be there.)
        let dir = Path::new(PLACE).join(format!("{PREFIX}{first}-{:016x}", random()?));
        let tree = Tree {
            path: dir.join(format!("{:016x}", random()?)),
            owner: user(),
            first,
        };
        tree.create()?;
        Ok(tree)
    }

    /// Makes what is missing of the file and its directory.
    fn create(&self) -> io::Result<()> {
        let dir = self.path.parent().ok_or(io::ErrorKind::NotFound)?;
        let mode = |mode| std::fs::Permissions::from_mode(mode);
        match DirBuilder::new().mode(0o700).create(dir) {
            // (Past the umask.)
            Ok(()) => std::fs::set_permissions(dir, mode(0o711))?,
            // It may be somebody else's: `open` looks.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.path)?
            .set_permissions(mode(0o666))
    }

    /// Opens the file. If it was removed because nobody seemed to need it any more, its owner makes it again.
    fn join(&self) -> io::Result<File> {
        match self.open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound && user() == self.owner => {
                let made = self.create();
                self.open().or_else(|e| made.and(Err(e)))
            }
            other => other,
        }
    }

    /// Where there can be no file: each process finds that out and says so.
    pub fn none() -> Tree {
        Tree {
            path: PathBuf::new(),
            owner: user(),
            first: std::process::id(),
        }
    }

    /// Opens the file, if it is the one that was made.
    fn open(&self) -> io::Result<File> {
        let dir = self.path.parent().ok_or(io::ErrorKind::NotFound)?;
        let dir = std::fs::symlink_metadata(dir)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&self.path)?;
        let found = file.metadata()?;
        let ours = dir.is_dir()
            && dir.uid() == self.owner
            && dir.mode() & 0o022 == 0
            && found.is_file()
            && found.uid() == self.owner;
        match ours {
            true => Ok(file),
            false => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    /// This process ends, whatever it has been before it executed its program: removes the file, if it is not needed.
    pub fn end(&self) {
        self.remove_unless(|pid| pid != u64::from(std::process::id()) && alive(pid));
    }

    /// Removes the file, if none of the processes in it is `there` and the tree's first is this one or gone.
    fn remove_unless(&self, there: impl Fn(u64) -> bool) {
        let over = self.first == std::process::id() || !alive(u64::from(self.first));
        if over && self.open().is_ok_and(|file| !any_pid(&file, there)) {
            self.remove();
        }
    }

    fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
        if let Some(dir) = self.path.parent() {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Whether some slot has such a process. (Without memory of the heap: this is asked as the process ends.)
fn any_pid(file: &File, there: impl Fn(u64) -> bool) -> bool {
    const AT_A_TIME: usize = 8;
    let mut bytes = [0u8; AT_A_TIME * SLOT * 8];
    for first in (0..SLOTS).step_by(AT_A_TIME) {
        let got = file
            .read_at(&mut bytes, (first * SLOT * 8) as u64)
            .unwrap_or(0);
        let slots = bytes[..got].chunks(SLOT * 8);
        let pids = slots.filter_map(|s| s.first_chunk().map(|p| u64::from_ne_bytes(*p)));
        if pids.into_iter().any(&there) {
            return true;
        }
        if got < bytes.len() {
            return false;
        }
    }
    false
}

fn user() -> u32 {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() }
}

fn alive(pid: u64) -> bool {
    let Some(pid) = i32::try_from(pid).ok().filter(|&pid| pid > 0) else {
        return false;
    };
    // SAFETY: signal 0 only asks.
    let there = unsafe { libc::kill(pid, 0) } == 0;
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

/// A copy of what is in the file.
struct Slots(Vec<u64>);

const PID: usize = 0;
const PRESSED: usize = 1;
const GRANTED: usize = 2;
const USED: usize = 3;
const HELD: usize = 4;

impl Slots {
    /// Reads the file. Parts that cannot be read count as zeros.
    fn read(file: &File) -> Slots {
        let mut bytes = vec![0; WORDS * 8];
        let mut got = 0;
        while got < bytes.len() {
            match file.read_at(&mut bytes[got..], got as u64) {
                Ok(0) | Err(_) => break,
                Ok(n) => got += n,
            }
        }
        let words = bytes.chunks_exact(8);
        Slots(
            words
                .map(|w| u64::from_ne_bytes(w.try_into().unwrap_or_default()))
                .collect(),
        )
    }

    fn pids(&self) -> impl Iterator<Item = u64> {
        self.0.iter().step_by(SLOT).copied()
    }

    fn get(&self, slot: usize, field: usize) -> u64 {
        self.0[slot * SLOT + field]
    }

    /// Bytes of somebody's figure: never more than there can be.
    fn bytes(&self, slot: usize, field: usize, total: u64) -> u64 {
        self.get(slot, field).min(total)
    }

    /// Bytes that processes hold more than once, as far as they have told: of each file, the sum less the largest.
    fn duplicated(&self) -> u64 {
        let mut files = std::collections::HashMap::<(u64, u64), (u64, u64)>::new();
        for (slot, pid) in self.pids().enumerate() {
            if !alive(pid) {
                continue;
            }
            for file in 0..FILES {
                let of = |n| self.get(slot, HELD + 3 * file + n);
                let (sum, most) = files.entry((of(0), of(1))).or_default();
                *sum = sum.saturating_add(of(2));
                *most = of(2).max(*most);
            }
        }
        let twice = files.values().map(|(sum, most)| sum - most);
        twice.fold(0, u64::saturating_add)
    }
}

fn write_words(file: &File, slot: usize, field: usize, words: &[u64]) {
    let mut bytes = [0u8; SLOT * 8];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    // (If there is no room for it, the others do not see this process.)
    let _ = file.write_all_at(
        &bytes[..words.len() * 8],
        ((slot * SLOT + field) * 8) as u64,
    );
}

/// Runs `f` while no other process does. One that takes too long is not waited for: what is at stake is a share that is wrong for
/// a quarter of a second.
fn alone<R>(file: &File, f: impl FnOnce() -> R) -> R {
    let lock = |kind: i32| {
        let mut lock = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: it reads the structure.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) == 0 }
    };
    let began = Instant::now();
    while !lock(libc::F_WRLCK) && began.elapsed() < PATIENCE {
        std::thread::sleep(NAP);
    }
    let result = f();
    lock(libc::F_UNLCK);
    result
}

/// What a process uses, and of which files (device, inode, bytes).
#[derive(Debug, Clone, Default)]
pub struct Use {
    /// Bytes.
    pub used: u64,
    /// It has used up what it was granted.
    pub pressed: bool,
    /// Those of which it holds most.
    pub files: Vec<(u64, u64, u64)>,
}

/// This process's place among those that share a budget.
#[derive(Debug)]
pub struct Share {
    tree: Tree,
    slot: Option<usize>,
    pid: u32,
    total: u64,
    granted: u64,
    duplicated: u64,
    /// Processes that were there, with what they were granted and used. One that still lives is counted, whatever has become of
    /// its slot: another process of the tree may have wiped it.
    seen: BTreeMap<u64, (u64, u64)>,
}

impl Share {
    /// Joins the processes of a tree, which share `total` bytes.
    ///
    /// # Errors
    ///
    /// The file is not there, or not the one that was made.
    pub fn join(tree: &Tree, total: u64, pid: u32) -> io::Result<Share> {
        let file = tree.join()?;
        let slot = alone(&file, || take_slot(&file, pid));
        Ok(Share {
            tree: tree.clone(),
            slot,
            pid,
            total,
            granted: LEAST,
            duplicated: 0,
            seen: BTreeMap::new(),
        })
    }

    /// Tells the others what this process uses, and takes its share. Returns the bytes that it is granted: what it was granted
    /// before, if the file cannot be reached any more.
    pub fn settle(&mut self, now: &Use) -> u64 {
        let Some(slot) = self.slot else { return LEAST };
        let Ok(file) = self.tree.join() else {
            return self.granted;
        };
        let (pid, total) = (self.pid, self.total);
        let seen = &mut self.seen;
        (self.granted, self.duplicated) =
            alone(&file, || share_out(&file, slot, pid, total, now, seen));
        self.granted
    }

    /// Bytes that processes held more than once when this one last settled.
    pub fn duplicated(&self) -> u64 {
        self.duplicated
    }

    /// Wants nothing for now.
    pub fn park(&self) {
        if let (Some(slot), Ok(file)) = (self.slot, self.tree.open()) {
            write_words(&file, slot, PRESSED, &[0; 3]);
        }
    }

    /// Leaves; the last one removes the file.
    pub fn leave(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        if let Ok(file) = self.tree.open() {
            write_words(&file, slot, PID, &[0]);
        }
        self.tree.remove_unless(alive);
    }
}

/// Takes a free slot, or this process's own from before it executed another program.
fn take_slot(file: &File, pid: u32) -> Option<usize> {
    let slots = Slots::read(file);
    let mine = |p: u64| p == u64::from(pid);
    let slot = slots
        .pids()
        .position(mine)
        .or_else(|| slots.pids().position(|p| !alive(p)))?;
    let mut words = [0; SLOT];
    words[PID] = u64::from(pid);
    write_words(file, slot, PID, &words);
    Some(slot)
}

/// Works out the shares, and takes the one of a slot. Returns it, and what is held more than once.
fn share_out(
    file: &File,
    slot: usize,
    pid: u32,
    total: u64,
    now: &Use,
    seen: &mut BTreeMap<u64, (u64, u64)>,
) -> (u64, u64) {
    let mut slots = Slots::read(file);
    restore_wiped(&mut slots, u64::from(pid), slot, seen);
    let mut words = [0; SLOT];
    words[PID] = u64::from(pid);
    words[PRESSED] = u64::from(now.pressed);
    words[GRANTED] = slots.get(slot, GRANTED);
    words[USED] = now.used;
    for (to, &(device, inode, bytes)) in words[HELD..].chunks_exact_mut(3).zip(&now.files) {
        to.copy_from_slice(&[device, inode, bytes]);
    }
    slots.0[slot * SLOT..(slot + 1) * SLOT].copy_from_slice(&words);
    let live: Vec<usize> = (0..SLOTS)
        .filter(|&s| s == slot || alive(slots.get(s, PID)))
        .collect();
    let needs = |s: usize| {
        let used = slots.bytes(s, USED, total);
        (used + used / 4).max(LEAST)
    };
    let demands: Vec<u64> = live
        .iter()
        .map(|&s| match slots.get(s, PRESSED) {
            0 => needs(s),
            _ => total,
        })
        .collect();
    let fair = shares(total, &demands);
    let granted = |s: usize| slots.bytes(s, GRANTED, total);
    let (mut mine, mut others) = (0, 0u64);
    for (&s, &fair) in live.iter().zip(&fair) {
        if s == slot {
            mine = fair;
        } else {
            others = others.saturating_add(granted(s));
        }
    }
    // Take from other processes what they were granted beyond their shares and do not use. They notice soon.
    for (&s, &fair) in live.iter().zip(&fair) {
        let missing = mine.saturating_add(others).saturating_sub(total);
        let spare = granted(s).saturating_sub(fair.max(needs(s))).min(missing);
        if s != slot && spare > 0 {
            write_words(file, s, GRANTED, &[granted(s) - spare]);
            others -= spare;
        }
    }
    words[GRANTED] = mine.min(total.saturating_sub(others)).max(LEAST);
    write_words(file, slot, PID, &words);
    (words[GRANTED], slots.duplicated())
}

/// Puts back, in this copy, the slots of processes that live and have vanished from the file.
fn restore_wiped(slots: &mut Slots, me: u64, own: usize, seen: &mut BTreeMap<u64, (u64, u64)>) {
    seen.retain(|&pid, _| alive(pid));
    let there: BTreeSet<u64> = slots.pids().collect();
    for (&pid, &(granted, used)) in seen.iter().filter(|(pid, _)| !there.contains(pid)) {
        let free = (0..SLOTS).find(|&s| s != own && !alive(slots.get(s, PID)));
        if let Some(free) = free {
            slots.0[free * SLOT..free * SLOT + 4].copy_from_slice(&[pid, 0, granted, used]);
        }
    }
    for s in (0..SLOTS).filter(|&s| s != own) {
        let pid = slots.get(s, PID);
        if pid != me && alive(pid) && seen.len() < SLOTS {
            seen.insert(pid, (slots.get(s, GRANTED), slots.get(s, USED)));
        }
    }
}

/// Removes what trees of processes of this user left behind that were killed.
pub fn sweep() {
    let Ok(dir) = std::fs::read_dir(PLACE) else {
        return;
    };
    for entry in dir.flatten() {
        let ours = entry
            .file_name()
            .to_str()
            .is_some_and(|n| n.starts_with(PREFIX));
        if ours {
            sweep_one(&entry.path());
        }
    }
}

fn sweep_one(dir: &Path) {
    let Ok(found) = std::fs::symlink_metadata(dir) else {
        return;
    };
    let old = found
        .modified()
        .is_ok_and(|t| t.elapsed().is_ok_and(|age| age > YOUNG));
    // (Nobody else can put anything into a directory of ours.)
    if !found.is_dir() || found.uid() != user() || found.mode() & 0o022 != 0 || !old {
        return;
    }
    // The tree's first process may not have joined, or not yet.
    let first = dir.file_name().and_then(|n| {
        n.to_str()?
            .strip_prefix(PREFIX)?
            .split('-')
            .next()?
            .parse()
            .ok()
    });
    if first.is_none_or(alive) {
        return;
    }
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    let mut empty = true;
    for entry in entries.flatten() {
        let tree = Tree {
            path: entry.path(),
            owner: user(),
            first: 0,
        };
        match tree.open() {
            Ok(file) if any_pid(&file, alive) => empty = false,
            _ => _ = std::fs::remove_file(&tree.path),
        }
    }
    if empty {
        let _ = std::fs::remove_dir(dir);
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

    fn uses(used: u64, pressed: bool) -> Use {
        Use {
            used,
            pressed,
            files: Vec::new(),
        }
    }

    /// A process that lives until it is dropped.
    struct Other(std::process::Child);

    impl Other {
        fn start() -> Other {
            let sleeper = std::process::Command::new("sleep").arg("1000").spawn();
            Other(sleeper.expect("coreutils"))
        }

        fn pid(&self) -> u32 {
            self.0.id()
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn grants_never_exceed_the_budget_once_all_have_settled() {
        const TOTAL: u64 = 1 << 30;
        let tree = Tree::make().expect("/dev/shm");
        let (other, third) = (Other::start(), Other::start());
        let mut a = Share::join(&tree, TOTAL, std::process::id()).expect("made above");
        assert_eq!(a.settle(&uses(0, false)), TOTAL, "alone");
        assert_eq!(a.settle(&uses(TOTAL, true)), TOTAL);
        let mut b = Share::join(&tree, TOTAL, other.pid()).expect("made above");
        assert_eq!(
            b.settle(&uses(0, true)),
            LEAST,
            "the first has all of it yet"
        );
        let first = a.settle(&uses(TOTAL, true));
        assert_eq!(first, TOTAL / 2);
        let holds = |files| Use {
            files,
            ..uses(LEAST, true)
        };
        assert_eq!(b.settle(&holds(vec![(1, 7, 60)])), TOTAL - first);
        a.settle(&holds(vec![(1, 7, 100), (1, 8, 5)]));
        assert_eq!(a.duplicated(), 60);
        b.leave();
        drop(other);
        assert_eq!(a.settle(&uses(TOTAL / 2, true)), TOTAL);
        // One that uses little makes room immediately.
        assert_eq!(a.settle(&uses(TOTAL / 64, false)), TOTAL);
        let mut c = Share::join(&tree, TOTAL, third.pid()).expect("made above");
        let granted = c.settle(&uses(0, true));
        assert!(granted > TOTAL / 2, "{granted}");
        assert!(granted + a.settle(&uses(TOTAL / 64, false)) <= TOTAL);
        c.leave();
        assert!(tree.path.exists(), "a process is in it");
        a.leave();
        assert!(
            !tree.path.parent().expect("a directory").exists(),
            "the last one removes it"
        );
    }

    #[test]
    fn a_file_that_was_cut_or_filled_with_nonsense_does_no_harm() {
        const TOTAL: u64 = 1 << 30;
        let tree = Tree::make().expect("/dev/shm");
        let mut share = Share::join(&tree, TOTAL, std::process::id()).expect("made above");
        let file = tree.open().expect("made above");
        for byte in [0xff, 0x01, 0x80] {
            file.write_all_at(&vec![byte; WORDS * 8], 0)
                .expect("written");
            // Process 1 lives, and claims everything.
            write_words(&file, 3, PID, &[1, 1, u64::MAX, u64::MAX]);
            let granted = share.settle(&uses(TOTAL, true));
            assert!((LEAST..=TOTAL).contains(&granted), "{granted}");
        }
        file.set_len(3).expect("cut");
        let granted = share.settle(&uses(TOTAL, true));
        assert!((LEAST..=TOTAL).contains(&granted), "{granted}");
        assert!(tree.open().expect("there").metadata().expect("there").len() > 3);
        share.leave();
    }

    #[test]
    fn a_process_whose_slot_was_wiped_keeps_its_share() {
        const TOTAL: u64 = 1 << 30;
        let tree = Tree::make().expect("/dev/shm");
        let mut a = Share::join(&tree, TOTAL, std::process::id()).expect("made above");
        let other = Other::start();
        let mut b = Share::join(&tree, TOTAL, other.pid()).expect("made above");
        for _ in 0..3 {
            a.settle(&uses(TOTAL / 2, true));
            b.settle(&uses(TOTAL / 2, true));
        }
        let file = tree.open().expect("made above");
        let before = a.settle(&uses(TOTAL / 2, true));
        assert!(before <= TOTAL / 2 + LEAST, "{before}");
        for _ in 0..3 {
            for slot in 0..SLOTS {
                write_words(&file, slot, PID, &[0; SLOT]);
            }
            let alone = a.settle(&uses(TOTAL / 2, false));
            assert!(alone <= TOTAL - TOTAL / 4, "{alone}");
        }
        b.leave();
        a.leave();
    }

    #[test]
    fn what_is_not_the_file_that_was_made_is_not_joined() {
        let tree = Tree::make().expect("/dev/shm");
        let dir = tree.path.parent().expect("a directory").to_owned();
        std::fs::remove_file(&tree.path).expect("made above");
        Share::join(&tree, LEAST, 1).expect("its owner makes it again");
        std::fs::remove_file(&tree.path).expect("made again");
        let other = Tree {
            owner: 4711,
            ..tree.clone()
        };
        assert!(
            Share::join(&other, LEAST, 1).is_err(),
            "another user does not"
        );
        assert!(!tree.path.exists());
        std::os::unix::fs::symlink("/etc/passwd", &tree.path).expect("a link");
        assert!(Share::join(&tree, LEAST, 1).is_err(), "a link");
        std::fs::remove_file(&tree.path).expect("made above");
        let made = std::process::Command::new("mkfifo")
            .arg(&tree.path)
            .status();
        assert!(made.expect("coreutils").success());
        assert!(Share::join(&tree, LEAST, 1).is_err(), "a pipe");
        let foreign = Tree {
            owner: 4711,
            ..tree.clone()
        };
        assert!(Share::join(&foreign, LEAST, 1).is_err(), "another user's");
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).expect("own");
        assert!(Share::join(&tree, LEAST, 1).is_err(), "anybody's directory");
        std::fs::remove_dir_all(dir).expect("own");
    }

    /// One sweep at a time: another one between two looks would have done half of the work.
    fn alone_with_the_sweep() -> std::sync::MutexGuard<'static, ()> {
        static SWEEPING: std::sync::Mutex<()> = std::sync::Mutex::new(());
        SWEEPING
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[test]
    fn the_sweep_opens_nothing_that_is_not_a_directory_of_its_own() {
        let _alone = alone_with_the_sweep();
        let plant = |name: &str| {
            Path::new(PLACE).join(format!("{PREFIX}test-{}-{name}", std::process::id()))
        };
        let (pipe, link) = (plant("pipe"), plant("link"));
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.expect("coreutils").success());
        std::os::unix::fs::symlink("/dev/zero", &link).expect("a link");
        // Old enough: a minute and more.
        for path in [&pipe, &link] {
            let touched = std::process::Command::new("touch")
                .args(["-h", "-d", "2001-01-01"])
                .arg(path)
                .status();
            assert!(touched.expect("coreutils").success());
        }
        sweep();
        assert!(pipe.exists() && std::fs::symlink_metadata(&link).is_ok());
        for path in [pipe, link] {
            std::fs::remove_file(path).expect("made above");
        }
    }

    #[test]
    fn what_a_killed_tree_left_behind_is_swept() {
        let _alone = alone_with_the_sweep();
        let tree = Tree::make().expect("/dev/shm");
        let dir = tree.path.parent().expect("a directory").to_owned();
        let age = |dir: &Path| {
            let touched = std::process::Command::new("touch")
                .args(["-d", "2001-01-01"])
                .arg(dir)
                .status();
            assert!(touched.expect("coreutils").success());
        };
        let file = tree.open().expect("made above");
        write_words(&file, 0, PID, &[u64::from(std::process::id())]);
        age(&dir);
        sweep();
        assert!(dir.exists(), "its first process, this one, lives");
        // One whose first process has ended.
        let dead = {
            let mut child = std::process::Command::new("true")
                .spawn()
                .expect("coreutils");
            child.wait().expect("it ends");
            child.id()
        };
        let left = Path::new(PLACE).join(format!("{PREFIX}{dead}-test"));
        std::fs::rename(&dir, &left).expect("own");
        sweep();
        assert!(left.exists(), "a process in it lives");
        write_words(&file, 0, PID, &[u64::from(u32::MAX)]);
        age(&left);
        sweep();
        assert!(!left.exists());
    }
}
