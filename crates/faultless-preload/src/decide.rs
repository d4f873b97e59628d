//! Which mappings are taken over, and why others are not.

#![allow(unsafe_code, reason = "borrows the program's descriptor")]

use crate::serving::Served;
use crate::state::{self, Entry, STANDING, State};
use crate::waiting::Waiting;
use crate::{limits, mappings, service, threads, trap};
use faultless::live::{self, Live, Support};
use faultless::standin::{StandIn, Wanted};
use faultless::{Error, LeaseRefusal, Reads};
use faultless_run::{Backend, Reads as Wish, Settings, matches};
use faultless_sys::fdtable;
use faultless_sys::file::{self, Status};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::raw::{check, gated};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A call of mmap for reading a file, or for writing as well, with a length of whole pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) addr: usize,
    pub(crate) len: usize,
    /// With `PROT_WRITE`: only live mappings bear that.
    pub(crate) writable: bool,
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

/// Longest mapping that is served live if all of its markers must be installed before the program goes on, in bytes.
const INSTALLED_MAX: usize = 1 << 30;
/// File systems of which mappings are served live without being asked for: of this machine's disks, so that no program has to answer when
/// the engine opens or reads one of their files, this one included.
const LOCAL: [u64; 7] = [
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0xF2F5_2010, // f2fs
    0x7371_7368, // squashfs
    0xE0F5_E1E2, // erofs
    0x9660,      // iso9660
];

/// Flags of mmap that concern the making of a mapping, or nothing at all.
const IDLE: i32 =
    libc::MAP_POPULATE | libc::MAP_NONBLOCK | libc::MAP_DENYWRITE | libc::MAP_EXECUTABLE;
/// Flags that a mapping may have and still be taken over.
const ALLOWED: i32 = libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_NORESERVE | IDLE;

/// Most mappings that have a stand-in at the same time: a forked child makes each of them anew.
const STANDING_MAX: usize = 256;
/// Most bytes that are mapped live, in parts of the memory that the process may have. Their page tables take a part in 512 of them: 0.3 % of memory.
const LIVE_MAX: (u64, u64) = (3 * 512, 1000);
/// Stand-ins begin at multiples of this.
const GRANULE: usize = 2 << 20;

/// What becomes of a call.
#[derive(Debug)]
pub(crate) enum Taken {
    /// It is taken over, and lies at this address.
    At(usize),
    /// The kernel is to make it, and it is taken over when the program has a second thread.
    Later(Waiting),
    /// It is the kernel's.
    No,
}

/// Takes a mapping over, if it should be and can be.
pub(crate) fn take(call: Call) -> Taken {
    look(call).unwrap_or(Taken::No)
}

fn look(call: Call) -> Option<Taken> {
    let settings = state::settings()?;
    if !state::STARTED.load(Ordering::Acquire) || state::foreign() || state::forking() {
        return None;
    }
    // What the kernel refuses, it refuses itself.
    let kind = call.flags & libc::MAP_TYPE;
    if kind != libc::MAP_SHARED && kind != libc::MAP_PRIVATE {
        return None;
    }
    let status = file::status(call.fd).ok()?;
    if !call.offset.is_multiple_of(PAGE as u64) || status.mode & libc::S_IFMT != libc::S_IFREG {
        return None;
    }
    let access = file::open_flags(call.fd).ok()?;
    if access & libc::O_ACCMODE == libc::O_WRONLY || access & libc::O_PATH != 0 {
        return None;
    }
    let path = || std::fs::read_link(format!("/proc/self/fd/{}", call.fd)).unwrap_or_default();
    let file_system = || file::fs_magic(call.fd).ok();
    let data = status.len.saturating_sub(call.offset).min(call.len as u64);
    let written = || !call.writable || is_written(call.fd, call.offset, data);
    // The mappings of a program with one thread are judged when it creates a second.
    if !settings.eager && threads::alone() && call.flags & !ALLOWED == 0 {
        state::LOOKED.store(true, Ordering::Relaxed);
        let (path, file_system) = (path(), file_system());
        let trusted = is_trusted(settings, &path, file_system);
        return Some(Taken::Later(Waiting {
            call,
            id: status.id,
            path,
            trusted,
            file_system,
            written: written(),
        }));
    }
    // What costs little to find out comes first, and nothing is asked of the file system under the lock.
    let cached = cached_share(data, |at, len| {
        file::cached_pages(call.fd, call.offset + at, len).unwrap_or(0)
    });
    if let Err(why) = worth_it(settings, cached) {
        leave(why, call.len, path);
        return None;
    }
    let (path, file_system) = (path(), file_system());
    let trusted = is_trusted(settings, &path, file_system);
    let written = written();
    // Before the lock: this asks the dynamic linker, which may be at work on behalf of a thread that waits for us.
    let ring = uses_io_uring();

    let mut state = state::lock();
    state::LOOKED.store(true, Ordering::Relaxed);
    let known = Known {
        status: &status,
        path: &path,
        trusted,
        file_system,
        ring,
        cached,
        written,
        may_be_written: kind == libc::MAP_SHARED && access & libc::O_ACCMODE == libc::O_RDWR,
    };
    match serve(&mut state, settings, &call, &known, None) {
        Ok(at) => Some(at.map_or(Taken::No, Taken::At)),
        Err(why) => {
            state.leave(&why, call.len, || path);
            None
        }
    }
}

