//! The file system itself. Requests are taken off the kernel's queue at once, whatever becomes of their answers: one
//! that waits never holds another up.

use crate::faults::{Faults, touches};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEntry, ReplyOpen, Request,
};
use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

/// The file, read through the page cache unless it is opened with `O_DIRECT`.
pub const FILE: &str = "data";
/// The same file, all of whose reads come to the server. (A read of [`FILE`] that is cut short ends, even with `O_DIRECT`,
/// in the page cache, where the kernel puts zeros for what a FUSE server does not deliver.)
pub const UNCACHED: &str = "uncached";
/// What the server prints once the file can be opened.
pub(crate) const READY: &str = "ready";
/// An order that asks for the number of reads that are stuck.
pub(crate) const STUCK: &str = "stuck?";

/// Attributes are asked for each time: the file's length may change.
const TTL: Duration = Duration::ZERO;
const INODE: INodeNo = INodeNo(2);
const INODE_UNCACHED: INodeNo = INodeNo(3);
/// Threads that take requests.
const THREADS: usize = 4;
/// Requests in flight, at most: what the kernel allows.
const BACKGROUND: u16 = 4096;

type Content = dyn Fn(u64, &mut [u8]) + Send + Sync;

/// A read that waits for its answer.
struct Waiting {
    due: Instant,
    offset: u64,
    size: u32,
    reply: ReplyData,
}

// The heap's greatest is the one that is due first.
impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.due.cmp(&self.due)
    }
}
impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}
impl Eq for Waiting {}

#[derive(Default)]
struct Queue {
    waiting: BinaryHeap<Waiting>,
    stuck: Vec<Waiting>,
    faults: Faults,
}

struct Server {
    len: u64,
    content: Box<Content>,
    queue: Mutex<Queue>,
    changed: Condvar,
    random: AtomicU64,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// A random number from 0 to 1 (SplitMix64, by S. Vigna).
    fn random(&self) -> f64 {
        let step = 0x9E37_79B9_7F4A_7C15u64;
        let mut x = self
            .random
            .fetch_add(step, Ordering::Relaxed)
            .wrapping_add(step);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn len_now(&self) -> u64 {
        lock(&self.queue)
            .faults
            .truncated
            .map_or(self.len, |t| t.min(self.len))
    }

    fn set(&self, faults: Faults) {
        let mut q = lock(&self.queue);
        q.faults = faults;
        let all = std::mem::take(&mut q.stuck);
        let (stuck, free) = all
            .into_iter()
            .partition(|w| touches(&q.faults.stuck, w.offset, u64::from(w.size)));
        q.stuck = stuck;
        q.waiting.extend::<Vec<_>>(free);
        drop(q);
        self.changed.notify_all();
    }

    /// Answers what is due, for ever.
    fn answer_all(&self) {
        let mut q = lock(&self.queue);
        loop {
            let now = Instant::now();
            match q.waiting.peek().map(|w| w.due) {
                None => q = self.changed.wait(q).unwrap_or_else(PoisonError::into_inner),
                Some(due) if due > now => {
                    q = self
                        .changed
                        .wait_timeout(q, due - now)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                Some(_) => {
                    let Some(w) = q.waiting.pop() else { continue };
                    let faults = q.faults.clone();
                    drop(q);
                    self.answer(w, &faults);
                    q = lock(&self.queue);
                }
            }
        }
    }

    fn answer(&self, w: Waiting, faults: &Faults) {
        if touches(&faults.broken, w.offset, u64::from(w.size)) {
            return w.reply.error(Errno::EIO);
        }
        let len = faults.truncated.map_or(self.len, |t| t.min(self.len));
        let mut n = u64::from(w.size).min(len.saturating_sub(w.offset));
        if let Some(short) = faults.short {
            n = n.min(u64::from(short));
        }
        let mut bytes = vec![0; n as usize];
        (self.content)(w.offset, &mut bytes);
        w.reply.data(&bytes);
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let file = ino != INodeNo::ROOT;
        let size = if file { self.len_now() } else { 0 };
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if file { 0o444 } else { 0o555 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

struct Files(Arc<Server>);

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.set_congestion_threshold(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = match name.to_str() {
            Some(FILE) => INODE,
            Some(UNCACHED) => INODE_UNCACHED,
            _ => return reply.error(Errno::ENOENT),
        };
        if parent == INodeNo::ROOT {
            reply.entry(&TTL, &self.0.attributes(ino), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match ino {
            INodeNo::ROOT | INODE | INODE_UNCACHED => reply.attr(&TTL, &self.0.attributes(ino)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = match ino {
            INODE_UNCACHED => FopenFlags::FOPEN_DIRECT_IO,
            // Kept pages stay: whoever wants them gone says so with posix_fadvise.
            _ => FopenFlags::FOPEN_KEEP_CACHE,
        };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let server = &self.0;
        let (spread, tail) = (server.random(), server.random());
        let mut q = lock(&server.queue);
        let this =
            |r: &std::ops::Range<u64>| touches(std::slice::from_ref(r), offset, u64::from(size));
        if let Some(at) = q.faults.broken_once.iter().position(this) {
            q.faults.broken_once.swap_remove(at);
            return reply.error(Errno::EIO);
        }
        let waiting = Waiting {
            due: Instant::now() + q.faults.delay.draw(spread, tail),
            offset,
            size,
            reply,
        };
        if touches(&q.faults.stuck, offset, u64::from(size)) {
            q.stuck.push(waiting);
            return;
        }
        q.waiting.push(waiting);
        drop(q);
        server.changed.notify_all();
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (INODE, FileType::RegularFile, FILE),
            (INODE_UNCACHED, FileType::RegularFile, UNCACHED),
        ];
        for (i, (ino, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(ino, i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

/// Serves a file of `len` bytes at `mountpoint`, whose bytes from a position on are what `content` writes. Reads
/// [`Faults`] from standard input, a line of JSON each, and confirms each by a line on standard output; a line may also ask
/// how many reads are stuck ([`Storage::stuck`](crate::Storage::stuck)). Ends, and unmounts, when standard input ends.
///
/// # Errors
///
/// The file system cannot be mounted: root, or `fusermount3` of the package fuse3, is needed, and `/dev/fuse`.
pub fn serve(
    mountpoint: &Path,
    len: u64,
    content: impl Fn(u64, &mut [u8]) + Send + Sync + 'static,
) -> io::Result<()> {
    let server = Arc::new(Server {
        len,
        content: Box::new(content),
        queue: Mutex::default(),
        changed: Condvar::new(),
        random: AtomicU64::new(1),
    });
    let answering = server.clone();
    std::thread::Builder::new()
        .name("answers".into())
        .spawn(move || answering.answer_all())?;
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::FSName("faultless-storage".to_owned()),
        MountOption::DefaultPermissions,
    ];
    config.n_threads = Some(THREADS);
    let session = fuser::spawn_mount(Files(server.clone()), mountpoint, &config)?;
    let mut out = io::stdout();
    writeln!(out, "{READY}")?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let told = serde_json::from_str(&line);
        let answer = match told {
            _ if line == STUCK => lock(&server.queue).stuck.len().to_string(),
            Ok(faults) => {
                server.set(faults);
                READY.to_owned()
            }
            Err(e) => e.to_string(),
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    // What is stuck is answered, or the unmounting would wait.
    server.set(Faults::default());
    session.umount_and_join()?;
    // Whoever asked for it may have died: nothing is left behind.
    let _ = std::fs::remove_dir(mountpoint);
    Ok(())
}
