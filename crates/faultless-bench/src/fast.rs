//! Fast storage: a disk in memory (zram) with ext4, so that no slow disk hides what a miss costs.
//!
//! A process of its own makes it, and takes it down when its standard input ends, which it does on every exit of the process
//! that asked for it.

#![allow(unsafe_code, reason = "mounts a file system")]

use anyhow::{Context, bail, ensure};
use faultless::ByteSize;
use faultless_untrusted::input::kernel_text;
use faultless_untrusted::printable;
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// The hidden subcommand that runs [`serve`].
pub const COMMAND: &str = "bench-fast";

/// The kernel's interface to disks in memory.
const CONTROL: &str = "/sys/class/zram-control";
/// Room for the file system's own structures.
const REST: u64 = 64 << 20;
/// Memory that is left to the machine.
const SPARE: u64 = 512 << 20;
/// How long to sleep before asking again whether the last process that has a file open there has ended.
const BUSY: Duration = Duration::from_millis(20);

/// What the process says that made it.
#[derive(Debug, Serialize, Deserialize)]
struct Made {
    dir: PathBuf,
    /// Why it is not what it should be, and what that changes.
    note: Option<String>,
}

/// Fast storage, until this is dropped.
#[derive(Debug)]
pub struct Fast {
    child: Child,
    input: Option<ChildStdin>,
    made: Made,
}

impl Fast {
    /// Makes storage for a file of `size`.
    ///
    /// # Errors
    ///
    /// There is not enough memory, or the process cannot be started.
    pub fn start(size: ByteSize) -> anyhow::Result<Self> {
        keep_mounts_apart();
        let mut child = Command::new(std::env::current_exe()?)
            .args([COMMAND, &size.get().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Apart from the terminal's signals: it ends when this process does.
            .process_group(0)
            .spawn()
            .context("cannot start the process that makes fast storage")?;
        let input = child.stdin.take();
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        let Ok(made) = serde_json::from_str(&line) else {
            drop(input);
            let _ = child.wait();
            bail!("there is no fast storage (above)");
        };
        Ok(Fast { child, input, made })
    }

    /// Where the data file is to be.
    pub fn file(&self) -> PathBuf {
        self.made.dir.join("data")
    }

    /// Why it is not what it should be, and what that changes.
    pub fn note(&self) -> Option<&str> {
        self.made.note.as_deref()
    }
}

impl Drop for Fast {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// Makes fast storage for a file of so many bytes, says where, and takes it down when standard input ends.
///
/// # Errors
///
/// There is not enough memory for it, or it cannot be taken down.
pub fn serve(len: u64) -> anyhow::Result<()> {
    let available = meminfo("MemAvailable:").unwrap_or(0);
    ensure!(
        available >= len.saturating_add(REST + SPARE),
        "fast storage holds {} of data in memory, and {} are available; make --size smaller",
        ByteSize::new(len),
        ByteSize::new(available)
    );
    // It must outlive what its parent is sent.
    ignore_signals();
    let dir = crate::private_dir().context("cannot make a directory")?;
    match Disk::new(len + REST, dir.path()) {
        Ok(disk) => {
            let served = wait_for_the_end(&dir.path().join("disk"), None);
            disk.take_down()?;
            served
        }
        Err(e) => {
            let memory = tempfile::Builder::new()
                .prefix("faultless-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
                .tempdir_in("/dev/shm")
                .with_context(|| format!("there is neither a zram device ({e:#}) nor /dev/shm"))?;
            let free = free_bytes(memory.path())?;
            ensure!(
                free.is_none_or(|free| free >= len),
                "there is no zram device ({e:#}), and /dev/shm has room for {} and not for {}; make --size smaller",
                ByteSize::new(free.unwrap_or(0)),
                ByteSize::new(len)
            );
            let note = format!(
                "fast storage is a file in tmpfs, since a zram device cannot be had ({e:#}): there, no read reaches a device, and the \
                 kernel's mmap takes minor faults only"
            );
            wait_for_the_end(memory.path(), Some(note))
        }
    }
}

fn wait_for_the_end(dir: &Path, note: Option<String>) -> anyhow::Result<()> {
    let made = Made {
        dir: dir.to_owned(),
        note,
    };
    let mut out = std::io::stdout();
    let told = writeln!(out, "{}", serde_json::to_string(&made)?).and_then(|()| out.flush());
    if told.is_ok() {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
    }
    Ok(())
}

/// What is mounted from here on, only this process and its children see, so that no other process can hold on to it. (Without the
/// privilege for that, nothing can be mounted either.)
fn keep_mounts_apart() {
    // SAFETY: changes what paths mean for this thread and its children, and mounts nothing.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) == 0 {
            let flags = libc::MS_REC | libc::MS_SLAVE;
            libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                flags,
                std::ptr::null(),
            );
        }
    }
}

/// Room in the file system at a path; `None` for a tmpfs without a limit.
fn free_bytes(at: &Path) -> anyhow::Result<Option<u64>> {
    let path = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: a path that ends, and a structure that is written only.
    let (done, stat) = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut stat), stat)
    };
    ensure!(done == 0, std::io::Error::last_os_error());
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    Ok((stat.f_blocks > 0).then_some(free))
}

