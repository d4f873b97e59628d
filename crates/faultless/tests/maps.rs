//! Maps do what they say: bytes, ranges, pins, prefetch, release, budgets, users' sources.
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "vouches for test files; makes system calls with raw pointers"
)]

mod common;

use common::{PAGE, check, content, dir, eventually, file, open, pool};
use faultless::{Advice, BackendChoice, Batches, ByteSize, Error, Map, Pool, Reads, Source};
use proptest::prelude::*;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

#[test]
fn every_byte_is_the_file_s_whatever_the_options() {
    let dir = dir();
    let len = 3 * (1 << 20) + 12_345;
    let path = file(dir.path(), "a", 1, len);
    let pool = pool(64);
    for unit in [4, 16, 64, 256, 2048] {
        for reads in [Reads::Auto, Reads::Buffered] {
            for advice in [Advice::Normal, Advice::Random, Advice::Sequential] {
                let options = pool
                    .options()
                    .unit(ByteSize::kib(unit))
                    .reads(reads)
                    .advice(advice);
                let map = options.map(open(&path)).expect("mapped");
                assert_eq!(map.len(), len);
                check(&map, 1, 0);
                // The rest of the last page reads as zero, as with mmap.
                let tail =
                    unsafe { std::slice::from_raw_parts(map.as_ptr().add(len), PAGE - len % PAGE) };
                assert!(tail.iter().all(|&b| b == 0));
            }
        }
    }
}

#[test]
fn parts_of_a_file_begin_and_end_anywhere() {
    let dir = dir();
    let len = 1 << 20;
    let path = file(dir.path(), "a", 2, len);
    let pool = pool(16);
    for (offset, part) in [
        (0, 1),
        (1, 1),
        (4095, 2),
        (5000, 100_000),
        (len - 1, 1),
        (777_777, len - 777_777),
    ] {
        let map = pool
            .options()
            .offset(offset as u64)
            .len(part)
            .map(open(&path))
            .expect("mapped");
        assert_eq!(map.len(), part);
        check(&map, 2, offset);
        check(&map.pin(..).expect("pinned"), 2, offset);
    }
    assert!(
        pool.options()
            .offset(len as u64)
            .map(open(&path))
            .expect("empty")
            .is_empty()
    );
    let beyond = pool
        .options()
        .offset(len as u64 + 1)
        .map(open(&path))
        .expect_err("behind the end")
        .to_string();
    assert!(beyond.contains("behind the end"), "{beyond}");
}

#[test]
fn an_empty_file_is_an_empty_map() {
    let dir = dir();
    let path = file(dir.path(), "empty", 0, 0);
    let map = pool(4).map(open(&path)).expect("mapped");
    assert!(
        map.is_empty() && map.pin(..).expect("nothing to pin").is_empty() && map.is_resident(..)
    );
    map.prefetch(..).expect("nothing to do");
    map.release(..).expect("nothing to do");
}

#[test]
fn bad_options_and_ranges_are_named() {
    let dir = dir();
    let path = file(dir.path(), "a", 3, 100_000);
    let pool = pool(4);
    for (unit, value) in [(0, "0 B"), (5000, "4.9 KiB"), (4 << 20, "4 MiB")] {
        let e = pool
            .options()
            .unit(ByteSize::new(unit))
            .map(open(&path))
            .expect_err("unit")
            .to_string();
        assert!(e.contains(value) && e.contains("power of two"), "{e}");
    }
    for (memory, remedy) in [
        (ByteSize::new(0), "at least 1 MiB"),
        (ByteSize::new(u64::MAX), "physical memory"),
    ] {
        let e = Pool::builder()
            .memory(memory)
            .build()
            .expect_err("budget")
            .to_string();
        assert!(e.contains("memory budget") && e.contains(remedy), "{e}");
        let e = pool.resize(memory).expect_err("budget").to_string();
        assert!(e.contains(remedy), "{e}");
    }
    let map = pool.map(open(&path)).expect("mapped");
    let e = map.pin(99_999..100_001).expect_err("range");
    assert_eq!(
        e.to_string(),
        "the range 99999..100001 does not lie in the map, which has 100000 bytes"
    );
    assert!(
        map.prefetch(100_001..).is_err()
            && map.release(5..100_001).is_err()
            && !map.is_resident(..=100_000)
    );
    assert_eq!(io::Error::from(e).kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn the_budgets_of_all_pools_together_cannot_exceed_the_machine() {
    common::isolated_ok(
        "the_budgets_of_all_pools_together_cannot_exceed_the_machine",
        || {
            let text = std::fs::read_to_string("/proc/meminfo").expect("meminfo");
            let kib: u64 = text
                .split_whitespace()
                .nth(1)
                .and_then(|w| w.parse().ok())
                .expect("MemTotal");
            let two_fifths = ByteSize::kib(kib / 5 * 2);
            let build = || Pool::builder().memory(two_fifths).build();
            let (first, second) = (build().expect("two fifths"), build().expect("four fifths"));
            let e = build().expect_err("six fifths").to_string();
            assert!(e.contains("other pools"), "{e}");
            assert!(first.resize(ByteSize::kib(kib)).is_err());
            assert_eq!(first.budget(), two_fifths, "unchanged");
            drop((first, second));
            build().expect("promises are given back");
        },
    );
}

/// Reads through `write(2)`, as a system call that is handed a pointer.
fn write_from(bytes: *const u8, len: usize) -> io::Result<usize> {
    let null = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/zero")
        .expect("/dev/zero");
    let mut pipe = [0; 2];
    unsafe { libc::pipe(pipe.as_mut_ptr()) };
    let n = unsafe { libc::write(pipe[1], bytes.cast(), len) };
    let result = if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n as usize)
    };
    unsafe {
        libc::close(pipe[0]);
        libc::close(pipe[1]);
    }
    drop(null);
    result
}

#[test]
fn a_system_call_gets_efault_for_an_absent_page_and_the_bytes_of_a_pinned_one() {
    let dir = dir();
    let path = file(dir.path(), "a", 4, 1 << 20);
    let map = pool(8).map(open(&path)).expect("mapped");
    let at = unsafe { map.as_ptr().add(5 * PAGE) };
    assert_eq!(
        write_from(at, 100).expect_err("absent").raw_os_error(),
        Some(libc::EFAULT)
    );
    let pinned = map.pin(5 * PAGE..6 * PAGE).expect("pinned");
    assert_eq!(write_from(pinned.as_ptr(), PAGE).expect("resident"), PAGE);
    map.release(..).expect("released");
    assert_eq!(
        write_from(pinned.as_ptr(), PAGE).expect("release leaves pinned pages alone"),
        PAGE
    );
    drop(pinned);
    map.release(..).expect("released");
    assert!(write_from(at, 100).is_err(), "and takes the others");
    check(&map, 4, 0);
}

/// Bytes of huge pages that the kernel has for a map.
fn huge_bytes(map: &Map) -> u64 {
    let start = map.as_ptr() as usize;
    let text = std::fs::read_to_string("/proc/self/smaps").expect("readable");
    let mut inside = false;
    let mut sum = 0;
    for line in text.lines() {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        if let Some((from, to)) = range
            && let (Ok(from), Ok(to)) = (
                usize::from_str_radix(from, 16),
                usize::from_str_radix(to, 16),
            )
        {
            inside = from < start + map.len() && start < to;
        } else if inside && let Some(kib) = line.strip_prefix("AnonHugePages:") {
            sum += kib
                .trim()
                .trim_end_matches(" kB")
                .parse::<u64>()
                .expect("a number")
                << 10;
        }
    }
    sum
}