/// Whether a mapping may be served live in this process.
pub(crate) fn may_serve_live(settings: &Settings) -> bool {
    ways(settings).contains(&Way::Live) && live::support().is_ok()
}

/// The same for mappings that are writable.
pub(crate) fn may_serve_writable() -> bool {
    state::settings().is_some_and(may_serve_live)
}

/// Why a mapping is served live, or by a stand-in.
pub(crate) fn why(is_live: bool) -> &'static str {
    let Some(settings) = state::settings() else {
        return "";
    };
    match (settings.backend, is_live) {
        (Backend::Live | Backend::StandIn, _) => "chosen by --backend",
        (Backend::Auto, true) if settings.budget => {
            "no stand-in is possible for it, in spite of --memory"
        }
        (Backend::Auto, true) => "on this kernel a miss in a live mapping takes no mmap_lock",
        (Backend::Auto, false) if settings.budget => "--memory asks for a budget",
        (Backend::Auto, false) => "on this kernel a miss in a live mapping would take mmap_lock",
    }
}

/// The ways to serve a mapping, the preferred one first.
fn ways(settings: &Settings) -> &'static [Way] {
    let gains = || live::support() == Ok(Support::Free);
    match settings.backend {
        Backend::Live => &[Way::Live],
        Backend::StandIn => &[Way::StandIn],
        Backend::Auto if !gains() => &[Way::StandIn],
        // Only a stand-in keeps a budget.
        Backend::Auto if settings.budget => &[Way::StandIn, Way::Live],
        Backend::Auto => &[Way::Live],
    }
}

/// How a mapping is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    StandIn,
    Live,
}

/// Serves a mapping. With advice, the kernel's mapping lies there already. Returns where it lies; `None` if the kernel is to make it.
///
/// # Errors
///
/// Why it is left to the kernel.
pub(crate) fn serve(
    state: &mut State,
    settings: &Settings,
    call: &Call,
    known: &Known<'_>,
    advice: Option<i32>,
) -> Result<Option<usize>, String> {
    permitted(state, settings, call, known)?;
    let mut refused = None;
    for way in ways(settings) {
        let result = match way {
            Way::StandIn => can_stand_in(state, settings, call, known)
                .and_then(|()| stand_in(state, settings, call, known, advice)),
            Way::Live => can_live(state, settings, call, known)
                .and_then(|()| serve_live(state, settings, call, known, advice)),
        };
        match result {
            Ok(at) => return Ok(at),
            Err(why) => refused = Some(refused.unwrap_or(why)),
        }
    }
    refused.map_or(Ok(None), Err)
}

/// Counts a mapping that stays the kernel's.
fn leave(why: &'static str, bytes: usize, path: impl FnOnce() -> PathBuf) {
    state::LOOKED.store(true, Ordering::Relaxed);
    state::lock().leave(why, bytes, path);
}

/// Whether a mapping promises a gain, as far as can be seen from outside.
fn worth_it(settings: &Settings, cached: f64) -> Result<(), &'static str> {
    promises(settings, cached)?;
    if !settings.eager && !settings.dry_run && state::lock().doubt.passes() {
        return Err("the mappings before it were unmapped before they paid");
    }
    Ok(())
}

