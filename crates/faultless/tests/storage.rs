//! Storage that is slow, fails, cuts reads short, loses its end or never answers: whatever it does, a map has right
//! bytes, or an error that names the place.
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    clippy::single_range_in_vec_init,
    reason = "vouches for a file whose bytes are a function of the position"
)]

mod common;

use common::{
    BUDGET, PAGE, assert_sigbus, byte_at, check, dir, eventually, file, isolated, isolated_ok,
    open, pool,
};
use faultless::{Advice, ByteSize, Error, Map, Pool, Reads};
use faultless_storage::{Delay, Faults, Storage};
use proptest::prelude::*;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

const LEN: u64 = 32 << 20;
const SEED: u64 = 40;
const SERVER: &str = "FAULTLESS_STORAGE_AT";

/// Not a test of its own: the process that serves the file of the others.
#[test]
fn storage_server() {
    if let Some(at) = std::env::var_os(SERVER) {
        let served = faultless_storage::serve(at.as_ref(), LEN, |offset, bytes| {
            for (i, b) in bytes.iter_mut().enumerate() {
                *b = byte_at(SEED, offset as usize + i);
            }
        });
        if let Err(e) = served {
            eprintln!("the storage failed: {e}");
        }
        std::process::exit(0);
    }
}

/// A storage, or a line that says why this machine has none.
fn storage(test: &str) -> Option<Storage> {
    let started = Storage::start(|at| {
        let mut c = Command::new(std::env::current_exe().expect("own path"));
        c.args([
            "storage_server",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(SERVER, at);
        c
    });
    started
        .map_err(|e| common::not_run(test, &e.to_string()))
        .ok()
}

fn map(pool: &Pool, storage: &Storage, advice: Advice) -> Map {
    let options = pool.options().advice(advice);
    unsafe { options.map_trusted(open(&storage.file())) }.expect("mapped")
}

/// Frames never exceed a budget; page states and the smallest buffers, which cannot wait, may by a little.
fn a_little_above(mib: u64) -> ByteSize {
    ByteSize::new((mib << 20) / 20 * 21)
}

fn page(number: usize) -> std::ops::Range<usize> {
    number * PAGE..(number + 1) * PAGE
}

fn broken(pages: &[usize]) -> Faults {
    Faults {
        broken: pages
            .iter()
            .map(|&p| (p * PAGE) as u64..(p * PAGE) as u64 + 1)
            .collect(),
        ..Faults::default()
    }
}

fn assert_eio(e: &Error, number: usize) {
    let text = e.to_string();
    assert!(
        matches!(e, Error::Read { offset, error, .. }
            if *offset == (number * PAGE) as u64 && error.raw_os_error() == Some(libc::EIO)),
        "{text}"
    );
    assert!(text.contains(&(number * PAGE).to_string()), "{text}");
}

#[test]
fn slow_storage_delivers_right_bytes_to_all_at_once() {
    let Some(mut s) = storage("slow_storage_delivers_right_bytes_to_all_at_once") else {
        return;
    };
    let delay = Delay {
        fixed_us: 500,
        spread_us: 3_000,
        tail_share: 0.05,
        tail_us: 30_000,
    };
    s.set(&Faults {
        delay,
        ..Faults::default()
    })
    .expect("told");
    let pool = pool(4);
    for advice in [Advice::Random, Advice::Normal] {
        let map = map(&pool, &s, advice);
        std::thread::scope(|scope| {
            for t in 0..32 {
                let map = &map;
                scope.spawn(move || {
                    for i in 0..40 {
                        // Half of them in order, half here and there.
                        let number = match t % 2 {
                            0 => t * 200 + i,
                            _ => (i * 7919 + t * 331) % (LEN as usize / PAGE),
                        };
                        check(&map[page(number)], SEED, number * PAGE);
                    }
                });
            }
        });
        assert_eq!(map.stats().errors, 0);
    }
    let stats = pool.stats();
    assert!(stats.peak <= a_little_above(4), "{} {stats:?}", stats.peak);
}

#[test]
fn a_broken_sector_is_an_error_where_it_lies_and_nowhere_else() {
    let Some(mut s) = storage("a_broken_sector_is_an_error_where_it_lies_and_nowhere_else") else {
        return;
    };
    s.set(&broken(&[100, 1000, 1001])).expect("told");
    let pool = pool(4);
    for reads in [Reads::Auto, Reads::Buffered] {
        for advice in [Advice::Random, Advice::Normal, Advice::Sequential] {
            let options = pool.options().advice(advice).reads(reads);
            let map = unsafe { options.map_trusted(open(&s.file())) }.expect("mapped");
            // Up to it in order, so that it is read ahead where that is allowed; and on behind it.
            check(&map[..100 * PAGE], SEED, 0);
            assert_eio(&map.pin(page(100)).expect_err("broken"), 100);
            assert_eio(&map.pin(90 * PAGE..110 * PAGE).expect_err("broken"), 100);
            check(&map[101 * PAGE..1000 * PAGE], SEED, 101 * PAGE);
            assert_eio(&map.pin(page(1001)).expect_err("broken"), 1001);
            check(&map.pin(page(1002)).expect("good"), SEED, 1002 * PAGE);
            assert!(map.stats().errors >= 3);
            assert!(!map.is_resident(page(100)));
        }
    }
    // The same by loads that ask first: what lies before it is there, and what lies behind it can be had.
    for advice in [Advice::Random, Advice::Normal] {
        let map = map(&pool, &s, advice);
        let around = 90 * PAGE..110 * PAGE;
        for _ in 0..2 {
            assert_eio(&map.load(around.clone()).expect_err("broken"), 100);
            assert!(map.is_resident(90 * PAGE..100 * PAGE));
        }
        assert_eio(&map.load(page(1001)).expect_err("broken"), 1001);
        let behind = map.load(101 * PAGE..400 * PAGE).expect("good");
        check(behind, SEED, 101 * PAGE);
    }
    // A sector that recovers is read again; nothing remembers that it was broken.
    let map = map(&pool, &s, Advice::Normal);
    assert_eio(&map.pin(page(100)).expect_err("broken"), 100);
    s.set(&Faults::default()).expect("told");
    check(&map, SEED, 0);
    drop(map);
    assert!(pool.stats().used < ByteSize::mib(2), "{:?}", pool.stats());
}

#[test]
fn a_load_from_a_broken_sector_is_a_line_and_sigbus() {
    let name = "a_load_from_a_broken_sector_is_a_line_and_sigbus";
    if storage(name).is_none() {
        return;
    }
    let out = isolated(name, || {
        let mut s = storage(name).expect("as before");
        s.set(&broken(&[7])).expect("told");
        let map = map(&pool(4), &s, Advice::Normal);
        check(&map[page(6)], SEED, 6 * PAGE);
        std::hint::black_box(map[7 * PAGE + 5]);
    });
    assert_sigbus(&out, "offset 28672: read failed: error 5 (EIO");
}

#[test]
fn short_reads_never_become_zeros() {
    let Some(mut s) = storage("short_reads_never_become_zeros") else {
        return;
    };
    let pool = pool(4);
    for short in [65_536, 8_192, 5_000, 4_096, 1_000, 1] {
        s.set(&Faults {
            short: Some(short),
            ..Faults::default()
        })
        .expect("told");
        for unit in [4, 64] {
            let options = pool.options().unit(ByteSize::kib(unit));
            let map = unsafe { options.map_trusted(open(&s.uncached())) }.expect("mapped");
            for number in [0, 1, 2, 500, LEN as usize / PAGE - 1] {
                match map.pin(page(number)) {
                    Ok(bytes) => check(&bytes, SEED, number * PAGE),
                    Err(e) => assert!(
                        matches!(e, Error::Read { .. }) && short < 4_096,
                        "{short}: {e}"
                    ),
                }
            }
        }
    }
}

#[test]
fn a_file_that_loses_its_end_is_an_error_behind_it() {
    let Some(mut s) = storage("a_file_that_loses_its_end_is_an_error_behind_it") else {
        return;
    };
    let pool = pool(4);
    let map = map(&pool, &s, Advice::Normal);
    check(&map[page(0)], SEED, 0);
    let end = 50 * PAGE + 100;
    s.set(&Faults {
        truncated: Some(end as u64),
        ..Faults::default()
    })
    .expect("told");
    // The kernel learns of the new length when it is asked.
    assert_eq!(
        std::fs::metadata(s.file()).expect("asked").len(),
        end as u64
    );
    check(&map[PAGE..50 * PAGE], SEED, PAGE);
    let last = map.pin(page(50)).expect("its first bytes are there");
    check(&last[..100], SEED, 50 * PAGE);
    assert!(last[100..].iter().all(|&b| b == 0), "as with mmap");
    let e = map.pin(page(51)).expect_err("gone");
    assert!(matches!(e, Error::PastEnd { .. }), "{e}");
}

#[test]
fn a_request_that_is_never_answered_holds_up_only_those_who_want_it() {
    let name = "a_request_that_is_never_answered_holds_up_only_those_who_want_it";
    if storage(name).is_none() {
        return;
    }
    isolated_ok(name, || {
        let mut s = storage(name).expect("as before");
        let pool = pool(2);
        let map = map(&pool, &s, Advice::Normal);
        let stuck = 300;
        s.set(&Faults {
            stuck: vec![(stuck * PAGE) as u64..(stuck * PAGE) as u64 + 1],
            ..Faults::default()
        })
        .expect("told");
        let (one, two) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for done in [&one, &two] {
                let map = &map;
                scope.spawn(move || {
                    check(&map[page(stuck)], SEED, stuck * PAGE);
                    done.store(true, Ordering::SeqCst);
                });
            }
            // Meanwhile others read all of the rest, many times the budget, in order and not, and pin.
            let before = map.stats().fills;
            for t in 0..4 {
                let map = &map;
                scope.spawn(move || {
                    let part = LEN as usize / PAGE / 4;
                    for number in (t * part..(t + 1) * part).filter(|&n| n != stuck) {
                        check(&map[number * PAGE..number * PAGE + 64], SEED, number * PAGE);
                    }
                    check(&map.pin(page(t)).expect("good"), SEED, t * PAGE);
                });
            }
            // (A part of the file in which the stuck page lies may be read ahead with it, and waits as well: that is
            // the window of one stream.)
            eventually("the others", || {
                map.stats().fills - before > LEN / PAGE as u64 * 9 / 10
            });
            assert!(!one.load(Ordering::SeqCst) && !two.load(Ordering::SeqCst));
            assert!(pool.stats().used <= ByteSize::mib(2), "{:?}", pool.stats());
            s.set(&Faults::default()).expect("told");
            eventually("those who wanted it", || {
                one.load(Ordering::SeqCst) && two.load(Ordering::SeqCst)
            });
        });
    });
}