#[test]
fn units_can_be_huge_pages() {
    let dir = dir();
    // The last unit is none: it is short.
    let len = (23 << 20) + 12_345;
    let path = file(dir.path(), "a", 8, len);
    let open_map = |pool: &Pool, offset: u64| {
        let options = pool.options().huge_pages(true).offset(offset);
        options.map(open(&path))
    };
    let wide = pool(64);
    let map = match open_map(&wide, 0) {
        Ok(map) => map,
        Err(e) => {
            // An old kernel, or one without huge pages.
            assert!(e.to_string().contains("huge pages"), "{e}");
            return;
        }
    };
    let fallbacks = || {
        let text = std::fs::read_to_string("/proc/vmstat").expect("readable");
        text.lines()
            .find(|l| l.starts_with("thp_fault_fallback "))
            .map(str::to_owned)
    };
    let before = fallbacks();
    check(&map, 8, 0);
    let huge = huge_bytes(&map);
    assert!(huge.is_multiple_of(2 << 20) && huge <= 22 << 20, "{huge}");
    // (The kernel may be short of them.)
    assert!(huge > 10 << 20 || fallbacks() != before, "{huge}");
    println!("{huge} bytes of {len} in huge pages");
    map.release(..).expect("given back");
    assert_eq!(huge_bytes(&map), 0);
    check(map.load(5 << 20..9 << 20).expect("loaded"), 8, 5 << 20);
    check(&map.pin(..).expect("pinned"), 8, 0);
    check(&map, 8, 0);
    // In a budget that has room for some, from an offset that is no multiple of anything, by many threads.
    let small = pool(16);
    let map = open_map(&small, 4321).expect("mapped");
    std::thread::scope(|scope| {
        for k in 0..4usize {
            let map = &map;
            scope.spawn(move || {
                for i in 0..200 {
                    let at = (i * 37 + k * 11) * 65_537 % (map.len() - 5000);
                    check(&map[at..at + 5000], 8, at + 4321);
                }
            });
        }
    });
    let stats = small.stats();
    assert!(
        stats.maps.evictions > 0 && stats.peak.get() <= (16 << 20) / 100 * 105,
        "{stats:?}"
    );
    // What does not go together.
    let odd = wide.options().huge_pages(true).unit(ByteSize::kib(64));
    let error = odd.map(open(&path)).expect_err("refused").to_string();
    assert!(
        error.contains("64 KiB") && error.contains("huge"),
        "{error}"
    );
    let error = open_map(&pool(8), 0).expect_err("too small").to_string();
    assert!(error.contains("8 MiB"), "{error}");
}

#[test]
fn a_prefetch_says_what_it_has_dropped_and_ends_with_its_map() {
    let dir = dir();
    let len = 16 << 20;
    let path = file(dir.path(), "a", 5, len);
    let small = pool(2);
    let map = small.map(open(&path)).expect("mapped");
    let all = map.prefetch(..).expect("queued").wait();
    let resident = (0..len)
        .step_by(PAGE)
        .filter(|&at| map.is_resident(at..at + PAGE))
        .count();
    // (Some of what was read has gone since.)
    assert!(resident > 0 && all.dropped > 0, "{all:?} {resident}");
    assert!(
        all.dropped as usize + resident * PAGE <= len,
        "{all:?} {resident}"
    );
    // All over at the end of the map, whatever came of them.
    let many: Vec<_> = (0..len)
        .step_by(2 * PAGE)
        .map(|at| map.prefetch(at..at + PAGE).expect("queued"))
        .collect();
    drop(map);
    many.iter().for_each(|prefetch| _ = prefetch.wait());
}

#[test]
fn prefetched_ranges_become_resident_and_released_ones_absent() {
    let dir = dir();
    let len = 4 << 20;
    let path = file(dir.path(), "a", 5, len);
    let pool = pool(32);
    let map = pool.map(open(&path)).expect("mapped");
    assert!(!map.is_resident(..) && !map.is_resident(0..1));
    let prefetch = map.prefetch(1 << 20..3 << 20).expect("queued");
    assert_eq!(prefetch.wait().dropped, 0);
    assert!(prefetch.is_over() && map.is_resident(1 << 20..3 << 20));
    assert_eq!(map.prefetch(0..0).expect("nothing to do").wait().dropped, 0);
    assert!(!map.is_resident(0..1 << 20), "nothing else is read");
    let before = map.stats();
    check(&map[1 << 20..3 << 20], 5, 1 << 20);
    assert_eq!(
        map.stats().misses,
        before.misses,
        "no miss in what was prefetched"
    );
    map.release(1 << 20..2 << 20).expect("released");
    assert!(!map.is_resident(1 << 20..(1 << 20) + 1) && map.is_resident(2 << 20..3 << 20));
    // Only units that lie wholly in the range go.
    map.release((2 << 20) + 1..(2 << 20) + 2 * PAGE)
        .expect("released");
    assert!(
        map.is_resident(2 << 20..(2 << 20) + PAGE)
            && !map.is_resident((2 << 20) + PAGE..(2 << 20) + PAGE + 1)
    );
    check(&map, 5, 0);
    assert!(map.is_resident(..));
}

#[test]
fn statistics_count_what_happened() {
    let dir = dir();
    let path = file(dir.path(), "a", 6, 100 * PAGE);
    let pool = pool(8);
    let options = pool.options().advice(Advice::Random);
    let map = options.map(open(&path)).expect("mapped");
    for i in 0..50 {
        assert_eq!(map[i * PAGE], common::byte_at(6, i * PAGE));
        assert_eq!(map[i * PAGE + 1], common::byte_at(6, i * PAGE + 1));
    }
    let s = map.stats();
    assert_eq!(
        (s.misses, s.fills, s.bytes_read),
        (50, 50, 50 * PAGE as u64)
    );
    assert_eq!(
        (s.evictions, s.taken_back, s.errors, s.fill_latency.count()),
        (0, 0, 0, 50)
    );
    assert!(s.fill_latency.quantile(0.5).expect("some") > std::time::Duration::from_nanos(500));
    map.release(..).expect("released");
    assert_eq!(map.stats().evictions, 50);
    drop(map);
    let all = pool.stats();
    assert_eq!(
        (all.maps.misses, all.maps.evictions),
        (50, 50),
        "kept when the map is gone"
    );
    assert!(all.page_tables > ByteSize::new(0) && all.used <= all.budget);
}

#[test]
fn dropping_maps_gives_the_budget_back() {
    let dir = dir();
    let path = file(dir.path(), "a", 7, 2 << 20);
    let pool = pool(16);
    let mut settled = None;
    for round in 0..20 {
        let map = pool
            .options()
            .unit(ByteSize::kib(if round % 2 == 0 { 4 } else { 64 }))
            .map(open(&path))
            .expect("mapped");
        check(&map, 7, 0);
        assert!(pool.stats().used >= ByteSize::mib(2));
        drop(map);
        // Staging buffers stay; they are all there after the first rounds. The evictor's queue may come and go.
        let used = pool.stats().used.get();
        let first = *settled.get_or_insert(used);
        assert!(
            used <= first + (1 << 20),
            "round {round}: {used} bytes stay, after the first round {first}"
        );
    }
}