/// Whether a mapping that waited still promises a gain.
pub(crate) fn promises(settings: &Settings, cached: f64) -> Result<(), &'static str> {
    if !settings.eager && cached >= CACHED {
        return Err(IN_CACHE);
    }
    Ok(())
}

const IN_CACHE: &str = "its pages are in the page cache already";
/// The share of a mapping that must be in the page cache for it to be left alone.
const CACHED: f64 = 0.75;

/// The share of a mapping's data that is in the page cache, of which `cached` counts the pages of a part (where it begins in the
/// mapping, and its length, in bytes). Of much data, parts are looked at.
pub(crate) fn cached_share(len: u64, cached: impl Fn(u64, u64) -> u64) -> f64 {
    /// Bytes of one part.
    const PART: u64 = 1 << 20;
    /// Most parts.
    const PARTS: u64 = 64;
    let pages_of = |bytes: u64| bytes.div_ceil(PAGE as u64).max(1);
    let share = |pages: u64, bytes| pages as f64 / pages_of(bytes) as f64;
    if len <= PART * PARTS {
        return share(cached(0, len), len);
    }
    let step = len / PARTS;
    let whole = |at: u64| at & !(PAGE as u64 - 1);
    let pages = (0..PARTS).map(|i| cached(whole(i * step), PART)).sum();
    share(pages, PART * PARTS)
}

/// File systems whose files nobody can write.
const NEVER_WRITTEN: [u64; 4] = [
    0x7371_7368, // squashfs
    0xE0F5_E1E2, // erofs
    0x9660,      // iso9660
    0x28CD_3D45, // cramfs
];

/// Whether nothing has to guard a file's bytes: the user vouches for them, or nobody can write to them.
fn is_trusted(settings: &Settings, path: &Path, file_system: Option<u64>) -> bool {
    matches(&settings.trust, path) || file_system.is_some_and(|m| NEVER_WRITTEN.contains(&m))
}

/// What is known of a mapping's file.
pub(crate) struct Known<'a> {
    pub(crate) status: &'a Status,
    pub(crate) path: &'a Path,
    pub(crate) trusted: bool,
    /// The type of its file system, if the kernel says.
    pub(crate) file_system: Option<u64>,
    pub(crate) ring: bool,
    pub(crate) cached: f64,
    /// Most of it has been written, or it is not writable.
    pub(crate) written: bool,
    /// It is shared, and the program can make it writable.
    pub(crate) may_be_written: bool,
}

impl Known<'_> {
    /// Whether its file system is one of some types.
    fn is_on(&self, types: &[u64]) -> bool {
        self.file_system.is_some_and(|m| types.contains(&m))
    }
}