fn ignore_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE] {
        // SAFETY: to ignore a signal needs no promise.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

fn meminfo(field: &str) -> Option<u64> {
    let text = kernel_text("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// A zram device with a mounted file system.
struct Disk {
    number: u32,
    /// It is this process that has given it a size: nobody else has taken it.
    ours: bool,
    mounted: Option<CString>,
}

impl Disk {
    fn new(bytes: u64, at: &Path) -> anyhow::Result<Self> {
        // First: where nothing can be removed, nothing is to be made. (To read `hot_add` makes a device.)
        let remove = format!("{CONTROL}/hot_remove");
        std::fs::File::options()
            .write(true)
            .open(&remove)
            .with_context(|| format!("cannot write {remove}"))?;
        let add = format!("{CONTROL}/hot_add");
        let number = kernel_text(&add).with_context(|| format!("cannot read {add}"))?;
        let mut disk = Disk {
            number: number.trim().parse().context("hot_add")?,
            ours: false,
            mounted: None,
        };
        match disk.prepare(bytes, at) {
            Ok(()) => Ok(disk),
            Err(e) => {
                disk.take_down()?;
                Err(e)
            }
        }
    }

    fn prepare(&mut self, bytes: u64, at: &Path) -> anyhow::Result<()> {
        // A little more: the file system takes a part of it for itself.
        self.set("disksize", &(bytes + bytes / 16).to_string())?;
        self.ours = true;
        let device = format!("/dev/zram{}", self.number);
        let mkfs = Command::new("mkfs.ext4")
            .args([
                "-q",
                "-m",
                "0",
                "-E",
                "lazy_itable_init=0,lazy_journal_init=0",
            ])
            .arg(&device)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .context("cannot run mkfs.ext4 (package e2fsprogs)")?;
        ensure!(
            mkfs.status.success(),
            "mkfs.ext4 {device}: {}",
            printable(String::from_utf8_lossy(&mkfs.stderr).trim())
        );
        // Beneath the private directory: its own permissions are the file system's as soon as that is mounted on it.
        let at = at.join("disk");
        std::fs::create_dir(&at).context("cannot make a directory to mount on")?;
        let target = CString::new(at.as_os_str().as_bytes())?;
        let source = CString::new(device.clone())?;
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_NOATIME;
        // SAFETY: three strings that end; no data.
        let mounted = unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                c"ext4".as_ptr(),
                flags,
                std::ptr::null(),
            )
        };
        if mounted != 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("cannot mount {device}"));
        }
        self.mounted = Some(target);
        Ok(())
    }

    fn set(&self, what: &str, value: &str) -> anyhow::Result<()> {
        let path = format!("/sys/block/zram{}/{what}", self.number);
        std::fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))
    }

    /// Unmounts it, and gives the device and its memory back, as soon as nobody uses it any more.
    fn take_down(self) -> anyhow::Result<()> {
        if let Some(at) = &self.mounted {
            let flags = libc::UMOUNT_NOFOLLOW;
            // SAFETY: a string that ends.
            while unsafe { libc::umount2(at.as_ptr(), flags) } != 0 {
                wait_if_busy(std::io::Error::last_os_error())
                    .with_context(|| format!("cannot unmount {}", printable(at.as_bytes())))?;
            }
        }
        let remove = format!("{CONTROL}/hot_remove");
        // Another program may take a device that has no size yet, at any moment: it is that program's then.
        while self.ours || self.is_unused() {
            match std::fs::write(&remove, self.number.to_string()) {
                Ok(()) => break,
                Err(e) => wait_if_busy(e)
                    .with_context(|| format!("cannot write {} to {remove}", self.number))?,
            }
        }
        Ok(())
    }

    /// Whether the device has no size.
    fn is_unused(&self) -> bool {
        let disksize = format!("/sys/block/zram{}/disksize", self.number);
        kernel_text(disksize).is_ok_and(|size| size.trim() == "0")
    }
}

/// Sleeps for a moment, if an error says that something is in use.
fn wait_if_busy(e: std::io::Error) -> std::io::Result<()> {
    if e.raw_os_error() != Some(libc::EBUSY) {
        return Err(e);
    }
    std::thread::sleep(BUSY);
    Ok(())
}
