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
const PATIENCE: Duration = Duration::from_millis(50);
const NAP: Duration = Duration::from_micros(200);

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
        let dir = Path::new(PLACE).join(format!("{PREFIX}{:016x}", random()?));
        DirBuilder::new().mode(0o700).create(&dir)?;
        let path = dir.join(format!("{:016x}", random()?));
        let mode = |mode| std::fs::Permissions::from_mode(mode);
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            // (Past the umask.)
            .and_then(|file| file.set_permissions(mode(0o666)))
            .and_then(|()| std::fs::set_permissions(&dir, mode(0o711)));
        if let Err(e) = made {
            let _ = std::fs::remove_file(&path);
            let _ = std::fs::remove_dir(&dir);
            return Err(e);
        }
        Ok(Tree {
            path,
            owner: user(),
            first: std::process::id(),
        })
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
            false => Err(io::Error::other("somebody has put something else there")),
        }
    }

    /// This process ends, whatever it has been before it executed its program: removes the file, if it is not needed.
    pub fn end(&self) {
        self.remove_unless(|pid| pid != u64::from(std::process::id()) && alive(pid));
    }

    /// Removes the file, if none of the processes in it is `there` and the tree's first is this one or gone.
    fn remove_unless(&self, there: impl Fn(u64) -> bool) {
        let over = self.first == std::process::id() || !alive(u64::from(self.first));
        let empty = |file: File| !Slots::read(&file).pids().any(there);
        if over && self.open().is_ok_and(empty) {
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
    /// What cannot be read is zero.
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
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    // (If there is no room for it, the others do not see this process.)
    let _ = file.write_all_at(&bytes, ((slot * SLOT + field) * 8) as u64);
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
}

impl Share {
    /// Joins the processes of a tree, which share `total` bytes.
    ///
    /// # Errors
    ///
    /// The file is not there, or not the one that was made.
    pub fn join(tree: &Tree, total: u64, pid: u32) -> io::Result<Share> {
        let file = tree.open()?;
        let slot = alone(&file, || take_slot(&file, pid));
        Ok(Share {
            tree: tree.clone(),
            slot,
            pid,
            total,
            granted: LEAST,
            duplicated: 0,
        })
    }

    /// Tells the others what this process uses, and takes its share. Returns the bytes that it is granted: what it was granted
    /// before, if the file cannot be reached any more.
    pub fn settle(&mut self, now: &Use) -> u64 {
        let Some(slot) = self.slot else { return LEAST };
        let Ok(file) = self.tree.open() else {
            return self.granted;
        };
        (self.granted, self.duplicated) =
            alone(&file, || share_out(&file, slot, self.pid, self.total, now));
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
fn share_out(file: &File, slot: usize, pid: u32, total: u64, now: &Use) -> (u64, u64) {
    let mut slots = Slots::read(file);
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
    // What others were granted beyond their shares and do not use is taken from them: they notice soon.
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
            Ok(file) if Slots::read(&file).pids().any(alive) => empty = false,
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

    #[test]
    fn grants_never_exceed_the_budget_once_all_have_settled() {
        const TOTAL: u64 = 1 << 30;
        let tree = Tree::make().expect("/dev/shm");
        // Processes that certainly live: this one and the first.
        let mut a = Share::join(&tree, TOTAL, std::process::id()).expect("made above");
        assert_eq!(a.settle(&uses(0, false)), TOTAL, "alone");
        assert_eq!(a.settle(&uses(TOTAL, true)), TOTAL);
        let mut b = Share::join(&tree, TOTAL, 1).expect("made above");
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
        assert_eq!(a.settle(&uses(TOTAL / 2, true)), TOTAL);
        // One that uses little makes room immediately.
        assert_eq!(a.settle(&uses(TOTAL / 64, false)), TOTAL);
        let mut c = Share::join(&tree, TOTAL, 1).expect("made above");
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
        assert_eq!(granted, TOTAL, "alone again");
        let again = share.settle(&uses(TOTAL, true));
        assert_eq!(again, TOTAL);
        share.leave();
    }

    #[test]
    fn what_is_not_the_file_that_was_made_is_not_joined() {
        let tree = Tree::make().expect("/dev/shm");
        let dir = tree.path.parent().expect("a directory").to_owned();
        std::fs::remove_file(&tree.path).expect("made above");
        assert!(Share::join(&tree, LEAST, 1).is_err(), "none is made");
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

    #[test]
    fn the_sweep_opens_nothing_that_is_not_a_directory_of_its_own() {
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
        let tree = Tree::make().expect("/dev/shm");
        let dir = tree.path.parent().expect("a directory").to_owned();
        let file = tree.open().expect("made above");
        write_words(&file, 0, PID, &[u64::from(u32::MAX)]);
        sweep();
        assert!(dir.exists(), "too young");
        let touched = std::process::Command::new("touch")
            .args(["-d", "2001-01-01"])
            .arg(&dir)
            .status();
        assert!(touched.expect("coreutils").success());
        sweep();
        assert!(!dir.exists());
    }
}