/// Bytes as a function of position, a count of reads, and errors at will.
struct Generated {
    len: u64,
    seed: u64,
    reads: Arc<AtomicUsize>,
    slow: bool,
    fail_at: Option<u64>,
}

impl Generated {
    fn new(len: u64, seed: u64) -> Self {
        Generated {
            len,
            seed,
            reads: Arc::default(),
            slow: false,
            fail_at: None,
        }
    }
}

impl Source for Generated {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if self.slow {
            std::thread::sleep(std::time::Duration::from_millis(30));
        }
        if self
            .fail_at
            .is_some_and(|at| (offset..offset + buf.len() as u64).contains(&at))
        {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        // Short reads, as a decompressor would return.
        let n = buf
            .len()
            .min(1000)
            .min((self.len - offset.min(self.len)) as usize);
        for (i, b) in buf[..n].iter_mut().enumerate() {
            *b = common::byte_at(self.seed, offset as usize + i);
        }
        Ok(n)
    }
    fn name(&self) -> String {
        "generated".to_owned()
    }
}

#[test]
fn many_threads_that_miss_the_same_page_cause_one_read() {
    struct Whole(Generated);
    impl Source for Whole {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            self.0.reads.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(30));
            for (i, b) in buf.iter_mut().enumerate() {
                *b = common::byte_at(8, offset as usize + i);
            }
            Ok(buf.len())
        }
    }
    let source = Whole(Generated::new(16 * PAGE as u64, 8));
    let reads = source.0.reads.clone();
    let options = pool(8).options().advice(Advice::Random);
    let map = unsafe { options.map_trusted(source) }.expect("mapped");
    let start = Barrier::new(32);
    std::thread::scope(|s| {
        for _ in 0..32 {
            s.spawn(|| {
                start.wait();
                for page in 0..16 {
                    check(&map[page * PAGE..(page + 1) * PAGE], 8, page * PAGE);
                }
            });
        }
    });
    assert_eq!(reads.load(Ordering::SeqCst), 16);
}

#[test]
fn users_sources_are_read_by_loads_pins_and_prefetches() {
    let len = 1_000_003u64;
    let pool = pool(8);
    let map = unsafe { pool.map_trusted(Generated::new(len, 9)) }.expect("mapped");
    check(&map.pin(10_000..20_000).expect("pinned"), 9, 10_000);
    map.prefetch(500_000..600_000).expect("queued");
    eventually("the prefetch", || map.is_resident(500_000..600_000));
    check(&map, 9, 0);
    let part = unsafe {
        pool.options()
            .offset(12_345)
            .len(54_321)
            .map_trusted(Generated::new(len, 9))
    }
    .expect("mapped");
    check(&part, 9, 12_345);
}

#[test]
fn a_source_s_alignment_is_honoured() {
    struct Blocks;
    impl Source for Blocks {
        fn len(&self) -> io::Result<u64> {
            Ok(5 * 65_536 + 77)
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            assert_eq!((offset % 65_536, buf.len() % 65_536), (0, 0));
            let n = buf.len().min((5 * 65_536 + 77 - offset) as usize);
            for (i, b) in buf[..n].iter_mut().enumerate() {
                *b = common::byte_at(10, offset as usize + i);
            }
            Ok(n)
        }
        fn alignment(&self) -> usize {
            65_536
        }
    }
    let pool = pool(8);
    check(&unsafe { pool.map_trusted(Blocks) }.expect("mapped"), 10, 0);
    let part = unsafe {
        pool.options()
            .offset(100_000)
            .len(150_000)
            .map_trusted(Blocks)
    }
    .expect("mapped");
    check(&part, 10, 100_000);
    check(&part.pin(140_000..150_000).expect("pinned"), 10, 240_000);
}

