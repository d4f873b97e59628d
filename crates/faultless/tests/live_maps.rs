//! Maps of files that change: the kernel's mapping, and loads that ask first.
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "vouches for test files; makes system calls with raw pointers"
)]

mod common;

use common::{PAGE, check, content, dir, eventually, file, forget, open, pool};
use faultless::{Advice, Error, Map};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const LEN: usize = (2 << 20) + 12_345;

fn live(path: &Path) -> Map {
    unsafe { pool(16).map_live(open(path)) }.expect("mapped")
}

fn major_faults() -> i64 {
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    assert_eq!(
        unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) },
        0
    );
    usage.ru_majflt
}

/// Has nothing of a map in memory, here and in the page cache.
fn make_cold(map: &Map, path: &Path) {
    map.release(..).expect("released");
    forget(path);
}

#[test]
fn bytes_are_the_file_s_by_every_way_to_ask_for_them() {
    let dir = dir();
    let path = file(dir.path(), "a", 1, LEN);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    for advice in [Advice::Normal, Advice::Random, Advice::Sequential] {
        for offset in [0, 1, 5_000, 1 << 20] {
            let pool = pool(16);
            let options = pool.options().offset(offset as u64).advice(advice);
            let map = Arc::new(unsafe { options.map_live(open(&path)) }.expect("mapped"));
            assert_eq!(map.len(), LEN - offset);
            make_cold(&map, &path);
            check(map.load(100..300_000).expect("loaded"), 1, offset + 100);
            make_cold(&map, &path);
            let ranges = [700_000..700_001, 4_096..8_192, 20_000..600_000];
            for (range, bytes) in ranges.iter().zip(map.load_many(&ranges)) {
                check(bytes.expect("loaded"), 1, offset + range.start);
            }
            make_cold(&map, &path);
            let pinned = map.pin_owned(9_000..19_000).expect("pinned");
            check(&pinned, 1, offset + 9_000);
            drop(pinned);
            make_cold(&map, &path);
            let later = runtime.block_on(map.load_async(50_000..90_000));
            check(later.expect("loaded"), 1, offset + 50_000);
            make_cold(&map, &path);
            map.prefetch(..).expect("asked for");
            check(&map, 1, offset);
        }
    }
}

/// What was asked for is in memory: the touch reads nothing. (The kernel may take a page back at any time, so one round is not enough.)
#[test]
fn a_range_that_was_asked_for_is_touched_without_a_read() {
    let dir = dir();
    let path = file(dir.path(), "a", 2, LEN);
    let map = live(&path);
    let range = 123_456..654_321;
    make_cold(&map, &path);
    if map.is_resident(..) {
        let test = "a_range_that_was_asked_for_is_touched_without_a_read";
        return common::not_run(test, "the file system keeps pages that are to go (tmpfs?)");
    }
    let reads_of_touches = |load: bool| {
        make_cold(&map, &path);
        if load {
            map.load(range.clone()).expect("loaded");
        }
        let before = major_faults();
        check(&map[range.clone()], 2, range.start);
        major_faults() - before
    };
    let (mut without, mut with) = (0, 0);
    for _ in 0..20 {
        without += i32::from(reads_of_touches(false) > 0);
        with += i32::from(reads_of_touches(true) > 0);
    }
    assert!(
        without > 15,
        "touches of what nothing was asked of: {without}"
    );
    assert!(with < 5, "touches of what was asked for: {with}");
}

#[test]
fn prefetched_ranges_and_a_recorded_working_set_come_into_memory() {
    let dir = dir();
    let path = file(dir.path(), "a", 9, LEN);
    let map = live(&path);
    make_cold(&map, &path);
    // (The kernel may take a page back at any time.)
    eventually("all of it is in memory", || {
        map.prefetch(..).expect("asked for").wait();
        map.is_resident(..)
    });

    make_cold(&map, &path);
    map.load(100_000..900_000).expect("loaded");
    let mut saved = Vec::new();
    map.record().save(&mut saved).expect("saved");
    eventually("the working set is in memory", || {
        make_cold(&map, &path);
        let warmed = map.warm(&saved[..]).expect("read in");
        assert!(warmed.wanted >= 800_000);
        warmed.resident == warmed.wanted
    });
    check(&map, 9, 0);
}