/// Checks that need no attempt, for stand-ins and live mappings alike.
fn permitted(
    state: &State,
    settings: &Settings,
    call: &Call,
    known: &Known<'_>,
) -> Result<(), String> {
    let path = known.path;
    let no = |why: &str| Err(why.to_owned());
    if let Some(why) = state.closed {
        return no(why);
    }
    if state::COPYING.load(Ordering::SeqCst) > 0 {
        return no("the program is copying itself without fork at this moment");
    }
    if known.ring {
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
    if call.offset >= known.status.len {
        return no("it begins beyond the end of the file");
    }
    Ok(())
}

/// Whether a live mapping is possible, as far as can be known before it is tried.
fn can_live(
    state: &mut State,
    settings: &Settings,
    call: &Call,
    known: &Known<'_>,
) -> Result<(), String> {
    let no = |why: &str| Err(why.to_owned());
    live::support()?;
    if known.cached >= 1.0 {
        return no(IN_CACHE);
    }
    if !known.is_on(&LOCAL) && !known.trusted && settings.only.is_empty() {
        return no(
            "its file system may be in memory, or served by a program or over a network (--trust or --only serves it all the same)",
        );
    }
    if call.flags & libc::MAP_POPULATE != 0 {
        return no("the program has it read in as it is mapped (MAP_POPULATE)");
    }
    if known.is_on(&IN_MEMORY) {
        return no("its file is in memory (tmpfs, memfd)");
    }
    let private = call.flags & libc::MAP_TYPE == libc::MAP_PRIVATE;
    if (private || call.writable) && call.len > INSTALLED_MAX {
        return no(
            "it is private or writable, and larger than 1 GiB: its markers would all have to be installed before the program goes on",
        );
    }
    if call.writable {
        bears_writes(call, known)?;
    }
    if file::is_dax(call.fd) {
        return no("its storage is memory (DAX)");
    }
    let memory = state.prepare_live()?;
    let live = || state.standing.values().filter_map(|e| e.served.live());
    if live().count() >= live::MOST {
        return Err(format!("there are {} other live mappings", live::MOST));
    }
    let bytes = live().map(|l| l.range().len() as u64).sum::<u64>() + call.len as u64;
    let (part, of) = LIVE_MAX;
    if bytes > memory / of * part {
        return no(
            "the page tables of live mappings would take more than 0.3 % of the memory that this process may have (--backend stand-in needs none)",
        );
    }
    Ok(())
}

/// Whether a writable mapping holds data. A program may also use a file as its memory, and then in ways that the library does not see.
fn bears_writes(call: &Call, known: &Known<'_>) -> Result<(), String> {
    let no = |why: &str| Err(why.to_owned());
    if trap::active() {
        return no("it is writable, and --compat does not see what the kernel writes to");
    }
    if file::is_named(call.fd) == Ok(false) {
        return no("it is writable, and its file has no name: the program uses it as memory");
    }
    if !known.written {
        return no(
            "it is writable, and much of its file has never been written to: nobody has to read that",
        );
    }
    Ok(())
}

/// Whether most of a part of a file has been written, as far as its file system tells. This asks the file system, without the lock.
fn is_written(fd: i32, offset: u64, len: u64) -> bool {
    /// Looks at pieces of a file that lies in many.
    const LOOKS: usize = 16;
    // (A filter that is not known may forbid the question.)
    if limits::check().is_err() {
        return false;
    }
    let (mut at, mut bytes) = (0, 0);
    for _ in 0..LOOKS {
        if at >= len {
            break;
        }
        match file::written(fd, offset + at, len - at) {
            Ok(found) if found.of > 0 => {
                at += found.of;
                bytes += found.bytes;
            }
            // File systems that cannot tell reserve nothing.
            Ok(_) | Err(_) if at == 0 => return true,
            Ok(_) | Err(_) => break,
        }
    }
    bytes >= at / 4 * 3
}

/// Whether a stand-in is possible, as far as can be known before it is tried.
fn can_stand_in(
    state: &State,
    settings: &Settings,
    call: &Call,
    known: &Known<'_>,
) -> Result<(), String> {
    let Known {
        status, trusted, ..
    } = *known;
    let no = |why: &str| Err(why.to_owned());
    if call.writable {
        return no("it is writable, and only live mappings bear that (--backend live)");
    }
    if call.addr != 0 && !call.addr.is_multiple_of(GRANULE) {
        return no("the program asked for an address at which no stand-in can begin");
    }
    if STANDING.load(Ordering::Relaxed) >= STANDING_MAX {
        return no("there are 256 others, and a forked child would have to make each of them anew");
    }
    if settings.no_lease && !trusted {
        return no(
            "it needs a lease, and --no-lease forbids them (--trust, if its bytes do not change)",
        );
    }
    if known.is_on(&IN_MEMORY) {
        return no("its file is in memory (tmpfs, memfd)");
    }
    if known.may_be_written {
        return no(
            "it is shared and its descriptor open for writing, so that mprotect could make it writable",
        );
    }
    if trusted && call.offset + call.len as u64 > status.len.next_multiple_of(PAGE as u64) {
        return no("it reaches beyond the end of a file that may grow (--trust takes no lease)");
    }
    if state.write_locked.contains(&status.id) {
        return no("the program has taken POSIX locks for writing on it");
    }
    if !trusted && state.written.contains(&status.id) {
        return no("its file was opened for writing while it was mapped before");
    }
    Ok(())
}

/// Whether the program has a ring, or the library with which rings are made: what the requests in a ring point to, the kernel
/// reads when it likes. (Rings that are made later, the service thread notices.)
pub(crate) fn uses_io_uring() -> bool {
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

/// What the link of a ring's descriptor says.
const RING: &str = "anon_inode:[io_uring]";

/// Whether a descriptor is a ring's.
pub(crate) fn is_ring(fd: i32) -> bool {
    // Rings are not regular files; most mapped descriptors are.
    file::status(fd).is_ok_and(|st| st.mode & libc::S_IFMT == 0) && fdtable::is_anonymous(fd, RING)
}

/// Whether a descriptor of the process is a ring.
pub(crate) fn has_ring() -> bool {
    has_descriptor_of(RING)
}

/// Whether a descriptor of the process is of a kind.
pub(crate) fn has_descriptor_of(kind: &str) -> bool {
    let mut found = false;
    fdtable::for_each_open(|fd| found = found || fdtable::is_anonymous(fd, kind));
    found
}

/// Begins to serve the kernel's own mapping, which is made before that if it does not lie there already.
fn serve_live(
    state: &mut State,
    settings: &Settings,
    call: &Call,
    known: &Known<'_>,
    advice: Option<i32>,
) -> Result<Option<usize>, String> {
    if settings.dry_run {
        state.would_serve(known.path, call.len, "live");
        return Ok(None);
    }
    let at = match advice {
        Some(_) => call.addr,
        None => match make(call) {
            Some(at) => at,
            // The kernel refuses it to the program as well.
            None => return Ok(None),
        },
    };
    if trap::active() && !trap::in_window(at) {
        state.leave(OUT_OF_WINDOW, call.len, || known.path.to_owned());
        return Ok(Some(at));
    }
    let wanted = live::Wanted {
        // SAFETY: the program's own descriptor, which it keeps open for the time of its call.
        file: unsafe { BorrowedFd::borrow_raw(call.fd) },
        at,
        len: call.len,
        writable: call.writable,
        offset: call.offset,
        flags: call.flags & !IDLE,
        may_be_written: known.may_be_written,
        advice: advice.unwrap_or(libc::MADV_NORMAL),
    };
    // SAFETY: made just now, or found to be plain, and without pages of its own, by the only thread.
    match unsafe { Live::new(&wanted) } {
        Ok(live) => {
            state.insert(Entry {
                served: Served::Live(live),
                path: Arc::from(known.path),
            });
            if call.len > live::FIRST {
                service::has_work();
            }
        }
        // The mapping is there all the same.
        Err(e) => state.leave(&reason(&e), call.len, || known.path.to_owned()),
    }
    Ok(Some(at))
}

/// The program's mapping, as the kernel makes it. `None` if it does not.
fn make(call: &Call) -> Option<usize> {
    let place = match call.addr {
        0 if trap::active() => trap::place(call.len),
        addr => addr,
    };
    let (flags, fd) = (call.flags as usize, call.fd as usize);
    let write = if call.writable { libc::PROT_WRITE } else { 0 };
    let prot = (libc::PROT_READ | write) as usize;
    let args = [place, call.len, prot, flags, fd, call.offset as usize];
    // SAFETY: the program's own call; it replaces nothing, since MAP_FIXED is not among its flags.
    let at = check(unsafe { gated(libc::SYS_mmap, args) }).ok()?;
    mappings::given_out(at, call.len);
    Some(at)
}

/// Makes the stand-in. With advice, the kernel's mapping lies there already and is replaced.
fn stand_in(
    state: &mut State,
    settings: &Settings,
    call: &Call,
    known: &Known<'_>,
    advice: Option<i32>,
) -> Result<Option<usize>, String> {
    let Known { path, trusted, .. } = *known;
    if advice.is_some() && trap::active() && !trap::in_window(call.addr) {
        return Err(OUT_OF_WINDOW.to_owned());
    }
    let pool = state.pool()?;
    // SAFETY: the program's own descriptor, which it keeps open for the time of its call.
    let file = unsafe { BorrowedFd::borrow_raw(call.fd) };
    let reads = match settings.reads {
        Wish::Direct => Reads::Direct,
        Wish::Buffered => Reads::Buffered,
        Wish::Auto if known.cached >= 0.5 => Reads::Buffered,
        Wish::Auto => Reads::Auto,
    };
    let wanted = Wanted {
        file,
        place: match advice {
            None if trap::active() => trap::place(call.len),
            _ => call.addr,
        },
        over: advice.filter(|_| !settings.dry_run),
        len: call.len,
        offset: call.offset,
        flags: call.flags & !IDLE,
        leased: !trusted,
        reads,
    };
    let standin = StandIn::new(&pool, &wanted).map_err(|e| reason(&e))?;
    let at = standin.range().start;
    if trap::active() && !trap::in_window(at) {
        return Err(OUT_OF_WINDOW.to_owned());
    }
    if settings.dry_run {
        // It could be had: that is all that was asked.
        let coherence = if trusted { "trust" } else { "lease" };
        state.would_serve(path, call.len, coherence);
        return Ok(None);
    }
    if let Some(advice) = advice {
        standin.advise(advice);
    }
    if call.flags & libc::MAP_POPULATE != 0 && advice.is_none() {
        let _ = standin.map().prefetch(..);
    }
    let path: Arc<Path> = Arc::from(PathBuf::from(path));
    state.insert(Entry {
        served: Served::StandIn(standin),
        path,
    });
    Ok(Some(at))
}

/// A free place for a mapping that may be taken over later: stand-ins begin at multiples of [`GRANULE`]. 0 if there is none.
pub(crate) fn free_place(len: usize) -> usize {
    if trap::active() {
        return trap::place(len);
    }
    let around = len + GRANULE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // Where the kernel would put the program's mapping, not where the engine's own memory is.
    // SAFETY: no MAP_FIXED: the kernel chooses an unused range.
    let Ok(at) = (unsafe { mem::map(0, around, libc::PROT_NONE, flags, -1, 0) }) else {
        return 0;
    };
    // SAFETY: reserved just now, and shown to nobody.
    let _ = unsafe { mem::unmap(at, around) };
    at.next_multiple_of(GRANULE)
}

const OUT_OF_WINDOW: &str = "there is no room in the window of addresses that --compat watches";

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::io;

    #[test]
    fn of_a_small_mapping_every_page_is_counted_and_of_a_large_one_parts_from_end_to_end() {
        let looked = RefCell::new(Vec::new());
        let note = |at, len| {
            looked.borrow_mut().push((at, len));
            0
        };
        assert_eq!(cached_share(64 << 20, note), 0.0);
        assert_eq!(looked.take(), [(0, 64 << 20)]);
        let len = (10 << 30) + 12_345;
        assert_eq!(cached_share(len, note), 0.0);
        let parts = looked.take();
        assert_eq!(parts.len(), 64);
        assert!(parts.is_sorted() && parts.iter().all(|p| p.0.is_multiple_of(PAGE as u64)));
        assert!(parts.iter().all(|&(at, part)| at + part <= len));
        let last = parts.last().expect("parts").0;
        assert!(last > len / 64 * 62, "the end is looked at too: {last}");
        // Nothing but what is counted decides, whatever the length.
        for len in [1, 4096, 5000, 64 << 20, (64 << 20) + 1, 1 << 40] {
            let all = cached_share(len, |_, part| part.div_ceil(PAGE as u64));
            assert_eq!(all, 1.0, "{len}");
            let half = cached_share(len, |_, part| part.div_ceil(PAGE as u64) / 2);
            assert!(half <= 0.5, "{len}: {half}");
        }
        assert_eq!(cached_share(0, |_, _| 0), 0.0);
    }

    #[test]
    fn a_reason_has_no_name_of_a_file_in_it() {
        let lease = |reason| {
            let name = "/secret/name".to_owned();
            super::reason(&Error::Lease { name, reason })
        };
        let kernel = io::Error::from_raw_os_error(libc::EAGAIN);
        for said in [
            lease(LeaseRefusal::OpenForWriting),
            lease(LeaseRefusal::NotOwner),
            lease(LeaseRefusal::FileSystem {
                file_system: "nfs".into(),
            }),
            lease(LeaseRefusal::Kernel(kernel)),
        ] {
            assert!(said.contains("lease"), "{said}");
            assert!(!said.contains("secret"), "{said}");
        }
        assert!(
            lease(LeaseRefusal::FileSystem {
                file_system: "nfs".into()
            })
            .contains("nfs")
        );
    }
}