/// One thread that serves futures waits for storage that does not answer; the futures of another map do not.
#[test]
fn storage_that_never_answers_holds_up_no_other_maps_futures() {
    let Some(mut s) = storage("storage_that_never_answers_holds_up_no_other_maps_futures") else {
        return;
    };
    let pool = pool(16);
    let stuck = map(&pool, &s, Advice::Random);
    let dir = dir();
    let path = file(dir.path(), "a", 71, 256 * PAGE);
    let good = pool.map(open(&path)).expect("mapped");
    s.set(&Faults {
        stuck: vec![0..LEN],
        ..Faults::default()
    })
    .expect("told");
    let mut context = Context::from_waker(Waker::noop());
    let mut waiting: Vec<_> = (0..100)
        .map(|i| Box::pin(stuck.pin_async(page(i * 3))))
        .collect();
    for future in &mut waiting {
        assert!(future.as_mut().poll(&mut context).is_pending());
    }
    eventually("reads have begun", || stuck.stats().misses > 0);
    for number in 0..200 {
        let mut future = Box::pin(good.load_async(page(number)));
        let mut there = None;
        eventually("the other map's page", || {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(bytes) => there = Some(bytes.expect("good")),
                Poll::Pending => return false,
            }
            true
        });
        check(there.expect("there"), 71, number * PAGE);
    }
    // The good map can go meanwhile.
    drop(good);
    s.set(&Faults::default()).expect("told");
    for (i, future) in waiting.iter_mut().enumerate() {
        let mut there = false;
        eventually("the page", || {
            if let Poll::Ready(pinned) = future.as_mut().poll(&mut context) {
                check(&pinned.expect("good"), SEED, i * 3 * PAGE);
                there = true;
            }
            there
        });
    }
}