#[test]
fn a_read_error_is_an_error_of_pin_and_leaves_the_rest_readable() {
    let mut source = Generated::new(100 * PAGE as u64, 11);
    source.fail_at = Some(50 * PAGE as u64 + 10);
    let map = unsafe { pool(8).map_trusted(source) }.expect("mapped");
    let e = map.pin(49 * PAGE..52 * PAGE).expect_err("page 50 fails");
    match &e {
        Error::Read {
            name,
            offset,
            error,
        } => {
            assert_eq!((name.as_str(), *offset), ("generated", 50 * PAGE as u64));
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
        other => panic!("{other:?}"),
    }
    assert!(
        e.to_string()
            .starts_with("cannot read generated at offset 204800: "),
        "{e}"
    );
    check(&map[..50 * PAGE], 11, 0);
    check(&map.pin(51 * PAGE..).expect("fine"), 11, 51 * PAGE);
    assert!(map.stats().errors >= 1);
}

#[test]
fn a_source_that_panics_is_a_source_that_failed() {
    struct Bomb;
    impl Source for Bomb {
        fn len(&self) -> io::Result<u64> {
            Ok(PAGE as u64)
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            panic!("boom, as the test wants");
        }
    }
    let map = unsafe { pool(4).map_trusted(Bomb) }.expect("mapped");
    assert!(matches!(map.pin(..), Err(Error::Read { .. })));
}

#[test]
fn a_source_may_be_made_of_another_map() {
    struct Reversed(Map);
    impl Source for Reversed {
        fn len(&self) -> io::Result<u64> {
            Ok(self.0.len() as u64)
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            let n = buf.len().min(self.0.len() - offset as usize);
            for (i, b) in buf[..n].iter_mut().enumerate() {
                *b = self.0[self.0.len() - 1 - offset as usize - i];
            }
            Ok(n)
        }
    }
    let dir = dir();
    let len = 300_001;
    let path = file(dir.path(), "a", 12, len);
    let pool = pool(8);
    let inner = pool.map(open(&path)).expect("mapped");
    let map = unsafe { pool.map_trusted(Reversed(inner)) }.expect("mapped");
    assert!((0..len).all(|i| map[i] == common::byte_at(12, len - 1 - i)));
}

#[test]
fn a_pin_that_cannot_fit_is_refused_and_holds_nothing() {
    let dir = dir();
    let path = file(dir.path(), "a", 13, 6 << 20);
    let pool = pool(4);
    let map = pool.map(open(&path)).expect("mapped");
    assert!(matches!(map.pin(..), Err(Error::BudgetExhausted { .. })));
    let some = map.pin(..1 << 20).expect("fits");
    check(&some, 13, 0);
    check(&map, 13, 0);
    pool.resize(ByteSize::mib(16)).expect("resized");
    check(&map.pin(..).expect("fits now"), 13, 0);
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("status");
    let kib = text
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .and_then(|v| v.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0u64) << 10
}

#[test]
fn the_budget_holds_while_64_threads_thrash() {
    common::isolated_ok("the_budget_holds_while_64_threads_thrash", || {
        let dir = dir();
        let len = 48 << 20;
        let path = file(dir.path(), "a", 14, len);
        let budget = ByteSize::mib(8);
        let pool = Pool::builder().memory(budget).build().expect("a pool");
        let maps: Vec<_> = [4, 64]
            .map(|unit| {
                pool.options()
                    .unit(ByteSize::kib(unit))
                    .map(open(&path))
                    .expect("mapped")
            })
            .into_iter()
            .collect();
        let (before, most) = (resident(), AtomicU64::new(0));
        std::thread::scope(|s| {
            for t in 0..64usize {
                let (maps, most) = (&maps, &most);
                s.spawn(move || {
                    let mut x = t as u64 + 1;
                    for i in 0..400 {
                        x = x
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let page = (x >> 33) as usize % (len / PAGE);
                        check(
                            &maps[t % 2][page * PAGE..(page + 1) * PAGE],
                            14,
                            page * PAGE,
                        );
                        if i % 40 == 0 {
                            most.fetch_max(resident(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let stats = pool.stats();
        assert!(stats.maps.evictions > 1000, "{stats:?}");
        let allowed = budget.get() / 100 * 105;
        assert!(
            stats.peak.get() <= allowed,
            "charged {} of {budget}",
            stats.peak
        );
        // What the kernel says: the 64 threads' own stacks and heaps come on top.
        let grown = most.load(Ordering::Relaxed).saturating_sub(before);
        assert!(
            grown <= allowed + 64 * (160 << 10),
            "resident memory grew by {}",
            ByteSize::new(grown)
        );
        pool.resize(ByteSize::mib(2)).expect("smaller");
        eventually("the smaller budget", || {
            pool.stats().used <= ByteSize::mib(2)
        });
        check(&maps[0][..4 << 20], 14, 0);
    });
}

#[test]
fn maps_come_and_go_while_their_neighbours_fault() {
    let dir = dir();
    let paths: Vec<_> = (0..4)
        .map(|i| file(dir.path(), &format!("f{i}"), 100 + i, 512 << 10))
        .collect();
    let pool = pool(4);
    std::thread::scope(|s| {
        for t in 0..8usize {
            let (pool, paths) = (&pool, &paths);
            s.spawn(move || {
                for round in 0..25 {
                    let which = (t + round) % paths.len();
                    let map = pool.map(open(&paths[which])).expect("mapped");
                    map.prefetch(256 << 10..).expect("queued");
                    check(&map, 100 + which as u64, 0);
                }
            });
        }
    });
}

#[test]
fn thousands_of_maps_live_side_by_side() {
    let dir = dir();
    let path = file(dir.path(), "a", 15, 3 * PAGE);
    let pool = pool(64);
    let maps: Vec<_> = (0..3000)
        .map(|_| unsafe { pool.map_trusted(Generated::new(2 * PAGE as u64, 15)) }.expect("mapped"))
        .collect();
    let file_map = pool.map(open(&path)).expect("mapped");
    for map in &maps {
        assert_eq!(map[PAGE], common::byte_at(15, PAGE));
    }
    check(&file_map, 15, 0);
}

#[test]
fn a_sparse_tebibyte_is_mapped_and_read_within_the_budget() {
    let dir = dir();
    let path = dir.path().join("sparse");
    let f = std::fs::File::create(&path).expect("a file");
    f.set_len(1 << 40).expect("a sparse file");
    use std::os::unix::fs::FileExt;
    let step = (1usize << 40) / 2000;
    for i in 0..2000 {
        f.write_all_at(&content(i as u64, 8), (i * step) as u64)
            .expect("written");
    }
    drop(f);
    let pool = pool(8);
    let map = pool.map(open(&path)).expect("mapped");
    assert_eq!(map.len(), 1 << 40);
    for i in 0..2000 {
        assert_eq!(
            map[i * step..i * step + 8],
            content(i as u64, 8)[..],
            "page {i}"
        );
    }
    let s = pool.stats();
    assert!(
        s.maps.evictions > 0 && s.peak.get() <= ByteSize::mib(8).get() / 100 * 105,
        "{s:?}"
    );
}

/// A signal would kill a thread that blocks it.
#[test]
fn a_range_that_was_asked_for_is_read_without_a_signal() {
    let dir = dir();
    let len = 1024 * PAGE + 77;
    let path = file(dir.path(), "a", 24, len);
    for unit in [4, 64] {
        let pool = pool(64);
        let options = pool.options().unit(ByteSize::kib(unit));
        let map = options.map(open(&path)).expect("mapped");
        // Here and there, something is there already.
        for page in [1, 2, 40, 41, 500, 1023] {
            assert_eq!(map[page * PAGE], common::byte_at(24, page * PAGE));
        }
        let blocks_sigbus = || unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            for range in [
                0..1,
                5..5,
                3 * PAGE - 1..90 * PAGE + 1,
                100 * PAGE..len,
                0..len,
            ] {
                let bytes = map.load(range.clone()).expect("there");
                assert_eq!(bytes.len(), range.len());
                let good = |(i, &b): (usize, &u8)| b == common::byte_at(24, range.start + i);
                assert!(bytes.iter().enumerate().all(good), "{range:?}");
            }
        };
        std::thread::scope(|s| s.spawn(blocks_sigbus).join().expect("no signal"));
        assert!(matches!(
            map.load(0..len + 1),
            Err(Error::OutOfRange { .. })
        ));
    }
}

#[test]
fn more_than_the_budget_can_be_asked_for() {
    let dir = dir();
    let path = file(dir.path(), "a", 25, 2048 * PAGE);
    let map = pool(1).map(open(&path)).expect("mapped");
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let before = map.stats().fills;
                let bytes = map.load(..).expect("there");
                assert!(map.stats().fills - before >= 1024, "most of it was read");
                for page in 0..2048 {
                    assert_eq!(bytes[page * PAGE], common::byte_at(25, page * PAGE));
                }
            });
        }
    });
}

#[test]
fn what_was_asked_for_and_cannot_be_read_is_an_error() {
    let map = unsafe { pool(16).map_trusted(Broken) }.expect("mapped");
    let error = map.load(3 * PAGE..5 * PAGE).map(drop).expect_err("EIO");
    assert!(
        matches!(&error, Error::Read { offset, .. } if *offset == 3 * PAGE as u64),
        "{error}"
    );
}

/// A source of which nothing can be read.
struct Broken;

impl Source for Broken {
    fn len(&self) -> io::Result<u64> {
        Ok(64 << 30)
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

/// Each of these pages lies in another page of the map's table: 40 MiB of that, if none were given back.
#[test]
fn pages_that_cannot_be_read_use_no_memory_up() {
    let dir = dir();
    let path = file(dir.path(), "a", 23, 64 * PAGE);
    let memory = ByteSize::mib(16);
    let pool = Pool::builder().memory(memory).build().expect("a pool");
    let broken = unsafe { pool.map_trusted(Broken) }.expect("mapped");
    for i in 0..10_000 {
        let at = i * (2 << 20);
        broken.pin(at..at + 1).map(drop).expect_err("EIO");
    }
    let whole = pool.map(open(&path)).expect("mapped");
    check(&whole, 23, 0);
    let s = pool.stats();
    assert!(s.peak.get() <= memory.get() / 100 * 105, "{s:?}");
}

#[test]
fn errno_is_kept_over_a_miss() {
    let dir = dir();
    let path = file(dir.path(), "a", 16, 64 * PAGE);
    let map = pool(4).map(open(&path)).expect("mapped");
    for page in 0..64 {
        unsafe { *libc::__errno_location() = 4242 };
        let byte = unsafe { std::ptr::read_volatile(map.as_ptr().add(page * PAGE)) };
        assert_eq!(unsafe { *libc::__errno_location() }, 4242);
        assert_eq!(byte, common::byte_at(16, page * PAGE));
    }
}

/// A source whose reads end when it is released, or after a long time.
struct Held(Arc<AtomicBool>);

impl Source for Held {
    fn len(&self) -> io::Result<u64> {
        Ok(64 * PAGE as u64)
    }

    fn read_at(&self, buf: &mut [u8], _: u64) -> io::Result<usize> {
        let began = std::time::Instant::now();
        while !self.0.load(Ordering::SeqCst) {
            if began.elapsed().as_secs() > 60 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        buf.fill(7);
        Ok(buf.len())
    }
}

#[test]
fn a_slow_source_blocks_only_those_who_want_its_page() {
    let released = Arc::new(AtomicBool::new(false));
    let dir = dir();
    let path = file(dir.path(), "a", 18, 1 << 20);
    let pool = pool(8);
    let slow = unsafe { pool.map_trusted(Held(released.clone())) }.expect("mapped");
    let fast = pool.map(open(&path)).expect("mapped");
    std::thread::scope(|s| {
        let reader = s.spawn(|| slow.pin(..PAGE).map(|pinned| pinned[0]));
        eventually("the slow fill to begin", || slow.stats().misses > 0);
        // Were it to wait for the other source, that would give up.
        check(&fast[..64 * PAGE], 18, 0);
        released.store(true, Ordering::SeqCst);
        let first = reader.join().expect("it ends");
        assert_eq!(first.expect("released in time"), 7);
    });
    assert_eq!(slow.stats().fills, 1);
}

#[test]
fn a_source_made_of_another_source_wants_a_pool_of_its_own() {
    struct Over(Map);
    impl Source for Over {
        fn len(&self) -> io::Result<u64> {
            Ok(self.0.len() as u64)
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            let n = buf.len().min(self.0.len() - offset as usize);
            let part = self
                .0
                .pin(offset as usize..offset as usize + n)
                .map_err(io::Error::from)?;
            buf[..n].copy_from_slice(&part);
            Ok(n)
        }
    }
    let (outer, inner) = (pool(8), pool(8));
    let source = || unsafe { inner.map_trusted(Generated::new(500_000, 20)) }.expect("mapped");
    let map = unsafe { outer.map_trusted(Over(source())) }.expect("mapped");
    check(&map, 20, 0);
    // In the same pool its fill threads would wait for each other: it is refused, and nothing hangs.
    let map = unsafe { inner.map_trusted(Over(source())) }.expect("mapped");
    let refused = map.pin(1000..2000).expect_err("refused");
    assert!(matches!(refused, Error::Read { .. }), "{refused}");
}

#[test]
fn a_budget_has_room_for_a_few_units_or_says_so() {
    let dir = dir();
    let path = file(dir.path(), "a", 21, 8 << 20);
    let pool = pool(4);
    let options = |kib| pool.options().unit(ByteSize::kib(kib)).map(open(&path));
    let e = options(1024)
        .expect_err("a quarter of the budget")
        .to_string();
    assert!(e.contains("4 MiB") && e.contains("eight fill units"), "{e}");
    let map = options(512).expect("an eighth");
    check(&map, 21, 0);
    assert!(
        pool.resize(ByteSize::mib(2)).is_err(),
        "too small for the map"
    );
    check(&map, 21, 0);
}

#[test]
fn scans_of_many_times_the_budget_leave_room_for_data() {
    let pool = pool(1);
    // 4 GiB of address space, one page in each 2 MiB: every page has a page of words of its own.
    let map = unsafe { pool.map_trusted(Generated::new(4 << 30, 22)) }.expect("mapped");
    for at in (0..map.len()).step_by(2 << 20) {
        assert_eq!(map[at], common::byte_at(22, at));
        map.release(at..at + PAGE).expect("released");
    }
    check(
        &map.pin(0..256 << 10)
            .expect("a quarter of the budget is free"),
        22,
        0,
    );
    for at in (0..map.len()).step_by(1 << 20) {
        assert_eq!(map[at], common::byte_at(22, at));
    }
    eventually("room", || map.pin(0..256 << 10).is_ok());
}

#[test]
fn what_lies_beyond_the_end_is_refused_whatever_the_unit() {
    let dir = dir();
    let path = file(dir.path(), "a", 23, 5000);
    let pool = pool(4);
    for unit in [4, 16] {
        let map = pool
            .options()
            .len(16_384)
            .unit(ByteSize::kib(unit))
            .map(open(&path))
            .expect("mapped");
        assert!(matches!(
            map.pin(0..16_384),
            Err(Error::PastEnd { offset: 8192, .. })
        ));
        assert!(matches!(
            map.load(0..16_384),
            Err(Error::PastEnd { offset: 8192, .. })
        ));
        check(map.load(0..8192).map(|b| &b[..5000]).expect("there"), 23, 0);
        check(&map.pin(0..5000).expect("there"), 23, 0);
        assert!(
            map.pin(0..8192).expect("the rest of the last page")[5000..]
                .iter()
                .all(|&b| b == 0)
        );
    }
}

#[derive(Debug, Clone)]
enum Op {
    Read(usize, usize),
    Pin(usize, usize),
    Release(usize, usize),
    Prefetch(usize, usize),
    Advise(u8),
    Resize(u64),
    Drop,
}

const MODEL_LEN: usize = 200 * PAGE + 1234;

fn op() -> impl Strategy<Value = Op> {
    let range = (0..MODEL_LEN, 0usize..20 * PAGE);
    prop_oneof![
        6 => range.clone().prop_map(|(a, n)| Op::Read(a, n)),
        4 => range.clone().prop_map(|(a, n)| Op::Pin(a, n)),
        2 => range.clone().prop_map(|(a, n)| Op::Release(a, n)),
        2 => range.prop_map(|(a, n)| Op::Prefetch(a, n)),
        1 => (0u8..3).prop_map(Op::Advise),
        1 => (1u64..5).prop_map(Op::Resize),
        1 => Just(Op::Drop),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 50, ..ProptestConfig::default() })]

    /// The model is a plain array: whatever several threads do to the map, every byte that any of them sees is its.
    #[test]
    fn random_operations_of_many_threads_never_show_a_byte_that_the_model_lacks(
        threads in proptest::collection::vec(proptest::collection::vec(op(), 1..40), 2..5),
        unit in prop_oneof![Just(4u64), Just(16), Just(128)],
    ) {
        let model = content(77, MODEL_LEN);
        let dir = dir();
        let path = file(dir.path(), "model", 77, MODEL_LEN);
        let pool = pool(1);
        let shared = pool.options().unit(ByteSize::kib(unit)).map(open(&path)).expect("mapped");
        std::thread::scope(|s| {
            for ops in &threads {
                let (shared, pool, model, path) = (&shared, &pool, &model, &path);
                s.spawn(move || {
                    let mut own = pool.map(open(path)).expect("mapped");
                    for op in ops {
                        let end = |a: usize, n: usize| (a + n).min(MODEL_LEN);
                        for map in [shared, &own] {
                            match *op {
                                Op::Read(a, n) => assert!(map[a..end(a, n)] == model[a..end(a, n)]),
                                Op::Pin(a, n) => match map.pin(a..end(a, n)) {
                                    Ok(pinned) => {
                                        assert!(pinned[..] == model[a..end(a, n)]);
                                        let n = pinned.len().min(1000);
                                        assert_eq!(write_from(pinned.as_ptr(), n).expect("pinned"), n);
                                    }
                                    Err(e) => assert!(matches!(e, Error::BudgetExhausted { .. }), "{e}"),
                                },
                                Op::Release(a, n) => map.release(a..end(a, n)).expect("in range"),
                                Op::Prefetch(a, n) => drop(map.prefetch(a..end(a, n)).expect("in range")),
                                Op::Advise(0) => map.advise(Advice::Normal),
                                Op::Advise(1) => map.advise(Advice::Random),
                                Op::Advise(_) => map.advise(Advice::Sequential),
                                Op::Resize(mib) => pool.resize(ByteSize::mib(mib)).expect("allowed"),
                                Op::Drop => {}
                            }
                        }
                        if matches!(op, Op::Drop) {
                            own = pool.map(open(path)).expect("mapped");
                        }
                    }
                });
            }
        });
        prop_assert!(shared[..] == model[..]);
        drop(shared);
        prop_assert!(pool.stats().used.get() < 5 << 20);
    }
}

/// A source of blocks that refuses to be asked for less than whole ones.
struct Blocks;

impl Source for Blocks {
    fn len(&self) -> std::io::Result<u64> {
        Ok(200_000)
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        if !buf.len().is_multiple_of(65_536) || !offset.is_multiple_of(65_536) {
            return Err(std::io::Error::other("not whole blocks"));
        }
        let n = (buf.len() as u64).min(200_000 - offset) as usize;
        for (i, b) in buf[..n].iter_mut().enumerate() {
            *b = ((offset as usize + i) % 251) as u8;
        }
        Ok(n)
    }
    fn alignment(&self) -> usize {
        65_536
    }
}

#[test]
fn sources_of_blocks_are_asked_for_whole_blocks_on_both_backends() {
    for backend in [BackendChoice::Best, BackendChoice::Mmap] {
        let pool = Pool::builder()
            .memory(ByteSize::mib(8))
            .backend(backend)
            .build()
            .expect("a pool");
        // SAFETY: the bytes are a function of the position.
        let map = unsafe { pool.options().offset(70_001).map_trusted(Blocks) }.expect("a map");
        assert_eq!(map.len(), 200_000 - 70_001);
        assert!(
            map.iter()
                .enumerate()
                .all(|(i, &b)| b == ((70_001 + i) % 251) as u8)
        );
    }
}

/// Reads one word of each of these pages, and checks it.
fn touch(map: &Map, seed: u64, pages: impl IntoIterator<Item = usize>) {
    for page in pages {
        let at = page * PAGE + 123;
        assert_eq!(map[at], common::byte_at(seed, at), "page {page}");
    }
}

#[test]
fn who_reads_in_order_is_read_ahead_of() {
    let dir = dir();
    const PAGES: usize = 8192;
    let path = file(dir.path(), "a", 30, PAGES * PAGE);
    // With room for all of it, and with room for an eighth.
    for memory in [64, 4] {
        let pool = pool(memory);
        let forwards = pool.map(open(&path)).expect("mapped");
        check(&forwards, 30, 0);
        let s = forwards.stats();
        assert!(
            s.read_ahead_used > PAGES as u64 * 9 / 10 && s.misses < PAGES as u64 / 4,
            "{s:?}"
        );
        assert_eq!(s.read_ahead_wasted, 0, "{s:?}");
        drop(forwards);

        let backwards = pool.map(open(&path)).expect("mapped");
        touch(&backwards, 30, (0..PAGES).rev());
        let s = backwards.stats();
        assert!(s.read_ahead_used > PAGES as u64 * 8 / 10, "{s:?}");
        drop(backwards);

        let strided = pool.map(open(&path)).expect("mapped");
        touch(&strided, 30, (0..PAGES).step_by(7));
        let s = strided.stats();
        assert!(s.read_ahead_used > PAGES as u64 / 7 * 8 / 10, "{s:?}");
        assert!(
            s.bytes_read < (PAGES / 7 * PAGE) as u64 * 11 / 10,
            "only what is read: {s:?}"
        );
    }
}

/// Loads that ask first, in pieces of one page and of several, with no thread that touches an absent page.
#[test]
fn loads_in_order_that_ask_first_are_read_ahead_of() {
    let dir = dir();
    const PAGES: usize = 8192;
    let path = file(dir.path(), "a", 32, PAGES * PAGE);
    let pool = pool(64);
    for pages in [1, 4, 100] {
        let map = pool.map(open(&path)).expect("mapped");
        for from in (0..PAGES).step_by(pages) {
            let range = from * PAGE..(from + pages).min(PAGES) * PAGE;
            check(map.load(range.clone()).expect("there"), 32, range.start);
        }
        let s = map.stats();
        assert!(
            s.read_ahead_used > PAGES as u64 * 8 / 10,
            "{pages} pages: {s:?}"
        );
    }
    // A source that is said to be read in order; one that is not is never read ahead of.
    for (advice, ahead) in [(Advice::Sequential, true), (Advice::Normal, false)] {
        let source = Generated::new((PAGES * PAGE) as u64, 33);
        let options = pool.options().advice(advice);
        let map = unsafe { options.map_trusted(source) }.expect("mapped");
        for page in 0..PAGES {
            let range = page * PAGE..(page + 1) * PAGE;
            check(map.load(range).expect("there"), 33, page * PAGE);
        }
        let used = map.stats().read_ahead_used;
        assert_eq!(used > PAGES as u64 * 8 / 10, ahead, "{:?}", map.stats());
    }
}

#[test]
fn several_streams_of_one_thread_and_of_many_are_told_apart() {
    let dir = dir();
    const PAGES: usize = 8192;
    let path = file(dir.path(), "a", 31, PAGES * PAGE);
    let pool = pool(64);
    let map = pool.map(open(&path)).expect("mapped");
    // A merge of three runs by one thread.
    for i in 0..1000 {
        touch(&map, 31, [i, 2500 + i, 5000 + i]);
    }
    let s = map.stats();
    assert!(s.read_ahead_used > 2_400, "{s:?}");
    map.release(..).expect("released");
    // Eight threads, each with a part of its own, and one that reads at random between them.
    let before = map.stats();
    std::thread::scope(|scope| {
        for t in 0..8 {
            let map = &map;
            scope.spawn(move || touch(map, 31, t * 1000..(t + 1) * 1000));
        }
        scope.spawn(|| touch(&map, 31, (0..2000).map(|i| i * 7919 % PAGES)));
    });
    let used = map.stats().read_ahead_used - before.read_ahead_used;
    assert!(used > 4_000, "{used} of 8000: {:?}", map.stats());
}

#[test]
fn who_reads_at_random_is_never_read_ahead_of() {
    let dir = dir();
    const PAGES: usize = 8192;
    let path = file(dir.path(), "a", 32, PAGES * PAGE);
    let pool = pool(64);
    let map = pool.map(open(&path)).expect("mapped");
    let mut x = 7u64;
    touch(
        &map,
        32,
        (0..4000).map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x >> 33) as usize % PAGES
        }),
    );
    assert_eq!(map.stats().read_ahead, 0);
    // And nobody is, where it was said so.
    map.advise(Advice::Random);
    check(&map, 32, 0);
    assert_eq!(map.stats().read_ahead, 0);
}

#[test]
fn a_reader_that_goes_elsewhere_leaves_waste_that_is_counted_and_given_back() {
    let dir = dir();
    const PAGES: usize = 4096;
    let path = file(dir.path(), "a", 33, PAGES * PAGE);
    let pool = pool(64);
    let map = pool.map(open(&path)).expect("mapped");
    // More streams than can be followed, each given up at once; more trips than there are slots.
    for round in 0..40 {
        for start in 0..60 {
            touch(&map, 33, (0..4).map(|i| start * 64 + round + i));
        }
        map.release(..).expect("released");
    }
    let s = map.stats();
    assert!(s.read_ahead_wasted > 0, "{s:?}");
    assert!(
        s.read_ahead >= s.read_ahead_used + s.read_ahead_wasted,
        "{s:?}"
    );
    check(&map, 33, 0);
    let before = pool.stats().used.get();
    drop(map);
    let left = pool.stats().used.get();
    // There was room for all pages, so each had its memory when they had been checked.
    let pages = (PAGES * PAGE) as u64;
    assert!(
        before.saturating_sub(left) >= pages,
        "{before} bytes before, {left} after, and {pages} of pages"
    );
    // What stays is staging buffers, a sixteenth of the budget at most, and the evictor's queue; no waste of forty rounds.
    let stays = (64 << 20) / 16 + (1 << 20);
    assert!(left <= stays, "{left} bytes stay, of at most {stays}");
}

/// The evictor's notes on a map that is gone must not be taken for notes on the one that has its place.
#[test]
fn a_map_of_another_unit_in_the_place_of_one_that_is_gone_keeps_its_bytes() {
    let dir = dir();
    const PAGES: usize = 2048;
    let path = file(dir.path(), "a", 34, PAGES * PAGE);
    let pool = pool(2);
    for round in 0..6 {
        let units = [4, 64, 4, 256, 16, 4];
        let unit = ByteSize::kib(units[round % units.len()]);
        let map = pool
            .options()
            .unit(unit)
            .advice(Advice::Random)
            .map(open(&path))
            .expect("mapped");
        // As many as are noted, and not yet looked at.
        touch(&map, 34, 0..200);
        drop(map);
        let next = pool
            .options()
            .unit(ByteSize::kib(units[(round + 1) % units.len()]))
            .map(open(&path))
            .expect("mapped");
        let pinned = next.pin(100 * PAGE..110 * PAGE).expect("room");
        for _ in 0..3 {
            check(&next, 34, 0);
            touch(&next, 34, (0..PAGES).step_by(3));
        }
        check(&pinned, 34, 100 * PAGE);
    }
    assert!(pool.stats().used <= ByteSize::mib(2), "{:?}", pool.stats());
}

/// What cools gives way to a pin, for want of anything else.
#[test]
fn a_pin_has_the_room_that_the_cooling_area_took() {
    let dir = dir();
    const PAGES: usize = 8192;
    let path = file(dir.path(), "a", 35, PAGES * PAGE);
    let pool = pool(8);
    let options = pool.options().advice(Advice::Random);
    let map = options.map(open(&path)).expect("mapped");
    for round in 0..3 {
        touch(&map, 35, (0..PAGES).map(|i| (i * 7919 + round) % PAGES));
    }
    assert!(map.stats().cooled > 0, "{:?}", map.stats());
    let most = (7 << 20) + (1 << 19);
    let pinned = map.pin(..most).expect("nothing else is pinned");
    check(&pinned, 35, 0);
}

/// Ranges here and there: of one page and of many, that overlap, are empty, and come in no order.
fn scattered(pages: usize) -> Vec<std::ops::Range<usize>> {
    let mut random = 9u64;
    let mut next = move |below: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
        (random >> 33) as usize % below
    };
    let mut all = vec![5..5, 0..pages * PAGE, 7..8];
    for i in 0..3000 {
        let start = next(pages * PAGE);
        let len = [100, PAGE, 9 * PAGE, 200 * PAGE][if i % 50 == 0 { 3 } else { i % 3 }];
        all.push(start..(start + len).min(pages * PAGE));
    }
    all
}

#[test]
fn many_ranges_are_loaded_and_pinned_in_their_order() {
    let dir = dir();
    const PAGES: usize = 4096;
    let path = file(dir.path(), "a", 41, PAGES * PAGE);
    for (memory, unit) in [(64, 4), (64, 64), (2, 4)] {
        let pool = pool(memory);
        let options = pool.options().unit(ByteSize::kib(unit));
        let map = options.map(open(&path)).expect("mapped");
        let ranges = scattered(PAGES);
        std::thread::scope(|s| {
            for part in ranges.chunks(ranges.len() / 3) {
                let map = &map;
                s.spawn(move || {
                    let loaded = map.load_many(part);
                    assert_eq!(loaded.len(), part.len());
                    for (bytes, range) in loaded.into_iter().zip(part) {
                        let bytes = bytes.expect("there");
                        assert_eq!(bytes.len(), range.len());
                        check(bytes, 41, range.start);
                    }
                });
            }
        });
        let few: Vec<_> = ranges[3..].iter().step_by(40).cloned().collect();
        for (pinned, range) in map.pin_many(&few).into_iter().zip(&few) {
            // (The small budget has no room for all that is pinned.)
            match pinned {
                Ok(bytes) => check(&bytes, 41, range.start),
                Err(Error::BudgetExhausted { .. }) => assert_eq!(memory, 2),
                Err(e) => panic!("{e}"),
            }
        }
        let batches = pool.stats().batches;
        assert!(
            matches!(batches, Batches::Uring | Batches::Blocking(_)),
            "{batches:?}"
        );
    }
}

/// Each error stands where its range does.
#[test]
fn ranges_that_cannot_be_loaded_are_errors_and_the_others_are_not() {
    let dir = dir();
    let path = file(dir.path(), "a", 42, 64 * PAGE);
    let map = pool(16).map(open(&path)).expect("mapped");
    let all = [0..100, 60 * PAGE..65 * PAGE, 5 * PAGE..6 * PAGE];
    let loaded = map.load_many(&all);
    check(loaded[0].as_ref().expect("there"), 42, 0);
    assert!(matches!(loaded[1], Err(Error::OutOfRange { .. })));
    check(loaded[2].as_ref().expect("there"), 42, 5 * PAGE);
    let source = Generated {
        fail_at: Some(10 * PAGE as u64),
        ..Generated::new(64 * PAGE as u64, 43)
    };
    let map = unsafe { pool(16).map_trusted(source) }.expect("mapped");
    let all = [0..PAGE, 9 * PAGE..12 * PAGE, 20 * PAGE..40 * PAGE];
    let pinned = map.pin_many(&all);
    check(pinned[0].as_ref().expect("there"), 43, 0);
    assert!(
        matches!(&pinned[1], Err(Error::Read { offset, .. }) if *offset == 10 * PAGE as u64),
        "{:?}",
        pinned[1]
    );
    check(pinned[2].as_ref().expect("there"), 43, 20 * PAGE);
}

/// A signal would kill a thread that blocks it.
#[test]
fn a_batch_is_read_without_a_signal_and_by_neighbours_together() {
    let dir = dir();
    const PAGES: usize = 4096;
    let path = file(dir.path(), "a", 44, PAGES * PAGE);
    let map = pool(64).map(open(&path)).expect("mapped");
    let every_other: Vec<_> = (0..PAGES / 4)
        .map(|i| i * 4 * PAGE..(i * 4 + 2) * PAGE)
        .collect();
    let blocks_sigbus = || unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        for (bytes, range) in map.load_many(&every_other).into_iter().zip(&every_other) {
            check(bytes.expect("there"), 44, range.start);
        }
        // What lies between them.
        check(map.load(..).expect("there"), 44, 0);
        let pinned = map.pin(..).expect("room");
        check(&pinned, 44, 0);
    };
    std::thread::scope(|s| s.spawn(blocks_sigbus).join().expect("no signal"));
    let s = map.stats();
    assert_eq!((s.fills, s.errors), (PAGES as u64, 0), "{s:?}");
    assert!(s.fill_latency.count() <= PAGES as u64 / 2 + 16, "{s:?}");
}