/// Of a file that has become shorter, the rest of a recording is read all the same.
#[test]
fn a_recording_of_a_longer_file_brings_in_what_is_left() {
    let dir = dir();
    let path = file(dir.path(), "a", 10, LEN);
    let map = live(&path);
    map.load(..).expect("loaded");
    let mut saved = Vec::new();
    map.record().save(&mut saved).expect("saved");
    let writer = File::options().write(true).open(&path).expect("opened");
    writer.set_len(100_000).expect("truncated");
    eventually("what is left is in memory", || {
        make_cold(&map, &path);
        map.warm(&saved[..]).expect("read in");
        map.is_resident(..100_000)
    });
    check(map.load(..100_000).expect("loaded"), 10, 0);
}

#[test]
fn a_forked_child_reads_the_mapping_and_asks_for_nothing() {
    let output = common::isolated(
        "a_forked_child_reads_the_mapping_and_asks_for_nothing",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 11, LEN);
            let map = live(&path);
            match unsafe { libc::fork() } {
                0 => {
                    check(&map, 11, 0);
                    let refused = matches!(map.load(..), Err(Error::Forked));
                    unsafe { libc::_exit(if refused { 0 } else { 1 }) }
                }
                child => {
                    let mut status = 0;
                    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                    assert_eq!(status, 0);
                    check(map.load(..).expect("loaded"), 11, 0);
                }
            }
        },
    );
    assert!(output.status.success(), "{output:?}");
}

/// The program closes all descriptors, and puts others in their place.
#[test]
fn a_map_outlives_a_program_that_closes_all_descriptors() {
    let output = common::isolated(
        "a_map_outlives_a_program_that_closes_all_descriptors",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 12, LEN);
            let short = file(dir.path(), "short", 13, 10);
            let map = live(&path);
            make_cold(&map, &path);
            assert_eq!(unsafe { libc::close_range(3, !0, 0) }, 0);
            let others: Vec<File> = (0..50).map(|_| open(&short)).collect();
            check(map.load(..).expect("loaded"), 12, 0);
            drop(others);
        },
    );
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_map_shows_what_a_writer_writes_and_where_the_file_ends() {
    let dir = dir();
    let path = file(dir.path(), "a", 3, LEN);
    let map = live(&path);
    check(map.load(..).expect("loaded"), 3, 0);
    let writer = File::options()
        .write(true)
        .open(&path)
        .expect("no lease is held");
    writer.write_all_at(&content(4, LEN), 0).expect("written");
    check(map.load(..).expect("loaded"), 4, 0);

    writer.set_len(8 * PAGE as u64 + 5).expect("truncated");
    check(map.load(..8 * PAGE + 5).expect("what is left"), 4, 0);
    let gone = map.load(5 * PAGE..20 * PAGE);
    match gone {
        Err(Error::PastEnd { offset, .. }) => assert_eq!(offset, 9 * PAGE as u64),
        other => panic!("{other:?}"),
    }
    let ranges = [0..PAGE, 9 * PAGE..9 * PAGE + 1, PAGE..2 * PAGE];
    let loaded: Vec<bool> = map.load_many(&ranges).iter().map(Result::is_ok).collect();
    assert_eq!(loaded, [true, false, true]);

    writer.write_all_at(&content(5, LEN), 0).expect("written");
    check(map.load(..).expect("loaded"), 5, 0);
}

/// The descriptor is the engine's own.
#[test]
fn a_map_outlives_the_descriptor_and_the_name_of_its_file() {
    let dir = dir();
    let path = file(dir.path(), "a", 6, LEN);
    let map = live(&path);
    forget(&path);
    std::fs::remove_file(&path).expect("removed");
    check(map.load(..).expect("loaded"), 6, 0);
}

#[test]
fn what_is_no_regular_file_is_refused_and_an_empty_one_is_an_empty_map() {
    let dir = dir();
    let refused = unsafe { pool(16).map_live(open(Path::new("/dev/zero"))) };
    assert!(matches!(refused, Err(Error::Lease { .. })), "{refused:?}");
    let map = live(&file(dir.path(), "empty", 7, 0));
    assert!(map.is_empty() && map.load(..).expect("nothing").is_empty());
    assert!(matches!(
        live(&file(dir.path(), "one", 7, 1)).load(0..2),
        Err(Error::OutOfRange { .. })
    ));
}

/// A map is as large as the file, and the pool's budget has no part in it.
#[test]
fn the_budget_is_not_charged() {
    let dir = dir();
    let path = file(dir.path(), "a", 8, 24 << 20);
    let pool = pool(16);
    let before = pool.stats().used;
    let map = unsafe { pool.map_live(open(&path)) }.expect("mapped");
    check(map.load(..).expect("loaded"), 8, 0);
    assert!(map.is_resident(..));
    assert_eq!(pool.stats().used, before);
}