#[test]
fn a_map_with_a_stuck_prefetch_can_be_dropped_once_it_is_answered() {
    let Some(mut s) = storage("a_map_with_a_stuck_prefetch_can_be_dropped_once_it_is_answered")
    else {
        return;
    };
    let pool = pool(4);
    let map = map(&pool, &s, Advice::Random);
    s.set(&Faults {
        stuck: vec![0..LEN],
        ..Faults::default()
    })
    .expect("told");
    map.prefetch(..1 << 20).expect("queued");
    // One reader at least waits for another thread that has the unit: the prefetch's, or the other reader.
    let waits = map.stats().waits;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| check(&map[page(0)], SEED, 0));
        }
        eventually("a reader that waits", || map.stats().waits > waits);
        s.set(&Faults::default()).expect("told");
    });
    s.set(&Faults {
        stuck: vec![1 << 20..LEN],
        ..Faults::default()
    })
    .expect("told");
    let prefetch = map.prefetch(1 << 20..2 << 20).expect("queued");
    assert!(!prefetch.is_over(), "the storage does not answer");
    let dropped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            drop(map);
            dropped.store(true, Ordering::SeqCst);
        });
        s.set(&Faults::default()).expect("told");
        eventually("the drop", || dropped.load(Ordering::SeqCst));
    });
    prefetch.wait();
}