/// It keeps the map, the map keeps the pool, and its pages stay as long as any part of it does.
#[test]
fn an_owned_pin_keeps_its_map_and_its_pages() {
    let dir = dir();
    const PAGES: usize = 1024;
    let path = file(dir.path(), "a", 45, PAGES * PAGE);
    let map = Arc::new(pool(2).map(open(&path)).expect("mapped"));
    let part = map.pin_owned(10 * PAGE..90 * PAGE).expect("room");
    let many = map.pin_many_owned(&[0..PAGE, 500 * PAGE..501 * PAGE]);
    let look = map.clone();
    drop(map);
    std::thread::spawn(move || {
        check(&part, 45, 10 * PAGE);
        // Everything else passes through the budget.
        check(part.map(), 45, 0);
        assert!(part.map().is_resident(10 * PAGE..90 * PAGE));
        check(&part, 45, 10 * PAGE);
    })
    .join()
    .expect("right bytes");
    drop(many);
    // Nothing is pinned any more: there is room for what would not fit beside it.
    let most = look.pin(100 * PAGE..500 * PAGE).expect("room");
    check(&most, 45, 100 * PAGE);
}

#[cfg(feature = "bytes")]
#[test]
fn an_owned_pin_becomes_bytes() {
    let dir = dir();
    let path = file(dir.path(), "a", 46, 256 * PAGE);
    let map = Arc::new(pool(2).map(open(&path)).expect("mapped"));
    let bytes = bytes::Bytes::from(map.pin_owned(3 * PAGE..90 * PAGE).expect("room"));
    let part = bytes.slice(PAGE..2 * PAGE);
    drop(bytes);
    check(&part, 46, 4 * PAGE);
    assert_eq!(Arc::strong_count(&map), 2);
    drop(part);
    assert_eq!(Arc::strong_count(&map), 1);
}

