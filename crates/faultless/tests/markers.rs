//! Live maps whose plain loads are served by guard markers. Each test runs in a process of its own: markers have a handler of the process's.
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "vouches for test files; makes system calls with raw pointers"
)]

mod common;

use common::{PAGE, check, content, dir, eventually, file, forget, fork, isolated_ok, open, pool};
use faultless::{GuardMarkers, Map};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const LEN: usize = (8 << 20) + 12_345;

/// A map of a cold file.
fn marked(path: &Path) -> Arc<Map> {
    forget(path);
    let pool = pool(16);
    let options = pool.options().markers(GuardMarkers::WherePossible);
    Arc::new(unsafe { options.map_live(open(path)) }.expect("mapped"))
}

/// Runs a test where the kernel and the file system can do it.
fn with_markers(test: &str, body: impl FnOnce(&Path, Arc<Map>)) {
    let dir = dir();
    let path = file(dir.path(), "a", 1, LEN);
    if let Err(why) = faultless::live::support() {
        return common::not_run(test, why);
    }
    isolated_ok(test, || {
        let map = marked(&path);
        // (The mapping of a file on tmpfs has nothing absent.)
        if !map.is_resident(..) {
            assert!(map.has_markers());
            body(&path, map);
        }
    });
}

/// Hands a part of a map to a system call.
fn write_out(part: &[u8]) -> io::Result<usize> {
    let out = tempfile::tempfile().expect("a file");
    let wrote = unsafe { libc::write(out.as_raw_fd(), part.as_ptr().cast(), part.len()) };
    usize::try_from(wrote).map_err(|_| io::Error::last_os_error())
}

#[test]
fn plain_loads_are_served_and_what_was_loaded_before_is_touched_without_a_miss() {
    let test = "plain_loads_are_served_and_what_was_loaded_before_is_touched_without_a_miss";
    with_markers(test, |path, map| {
        check(&map, 1, 0);
        let misses = map.stats().misses;
        assert!(misses > 0);
        check(&map, 1, 0);
        assert_eq!(map.stats().misses, misses, "they are there now");
        // (What is mapped stays in the page cache.)
        drop(map);
        let map = marked(path);
        for range in [0..1, 5_000..6_000, 4 << 20..LEN] {
            check(map.load(range.clone()).expect("loaded"), 1, range.start);
        }
        let ranges = [1 << 20..(1 << 20) + 9_000, 3 << 20..(3 << 20) + 1];
        for (range, bytes) in ranges.iter().zip(map.load_many(&ranges)) {
            check(bytes.expect("loaded"), 1, range.start);
        }
        assert_eq!(map.stats().misses, 0);
        assert!(map[2 << 20] == content(1, LEN)[2 << 20] && map.stats().misses == 1);
    });
}

#[test]
fn a_pin_keeps_markers_away_from_what_is_handed_to_system_calls() {
    let test = "a_pin_keeps_markers_away_from_what_is_handed_to_system_calls";
    with_markers(test, |path, map| {
        let refused = write_out(&map[1 << 20..(1 << 20) + 100]);
        let refused = refused.expect_err("absent").raw_os_error();
        assert_eq!(refused, Some(libc::EFAULT));
        let pinned = map.pin_owned(1 << 20..3 << 20).expect("pinned");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let later = runtime.block_on(map.pin_async(5 << 20..6 << 20));
        let later = later.expect("pinned");
        // (Also if the page cache has lost them.)
        forget(path);
        assert_eq!(write_out(&pinned).expect("written"), 2 << 20);
        assert_eq!(write_out(&later).expect("written"), 1 << 20);
        drop((pinned, later));
        let mut out = Vec::new();
        map.write_to(&mut out, ..).expect("written");
        assert!(out == content(1, LEN));
    });
}

#[test]
fn markers_come_back_on_pages_that_were_reclaimed() {
    let test = "markers_come_back_on_pages_that_were_reclaimed";
    with_markers(test, |_, map| {
        check(&map, 1, 0);
        let misses = map.stats().misses;
        eventually("pages are missed again", || {
            let at = map.as_ptr().addr();
            let done = unsafe { libc::madvise(at as *mut _, map.len(), libc::MADV_PAGEOUT) };
            assert_eq!(done, 0);
            std::thread::sleep(std::time::Duration::from_millis(300));
            check(&map, 1, 0);
            map.stats().misses > misses
        });
    });
}

#[test]
fn writers_truncation_and_forked_children_find_the_kernel_s_mapping() {
    let test = "writers_truncation_and_forked_children_find_the_kernel_s_mapping";
    with_markers(test, |path, map| {
        let writer = File::options().write(true).open(path).expect("opens");
        writer.write_all_at(&[7; PAGE], 1 << 20).expect("written");
        assert!(map[1 << 20..(1 << 20) + PAGE].iter().all(|&b| b == 7));
        let child = fork(|| {
            check(&map[2 << 20..3 << 20], 1, 2 << 20);
            let written = write_out(&map[4 << 20..5 << 20]);
            i32::from(!matches!(written, Ok(n) if n == 1 << 20))
        });
        let ended = child.ends_within(std::time::Duration::from_secs(60));
        assert!(ended.is_some_and(|status| status.success()));
        writer.set_len(6 << 20).expect("cut");
        assert!(matches!(
            map.load(7 << 20..LEN),
            Err(faultless::Error::PastEnd { .. })
        ));
        check(&map[5 << 20..6 << 20], 1, 5 << 20);
    });
}

#[test]
fn a_handler_that_the_program_installs_later_ends_them() {
    let test = "a_handler_that_the_program_installs_later_ends_them";
    with_markers(test, |_, map| {
        extern "C" fn end(_: i32) {
            unsafe { libc::_exit(3) };
        }
        let end = end as extern "C" fn(i32) as *const () as libc::sighandler_t;
        assert_ne!(unsafe { libc::signal(libc::SIGSEGV, end) }, libc::SIG_ERR);
        eventually("markers are gone", || {
            write_out(&map[1 << 20..2 << 20]).is_ok()
        });
        check(&map, 1, 0);
    });
}

#[test]
fn without_the_option_there_are_none() {
    let dir = dir();
    let path = file(dir.path(), "a", 1, LEN);
    forget(&path);
    let map = unsafe { pool(16).map_live(open(&path)) }.expect("mapped");
    assert!(!map.has_markers());
    assert_eq!(write_out(&map).expect("written"), LEN);
    assert_eq!(map.stats().misses, 0);
}