/// Ends with this status if SIGTERM was pending once the storage had answered, and was the program's to take.
const TOOK_TERM: i32 = 7;

/// What a program does before it loads, and what it ends with.
type Program = (fn(), fn() -> i32);

/// A program whose only thread waits for storage that does not answer. It is sent a signal, and the storage answers after some
/// time, if the program has not ended by then. `before` and `after` run in the program.
fn a_stuck_program(
    s: &mut Storage,
    signal: i32,
    patience: Duration,
    load: fn(&Map, usize),
    (before, after): Program,
) -> ExitStatus {
    s.set(&Faults {
        stuck: vec![0..LEN],
        ..Faults::default()
    })
    .expect("told");
    // One that no other program of the test has left in the page cache.
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) * 500;
    let child = common::fork(|| {
        // (The test's parent may have set it to be ignored: `nohup` does.)
        assert_ne!(
            unsafe { libc::signal(signal, libc::SIG_DFL) },
            libc::SIG_ERR
        );
        before();
        let pool = pool(4);
        // (The kernel lets no process go in the middle of a direct read, not even by SIGKILL.)
        let options = pool.options().reads(Reads::Buffered);
        let map = unsafe { options.map_trusted(open(&s.file())) };
        load(&map.expect("mapped"), number);
        after()
    });
    eventually("a read that is stuck", || s.stuck().expect("told") > 0);
    assert_eq!(unsafe { libc::kill(child.pid(), signal) }, 0);
    let ended = child.ends_within(patience);
    s.set(&Faults::default()).expect("told");
    ended.unwrap_or_else(|| {
        child
            .ends_within(BUDGET)
            .expect("it has what it waited for")
    })
}