/// A writer that takes little at a time, and fails after so much.
struct Slow {
    taken: Vec<u8>,
    most: usize,
}

impl io::Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(1000).min(self.most - self.taken.len());
        if n == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.taken.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_range_is_written_as_far_as_it_can_be_read_and_the_writer_takes_it() {
    let dir = dir();
    const LEN: usize = 700 * PAGE + 5;
    let path = file(dir.path(), "a", 47, LEN);
    let map = pool(1).map(open(&path)).expect("mapped");
    let to = |most| Slow {
        taken: Vec::new(),
        most,
    };
    let mut all = to(usize::MAX);
    assert_eq!(
        map.write_to(&mut all, 77..).expect("written"),
        LEN as u64 - 77
    );
    assert_eq!(all.taken.len(), LEN - 77);
    check(&all.taken, 47, 77);
    let mut full = to(300 * PAGE);
    let error = map.write_to(&mut full, ..).expect_err("ENOSPC");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    check(&full.taken, 47, 0);
    let source = Generated {
        fail_at: Some(400 * PAGE as u64),
        ..Generated::new(LEN as u64, 48)
    };
    let map = unsafe { pool(1).map_trusted(source) }.expect("mapped");
    let mut some = to(usize::MAX);
    let error = map.write_to(&mut some, ..).expect_err("EIO");
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<Error>());
    assert!(matches!(inner, Some(Error::Read { .. })), "{error}");
    check(&some.taken, 48, 0);
}

