//! The C interface: `include/faultless.h` declares it and says what each function does.

#![allow(unsafe_code, reason = "pointers of C programs")]

use faultless::{
    Advice, ByteSize, Map, PinnedOwned, Pool, PoolStats, Reads, Source, Stats, standin,
};
use faultless_untrusted::printable;
use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// `faultless_pool`.
pub(crate) struct CPool {
    pool: Pool,
    backend: CString,
}

/// `faultless_map`.
pub(crate) struct CMap(Arc<Map>);

/// `faultless_pin`.
pub(crate) struct CPin {
    _pinned: PinnedOwned,
}

/// `struct faultless_range`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct CRange {
    offset: usize,
    len: usize,
}

thread_local! {
    static ERROR: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// What a C function returns for a result; the reason is kept for `faultless_error`.
fn done(result: Result<(), String>) -> c_int {
    let (code, error) = match result {
        Ok(()) => (0, None),
        Err(why) => (-1, CString::new(why.replace('\0', "?")).ok()),
    };
    // (In a destructor of thread-specific data it is gone, and the code has to do.)
    let _ = ERROR.try_with(|e| *e.borrow_mut() = error);
    code
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Gives a new handle to the program.
fn hand_out<T>(to: *mut *mut T, made: Result<T, String>) -> c_int {
    done(made.and_then(|made| {
        if to.is_null() {
            return Err("the pointer for the result is NULL".to_owned());
        }
        // SAFETY: checked; the program's promise that it points to a pointer.
        unsafe { *to = Box::into_raw(Box::new(made)) };
        Ok(())
    }))
}

/// A handle that the program passes in.
fn handle<'a, T>(at: *const T) -> Result<&'a T, String> {
    // SAFETY: null or, by the program's promise, a handle that was given out and is not closed.
    unsafe { at.as_ref() }.ok_or_else(|| "the handle is NULL".to_owned())
}

fn close<T>(at: *mut T) {
    if !at.is_null() {
        // SAFETY: by the program's promise a handle that was given out, and is closed once.
        drop(unsafe { Box::from_raw(at) });
    }
}

/// The range from `offset` on.
fn range(offset: usize, len: usize) -> Result<std::ops::Range<usize>, String> {
    let end = offset
        .checked_add(len)
        .ok_or("the range ends beyond all addresses")?;
    Ok(offset..end)
}

#[unsafe(no_mangle)]
extern "C" fn faultless_error() -> *const c_char {
    let text = |e: &RefCell<Option<CString>>| e.borrow().as_ref().map(|e| e.as_ptr());
    ERROR.try_with(text).ok().flatten().unwrap_or(c"".as_ptr())
}

#[unsafe(no_mangle)]
extern "C" fn faultless_pool_open(memory: u64, pool: *mut *mut CPool) -> c_int {
    let mut builder = Pool::builder();
    if memory > 0 {
        builder = builder.memory(ByteSize::new(memory));
    }
    let made = builder.build().map_err(text).map(|pool| CPool {
        backend: CString::new(pool.backend().to_string()).unwrap_or_default(),
        pool,
    });
    hand_out(pool, made)
}

#[unsafe(no_mangle)]
extern "C" fn faultless_pool_resize(pool: *mut CPool, memory: u64) -> c_int {
    done(handle(pool).and_then(|p| p.pool.resize(ByteSize::new(memory)).map_err(text)))
}

#[unsafe(no_mangle)]
extern "C" fn faultless_pool_backend(pool: *const CPool) -> *const c_char {
    handle(pool).map_or(c"".as_ptr(), |p| p.backend.as_ptr())
}

#[unsafe(no_mangle)]
extern "C" fn faultless_pool_close(pool: *mut CPool) {
    close(pool);
}

/// A descriptor of the program's, for the time of a call. (A copy of it would have to be closed, which costs the program its
/// POSIX locks on the file.)
struct Borrowed(c_int);

impl Source for Borrowed {
    fn len(&self) -> std::io::Result<u64> {
        Ok(faultless_sys::file::status(self.0)?.len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        // SAFETY: the buffer is writable for its length.
        Ok(unsafe {
            faultless_sys::file::pread(self.0, buf.as_mut_ptr() as usize, buf.len(), offset)
        }?)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: open for the time of the program's call, in which this lives.
        Some(unsafe { BorrowedFd::borrow_raw(self.0) })
    }

    fn name(&self) -> String {
        let link = format!("/proc/thread-self/fd/{}", self.0);
        std::fs::read_link(link).map_or_else(
            |_| format!("descriptor {}", self.0),
            |p| printable(&p).to_string(),
        )
    }
}

const TRUSTED: c_uint = 1;
const BUFFERED: c_uint = 2;
const RANDOM: c_uint = 4;
const SEQUENTIAL: c_uint = 8;

fn map(
    pool: &CPool,
    file: BorrowedFd<'_>,
    offset: u64,
    len: usize,
    flags: c_uint,
) -> Result<CMap, String> {
    if flags & !(TRUSTED | BUFFERED | RANDOM | SEQUENTIAL) != 0
        || flags & RANDOM != 0 && flags & SEQUENTIAL != 0
    {
        return Err(format!(
            "the flags are {flags:#x}: use those of faultless.h, and not both RANDOM and SEQUENTIAL"
        ));
    }
    let mut options = pool.pool.options().offset(offset);
    if len > 0 {
        options = options.len(len);
    }
    if flags & BUFFERED != 0 {
        options = options.reads(Reads::Buffered);
    }
    if flags & RANDOM != 0 {
        options = options.advice(Advice::Random);
    }
    if flags & SEQUENTIAL != 0 {
        options = options.advice(Advice::Sequential);
    }
    let map = if flags & TRUSTED != 0 {
        // SAFETY: the program vouches for the bytes.
        unsafe { options.map_trusted(Borrowed(file.as_raw_fd())) }
    } else {
        options.map(file)
    };
    map.map(|m| CMap(Arc::new(m))).map_err(text)
}

#[unsafe(no_mangle)]
extern "C" fn faultless_map_open(
    pool: *mut CPool,
    path: *const c_char,
    flags: c_uint,
    to: *mut *mut CMap,
) -> c_int {
    let made = handle(pool).and_then(|pool| {
        if path.is_null() {
            return Err("the path is NULL".to_owned());
        }
        // SAFETY: by the program's promise a NUL-terminated string.
        let path = OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes());
        let file = faultless_untrusted::input::open(std::path::Path::new(path))
            .map_err(|e| format!("cannot open {}: {e}", printable(path)))?;
        let made = map(pool, file.as_fd(), 0, 0, flags);
        if standin::posix_locked(file.as_raw_fd()) {
            // Closing it would drop the program's locks on the file: it stays.
            std::mem::forget(file);
        }
        made
    });
    hand_out(to, made)
}

#[unsafe(no_mangle)]
extern "C" fn faultless_map_fd(
    pool: *mut CPool,
    fd: c_int,
    offset: u64,
    len: usize,
    flags: c_uint,
    to: *mut *mut CMap,
) -> c_int {
    let made = handle(pool).and_then(|pool| {
        if fd < 0 {
            return Err(format!("the descriptor is {fd}"));
        }
        // SAFETY: by the program's promise open for the time of the call; if not, the kernel says so.
        map(
            pool,
            unsafe { BorrowedFd::borrow_raw(fd) },
            offset,
            len,
            flags,
        )
    });
    hand_out(to, made)
}

#[unsafe(no_mangle)]
extern "C" fn faultless_map_data(map: *const CMap) -> *const c_void {
    handle(map).map_or(std::ptr::null(), |m| m.0.as_ptr().cast())
}

#[unsafe(no_mangle)]
extern "C" fn faultless_map_len(map: *const CMap) -> usize {
    handle(map).map_or(0, |m| m.0.len())
}

#[unsafe(no_mangle)]
extern "C" fn faultless_map_close(map: *mut CMap) {
    close(map);
}

#[unsafe(no_mangle)]
extern "C" fn faultless_pin_range(
    map: *mut CMap,
    offset: usize,
    len: usize,
    pin: *mut *mut CPin,
) -> c_int {
    let made = handle(map).and_then(|map| {
        let pinned = map.0.pin_owned(range(offset, len)?).map_err(text)?;
        Ok(CPin { _pinned: pinned })
    });
    hand_out(pin, made)
}

#[unsafe(no_mangle)]
extern "C" fn faultless_unpin(pin: *mut CPin) {
    close(pin);
}

#[unsafe(no_mangle)]
extern "C" fn faultless_load(map: *mut CMap, offset: usize, len: usize) -> c_int {
    let loaded = |m: &CMap| m.0.load(range(offset, len)?).map(drop).map_err(text);
    done(handle(map).and_then(loaded))
}

/// The ranges that a program passes in.
///
/// # Safety
///
/// By the program's promise `ranges` points to so many, unless there are none.
unsafe fn ranges(ranges: *const CRange, count: usize) -> Result<Vec<Range<usize>>, String> {
    // (A range that ends beyond all addresses is out of every map's range.)
    let whole = |r: &CRange| r.offset..r.offset.saturating_add(r.len);
    if count == 0 {
        return Ok(Vec::new());
    }
    if ranges.is_null() {
        return Err("the pointer to the ranges is NULL".to_owned());
    }
    // SAFETY: the caller's promise; not NULL.
    let ranges = unsafe { std::slice::from_raw_parts(ranges, count) };
    Ok(ranges.iter().map(whole).collect())
}

/// Writes what came of each range, and says why the first failed that did.
fn each<T>(
    results: Vec<Result<T, faultless::Error>>,
    mut put: impl FnMut(usize, Option<T>),
) -> Result<(), String> {
    let mut first = Ok(());
    for (i, result) in results.into_iter().enumerate() {
        if let (Err(e), Ok(())) = (&result, &first) {
            first = Err(format!("range {i}: {e}"));
        }
        put(i, result.ok());
    }
    first
}

#[unsafe(no_mangle)]
extern "C" fn faultless_load_many(
    map: *mut CMap,
    of: *const CRange,
    count: usize,
    failed: *mut u8,
) -> c_int {
    // SAFETY: the program's promise.
    let asked = unsafe { ranges(of, count) };
    if !failed.is_null() {
        // SAFETY: by the program's promise it has room for one byte for each range.
        unsafe { std::ptr::write_bytes(failed, 1, count) };
    }
    done(handle(map).and_then(|m| {
        each(m.0.load_many(&asked?), |i, loaded| {
            if !failed.is_null() {
                // SAFETY: by the program's promise it has room for one byte for each range.
                unsafe { *failed.add(i) = u8::from(loaded.is_none()) };
            }
        })
    }))
}

#[unsafe(no_mangle)]
extern "C" fn faultless_pin_many(
    map: *mut CMap,
    of: *const CRange,
    count: usize,
    pins: *mut *mut CPin,
) -> c_int {
    // SAFETY: the program's promise.
    let asked = unsafe { ranges(of, count) };
    if !pins.is_null() {
        // SAFETY: by the program's promise it has room for one pointer for each range.
        unsafe { std::ptr::write_bytes(pins, 0, count) };
    }
    done(handle(map).and_then(|m| {
        if pins.is_null() && count > 0 {
            return Err("the pointer for the results is NULL".to_owned());
        }
        each(m.0.pin_many_owned(&asked?), |i, pinned| {
            let pin = pinned.map(|pinned| Box::into_raw(Box::new(CPin { _pinned: pinned })));
            // SAFETY: by the program's promise it has room for one pointer for each range.
            unsafe { *pins.add(i) = pin.unwrap_or(std::ptr::null_mut()) };
        })
    }))
}

/// A descriptor of the program's, to write to.
struct Out(c_int);

impl std::io::Write for Out {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // SAFETY: the bytes are readable for their length.
        let n = unsafe { libc::write(self.0, bytes.as_ptr().cast(), bytes.len()) };
        usize::try_from(n).map_err(|_| std::io::Error::last_os_error())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn faultless_write_to(map: *mut CMap, fd: c_int, offset: usize, len: usize) -> c_int {
    let write = |m: &CMap| {
        let written = m.0.write_to(Out(fd), range(offset, len)?);
        written.map(drop).map_err(text)
    };
    done(handle(map).and_then(write))
}

#[unsafe(no_mangle)]
extern "C" fn faultless_prefetch(map: *mut CMap, offset: usize, len: usize) -> c_int {
    let prefetch = |m: &CMap| m.0.prefetch(range(offset, len)?).map_err(text);
    done(handle(map).and_then(prefetch).map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn faultless_release(map: *mut CMap, offset: usize, len: usize) -> c_int {
    done(handle(map).and_then(|m| m.0.release(range(offset, len)?).map_err(text)))
}

#[unsafe(no_mangle)]
extern "C" fn faultless_is_resident(map: *const CMap, offset: usize, len: usize) -> c_int {
    let there = handle(map)
        .and_then(|m| Ok(m.0.is_resident(range(offset, len)?)))
        .unwrap_or(false);
    c_int::from(there)
}

/// `struct faultless_stats`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct CStats {
    misses: u64,
    fills: u64,
    bytes_read: u64,
    evictions: u64,
    errors: u64,
    memory: u64,
    used: u64,
    peak: u64,
    fill_p50_ns: u64,
    fill_p99_ns: u64,
}

impl CStats {
    fn of(stats: &Stats) -> Self {
        let ns = |q| {
            stats
                .fill_latency
                .quantile(q)
                .unwrap_or_default()
                .as_nanos() as u64
        };
        CStats {
            misses: stats.misses,
            fills: stats.fills,
            bytes_read: stats.bytes_read,
            evictions: stats.evictions,
            errors: stats.errors,
            fill_p50_ns: ns(0.5),
            fill_p99_ns: ns(0.99),
            ..CStats::default()
        }
    }

    fn of_pool(stats: &PoolStats) -> Self {
        CStats {
            memory: stats.budget.get(),
            used: stats.used.get(),
            peak: stats.peak.get(),
            ..CStats::of(&stats.maps)
        }
    }

    /// Fills as much of the program's structure as it has: an older one ends earlier, a newer one is zero behind ours.
    fn give(&self, to: *mut CStats, size: usize) -> Result<(), String> {
        if to.is_null() {
            return Err("the structure is NULL".to_owned());
        }
        // SAFETY: by the program's promise `size` bytes are writable; no more than ours has are copied.
        unsafe {
            std::ptr::write_bytes(to.cast::<u8>(), 0, size);
            let n = size.min(size_of::<CStats>());
            std::ptr::copy_nonoverlapping(
                std::ptr::from_ref(self).cast::<u8>(),
                to.cast::<u8>(),
                n,
            );
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn faultless_pool_stats(pool: *const CPool, to: *mut CStats, size: usize) -> c_int {
    done(handle(pool).and_then(|p| CStats::of_pool(&p.pool.stats()).give(to, size)))
}

#[unsafe(no_mangle)]
extern "C" fn faultless_map_stats(map: *const CMap, to: *mut CStats, size: usize) -> c_int {
    done(handle(map).and_then(|m| CStats::of(&m.0.stats()).give(to, size)))
}