fn load_page(map: &Map, number: usize) {
    check(&map[page(number)], SEED, number * PAGE);
}

fn pin_page(map: &Map, number: usize) {
    let pinned = map.pin(page(number)).expect("answered");
    check(&pinned, SEED, number * PAGE);
}

fn set_of_term() -> libc::sigset_t {
    let mut set = unsafe { std::mem::zeroed() };
    unsafe { libc::sigemptyset(&raw mut set) };
    unsafe { libc::sigaddset(&raw mut set, libc::SIGTERM) };
    set
}

fn block_term() {
    let set = set_of_term();
    let done =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    assert_eq!(done, 0);
}

fn take_term() -> i32 {
    let (set, none) = (set_of_term(), unsafe { std::mem::zeroed() });
    match unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const none) } {
        libc::SIGTERM => TOOK_TERM,
        _ => 1,
    }
}

static CAUGHT: AtomicBool = AtomicBool::new(false);

extern "C" fn on_term(_: i32) {
    CAUGHT.store(true, Ordering::SeqCst);
}

fn catch_term() {
    let handler = on_term as extern "C" fn(i32) as libc::sighandler_t;
    assert_ne!(
        unsafe { libc::signal(libc::SIGTERM, handler) },
        libc::SIG_ERR
    );
}

fn ignore_term() {
    let before = unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
    assert_ne!(before, libc::SIG_ERR);
}

fn caught_term() -> i32 {
    i32::from(CAUGHT.load(Ordering::SeqCst)) * TOOK_TERM
}

#[test]
fn a_program_that_waits_for_dead_storage_can_be_ended() {
    let name = "a_program_that_waits_for_dead_storage_can_be_ended";
    if storage(name).is_none() {
        return;
    }
    isolated_ok(name, || {
        let mut s = storage(name).expect("as before");
        for (signal, load) in [
            (libc::SIGTERM, load_page as fn(&Map, usize)),
            (libc::SIGINT, load_page),
            (libc::SIGTERM, pin_page),
            (libc::SIGHUP, pin_page),
        ] {
            let program: Program = (|| (), || 0);
            let ended = a_stuck_program(&mut s, signal, BUDGET, load, program);
            assert_eq!(ended.signal(), Some(signal), "{ended}");
        }
    });
}

#[test]
fn a_signal_that_a_program_takes_by_itself_does_not_end_it() {
    let name = "a_signal_that_a_program_takes_by_itself_does_not_end_it";
    if storage(name).is_none() {
        return;
    }
    isolated_ok(name, || {
        let mut s = storage(name).expect("as before");
        // The engine looks twice in this time, unless the machine is very busy.
        let patience = Duration::from_millis(2500);
        let programs: [Program; 3] = [
            (block_term, take_term),
            (catch_term, caught_term),
            (ignore_term, || TOOK_TERM),
        ];
        for program in programs {
            for load in [load_page as fn(&Map, usize), pin_page] {
                let ended = a_stuck_program(&mut s, libc::SIGTERM, patience, load, program);
                assert_eq!(ended.code(), Some(TOOK_TERM), "{ended}");
            }
        }
    });
}

/// A map is dropped while its read-ahead is stuck, and others want the slots of its trips.
#[test]
fn trips_of_a_map_that_is_being_dropped_are_left_to_it() {
    let Some(mut s) = storage("trips_of_a_map_that_is_being_dropped_are_left_to_it") else {
        return;
    };
    let pool = pool(1);
    let stuck = 1000 * PAGE as u64..1400 * PAGE as u64;
    for round in 0..4 {
        let first = map(&pool, &s, Advice::Sequential);
        s.set(&Faults {
            stuck: vec![stuck.clone()],
            ..Faults::default()
        })
        .expect("told");
        // The window behind this page reaches into what is stuck.
        check(&first[page(990)], SEED, 990 * PAGE);
        eventually("read-ahead", || first.stats().read_ahead > 0);
        let second = map(&pool, &s, Advice::Normal);
        std::thread::scope(|scope| {
            scope.spawn(move || drop(first));
            // More streams than there are slots, each left behind with its trip.
            for start in 0..24 {
                for i in 0..5 {
                    let number = 2000 + start * 70 + round * 7 + i;
                    check(&second[page(number)], SEED, number * PAGE);
                }
            }
            s.set(&Faults::default()).expect("told");
        });
        check(&second[2000 * PAGE..4000 * PAGE], SEED, 2000 * PAGE);
    }
}