/// Where io_uring is switched off, the calling thread reads one run after the other.
#[test]
fn many_ranges_are_loaded_without_io_uring() {
    let dir = dir();
    const PAGES: usize = 2048;
    let path = file(dir.path(), "a", 49, PAGES * PAGE);
    let builder = Pool::builder().memory(ByteSize::mib(16)).io_uring(false);
    let pool = builder.build().expect("a pool");
    let map = pool.map(open(&path)).expect("mapped");
    let ranges = scattered(PAGES);
    for (bytes, range) in map.load_many(&ranges).into_iter().zip(&ranges) {
        check(bytes.expect("there"), 49, range.start);
    }
    check(&map.pin(..PAGES * PAGE).expect("room"), 49, 0);
    let batches = pool.stats().batches;
    assert!(
        matches!(&batches, Batches::Blocking(why) if why.contains("off")),
        "{batches:?}"
    );
}

/// What one run has used, and no more, is there early in the next; a recording of another file is advice.
#[test]
fn a_recorded_working_set_is_read_in_before_it_is_touched() {
    let dir = dir();
    const PAGES: usize = 4096;
    let path = file(dir.path(), "a", 51, PAGES * PAGE);
    // With room for all that is used, and with room for a part of it at a time.
    for memory in [64, 2] {
        let options = pool(memory);
        let options = options.options().advice(Advice::Random);
        let map = options.map(open(&path)).expect("mapped");
        touch(&map, 51, [4000]);
        let recording = map.record();
        let used = || (0..1000).map(|i| (3000 + i * 3) % PAGES);
        touch(&map, 51, used());
        check(map.load(7 * PAGE..9 * PAGE).expect("there"), 51, 7 * PAGE);
        let mut saved = Vec::new();
        recording.save(&mut saved).expect("saved");
        drop(recording);

        for (reads_source, unit) in [(false, 4), (true, 4), (false, 1024)] {
            let pool = pool(64);
            let options = pool.options().unit(ByteSize::kib(unit));
            let next = match reads_source {
                false => options.map(open(&path)).expect("mapped"),
                true => {
                    let source = Generated::new((PAGES * PAGE) as u64, 51);
                    unsafe { pool.map_trusted(source) }.expect("mapped")
                }
            };
            let warmed = next.warm(&saved[..]).expect("warmed");
            assert!(warmed.wanted >= (1002 * PAGE) as u64, "{warmed:?}");
            eventually("all is there", || {
                used().all(|page| next.is_resident(page * PAGE..(page + 1) * PAGE))
            });
            // (A large unit has others' pages.)
            assert_eq!(next.is_resident(PAGE..2 * PAGE), unit > 4);
            check(&next, 51, 0);
        }
        // Only what has room: what was used first, and nothing goes for what was used last.
        let small = pool(2);
        let part = small.map(open(&path)).expect("mapped");
        let warmed = part.warm(&saved[..]).expect("warmed");
        assert!(
            (100 * PAGE as u64..2 << 20).contains(&warmed.resident),
            "{warmed:?}"
        );
        assert!(warmed.wanted >= (1002 * PAGE) as u64, "{warmed:?}");
        let evictions = small.stats().maps.evictions;
        assert!(evictions < 64, "{evictions}");
        let other = file(dir.path(), "b", 52, 99 * PAGE + 1);
        let other = pool(64).map(open(&other)).expect("mapped");
        let warmed = other.warm(&saved[..]).expect("advice");
        assert!(warmed.wanted <= (100 * PAGE) as u64, "{warmed:?}");
        check(&other, 52, 0);
        // The same part twice, and parts that no map has.
        let mut twice = saved.clone();
        twice[24..32].copy_from_slice(&2u64.to_le_bytes());
        twice.truncate(32 + 72);
        twice.extend_from_within(32..);
        let error = map.warm(&twice[..]).expect_err("twice");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        twice[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(map.warm(&twice[..]).expect("advice").wanted > 0);
        for cut in [0, 3, 20, saved.len() - 1] {
            let error = map.warm(&saved[..cut]).expect_err("it ends early");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