#[test]
fn lease_maps_are_refused_on_fuse_with_the_reason() {
    let Some(s) = storage("lease_maps_are_refused_on_fuse_with_the_reason") else {
        return;
    };
    let e = pool(4)
        .map(open(&s.file()))
        .expect_err("writes could bypass the lease");
    assert!(e.to_string().contains("FUSE"), "{e}");
}

#[derive(Debug, Clone)]
enum Op {
    Faults(Faults),
    Pin(usize, usize),
    Prefetch(usize, usize),
    Release(usize, usize),
    Advise(bool),
}

fn op() -> impl Strategy<Value = Op> {
    let pages = LEN as usize / PAGE;
    let span = move || (0..pages - 64, 1usize..64);
    let faults = (
        0u64..400,
        proptest::collection::vec(0..pages, 0..4),
        proptest::option::weighted(0.3, 1000u32..100_000),
    )
        .prop_map(|(us, pages, short)| {
            Op::Faults(Faults {
                delay: Delay::fixed(Duration::from_micros(us)),
                short,
                ..broken(&pages)
            })
        });
    prop_oneof![
        1 => faults,
        6 => span().prop_map(|(at, n)| Op::Pin(at, n)),
        2 => span().prop_map(|(at, n)| Op::Prefetch(at, n)),
        1 => span().prop_map(|(at, n)| Op::Release(at, n)),
        1 => any::<bool>().prop_map(Op::Advise),
    ]
}

/// Under any faults, by three threads: right bytes or an error, and the budget is kept.
#[test]
fn random_faults_yield_right_bytes_or_errors() {
    let Some(s) = storage("random_faults_yield_right_bytes_or_errors") else {
        return;
    };
    let s = std::sync::Mutex::new(s);
    let config = ProptestConfig {
        cases: 12,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let ops = || proptest::collection::vec(op(), 30);
    proptest!(config, |(a in ops(), b in ops(), c in ops())| {
        let pool = pool(2);
        let file = open(&s.lock().expect("one at a time").uncached());
        let map = unsafe { pool.map_trusted(file) }.expect("mapped");
        std::thread::scope(|scope| {
            for ops in [&a, &b, &c] {
                let (map, s) = (&map, &s);
                scope.spawn(move || for op in ops {
                    let bytes = |at: &usize, n: &usize| at * PAGE..(at + n) * PAGE;
                    match op {
                        Op::Faults(f) => s.lock().expect("alive").set(f).expect("told"),
                        Op::Pin(at, n) => match map.pin(bytes(at, n)) {
                            Ok(pinned) => check(&pinned, SEED, at * PAGE),
                            Err(Error::Read { .. }) => {}
                            Err(e) => panic!("{e}"),
                        },
                        Op::Prefetch(at, n) => drop(map.prefetch(bytes(at, n)).expect("queued")),
                        Op::Release(at, n) => map.release(bytes(at, n)).expect("released"),
                        Op::Advise(true) => map.advise(Advice::Sequential),
                        Op::Advise(false) => map.advise(Advice::Normal),
                    }
                });
            }
        });
        prop_assert!(pool.stats().peak <= a_little_above(2), "{:?}", pool.stats());
        s.lock().expect("alive").set(&Faults::default()).expect("told");
        // Whatever happened, all of it can be read now.
        check(&map, SEED, 0);
    });
}
