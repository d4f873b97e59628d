//! The known traps: closed descriptors, mremap, fork, leases, POSIX locks, short memory, foreign signals, missing
//! kernel features. Each runs in a process of its own, since each spoils one.
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "sets the traps with raw system calls"
)]

mod common;

use common::{
    BUDGET, PAGE, assert_sigbus, byte_at, check, content, dir, eventually, file, is_root, isolated,
    isolated_ok, open, pool,
};
use faultless::{Backend, ByteSize, Error, Event, LeaseRefusal, OnBreak, Pool, Source};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const PAGES: usize = 64;
const LEN: usize = PAGES * PAGE;

fn close_all_descriptors() {
    // What a daemon does; standard error stays, so that the test can speak.
    assert_eq!(
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) },
        0
    );
}

#[test]
fn a_program_that_closes_every_descriptor_still_reads_the_file_s_bytes() {
    isolated_ok(
        "a_program_that_closes_every_descriptor_still_reads_the_file_s_bytes",
        || {
            let dir = dir();
            let (path, other) = (
                file(dir.path(), "a", 1, LEN),
                file(dir.path(), "other", 99, LEN),
            );
            let trusted_path = file(dir.path(), "b", 2, LEN);
            let pool = pool(8);
            assert_eq!(*pool.backend(), Backend::Full);
            let map = pool.map(open(&path)).expect("mapped");
            let trusted = unsafe { pool.map_trusted(open(&trusted_path)) }.expect("mapped");
            check(&map[..8 * PAGE], 1, 0);
            close_all_descriptors();
            check(&map[8 * PAGE..16 * PAGE], 1, 8 * PAGE);
            check(&trusted[..16 * PAGE], 2, 0);
            // And again, with the numbers taken by other files: leased maps of our own among them.
            close_all_descriptors();
            let others: Vec<File> = (0..16).map(|_| open(&other)).collect();
            check(&map[16 * PAGE..24 * PAGE], 1, 16 * PAGE);
            check(&trusted[16 * PAGE..24 * PAGE], 2, 16 * PAGE);
            std::mem::forget(others);
            close_all_descriptors();
            let third = pool.map(open(&other)).expect("mapped after all was closed");
            check(&map[24 * PAGE..], 1, 24 * PAGE);
            check(&trusted[24 * PAGE..], 2, 24 * PAGE);
            check(&third, 99, 0);
            check(&map.pin(..).expect("pinned"), 1, 0);
        },
    );
}

/// A read of a pipe takes what is in it, or waits for ever.
#[test]
fn batches_leave_what_has_a_closed_descriptor_s_number_alone() {
    isolated_ok(
        "batches_leave_what_has_a_closed_descriptor_s_number_alone",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 1, LEN);
            let other = file(dir.path(), "other", 9, LEN);
            let (leased, trusted) = (pool(8), pool(8));
            let map = leased.map(open(&path)).expect("mapped");
            let other = unsafe { trusted.map_trusted(open(&other)) }.expect("mapped");
            let scattered =
                |from: usize| (from..PAGES).step_by(8).map(|i| i * PAGE..(i + 1) * PAGE);
            // Before and after there is a ring.
            for turn in 0..2 {
                close_all_descriptors();
                let mut pipes = Vec::new();
                for _ in 0..64 {
                    let mut ends = [0; 2];
                    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
                    // One in two has bytes.
                    if ends[0] % 4 == 0 {
                        assert_eq!(
                            unsafe { libc::write(ends[1], [7u8; 9].as_ptr().cast(), 9) },
                            9
                        );
                    }
                    pipes.push(ends);
                }
                let ranges: Vec<_> = scattered(turn).collect();
                for (map, seed) in [(&map, 1), (&other, 9)] {
                    for (range, loaded) in ranges.iter().zip(map.load_many(&ranges)) {
                        check(loaded.expect("loaded"), seed, range.start);
                    }
                }
                for [from, to] in pipes {
                    let mut bytes = [0u8; 16];
                    unsafe { libc::close(to) };
                    let got = unsafe { libc::read(from, bytes.as_mut_ptr().cast(), 16) };
                    assert_eq!(got, if from % 4 == 0 { 9 } else { 0 });
                    unsafe { libc::close(from) };
                }
            }
        },
    );
}

/// A source of a pool that waits for a prefetch of the same pool, whose threads wait for it.
struct Waits(std::sync::Arc<faultless::Map>);

impl Source for Waits {
    fn len(&self) -> io::Result<u64> {
        Ok(LEN as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let prefetch = self.0.prefetch(..).map_err(io::Error::other)?;
        prefetch.wait();
        let offset = offset as usize;
        buf.copy_from_slice(&self.0[offset..offset + buf.len()]);
        Ok(buf.len())
    }

    fn name(&self) -> String {
        "waits".to_owned()
    }
}

#[test]
fn a_prefetch_that_nobody_can_serve_is_not_waited_for() {
    isolated_ok("a_prefetch_that_nobody_can_serve_is_not_waited_for", || {
        let dir = dir();
        let pool = pool(16);
        let map = pool
            .map(open(&file(dir.path(), "a", 1, LEN)))
            .expect("mapped");
        let map = std::sync::Arc::new(map);
        let waits = unsafe { pool.map_trusted(Waits(map.clone())) }.expect("mapped");
        let prefetch = waits.prefetch(..).expect("queued");
        check(&waits, 1, 0);
        prefetch.wait();
        // In a child, those of the parent are over, whatever has become of them there.
        let prefetch = map.prefetch(..).expect("queued");
        let ended = forked(|| {
            prefetch.wait();
            0
        });
        assert!(ended.success(), "{ended}");
        prefetch.wait();
    });
}

#[test]
fn a_moved_map_never_reads_as_zero() {
    let out = isolated("a_moved_map_never_reads_as_zero", || {
        let dir = dir();
        let map = pool(8)
            .map(open(&file(dir.path(), "a", 1, 4 << 20)))
            .expect("mapped");
        check(&map[..PAGE], 1, 0);
        let moved = unsafe {
            libc::mremap(
                map.as_ptr() as *mut _,
                2 << 20,
                2 << 20,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                {
                    libc::mmap(
                        std::ptr::null_mut(),
                        2 << 20,
                        libc::PROT_NONE,
                        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                        -1,
                        0,
                    )
                },
            )
        };
        assert_ne!(moved, libc::MAP_FAILED);
        // What was there has moved with it …
        assert_eq!(unsafe { *moved.cast::<u8>() }, byte_at(1, 0));
        // … and what was absent faults.
        let byte = unsafe { std::ptr::read_volatile(moved.cast::<u8>().add(100 * PAGE)) };
        println!("read {byte}");
        std::process::exit(3);
    });
    assert_eq!(out.status.signal(), Some(libc::SIGBUS), "{out:?}");
}

/// Runs `f` in a forked child; returns how it ended.
fn forked(f: impl FnOnce() -> i32) -> std::process::ExitStatus {
    let child = common::fork(f);
    child.ends_within(BUDGET).expect("the child ends")
}

#[test]
fn a_forked_child_gets_a_clear_fault_and_never_zeros() {
    let out = isolated("a_forked_child_gets_a_clear_fault_and_never_zeros", || {
        let dir = dir();
        let map = pool(8)
            .map(open(&file(dir.path(), "a", 1, LEN)))
            .expect("mapped");
        check(&map[..PAGE], 1, 0);
        for page in [0, 5] {
            let status = forked(|| {
                std::hint::black_box(map[page * PAGE]);
                0
            });
            assert_eq!(status.signal(), Some(libc::SIGBUS), "page {page}: {status}");
        }
        let status = forked(|| i32::from(!matches!(map.pin(..), Err(Error::Forked))));
        assert!(status.success(), "pin in a child: {status}");
        check(&map, 1, 0);
    });
    assert!(out.status.success(), "{out:?}");
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(
        stderr.matches("maps do not survive fork").count(),
        2,
        "{stderr}"
    );
}

#[test]
fn a_forked_child_can_drop_its_parent_s_maps_and_have_its_own() {
    isolated_ok(
        "a_forked_child_can_drop_its_parent_s_maps_and_have_its_own",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 1, LEN);
            let parents = pool(8);
            let map = parents.map(open(&path)).expect("mapped");
            check(&map[..PAGE], 1, 0);
            let (map_ref, pool_ref) = (&map, &parents);
            let status = forked(|| {
                assert!(matches!(pool_ref.map(open(&path)), Err(Error::Forked)));
                let own = Pool::builder()
                    .memory(ByteSize::mib(4))
                    .build()
                    .expect("a pool of its own");
                let mine = own.map(open(&path)).expect("mapped");
                check(&mine, 1, 0);
                drop(unsafe { std::ptr::read(map_ref) });
                check(&mine.pin(..).expect("pinned"), 1, 0);
                drop(mine);
                drop(own);
                0
            });
            assert!(status.success(), "{status}");
            check(&map, 1, 0);
            drop(map);
            check(&parents.map(open(&path)).expect("mapped"), 1, 0);
        },
    );
}

#[test]
fn forks_while_threads_fault_leave_all_bytes_right() {
    isolated_ok("forks_while_threads_fault_leave_all_bytes_right", || {
        let dir = dir();
        let len = 8 << 20;
        let map = pool(2)
            .map(open(&file(dir.path(), "a", 1, len)))
            .expect("mapped");
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    check(&map, 1, 0);
                    stop.store(true, Ordering::Relaxed);
                });
            }
            while !stop.load(Ordering::Relaxed) {
                assert!(forked(|| 0).success());
            }
        });
    });
}

#[test]
fn a_lease_is_refused_with_the_reason() {
    isolated_ok("a_lease_is_refused_with_the_reason", || {
        let dir = dir();
        let path = file(dir.path(), "a", 1, LEN);
        let pool = pool(8);
        let writer = OpenOptions::new()
            .write(true)
            .open(&path)
            .expect("a writer");
        let e = pool.map(open(&path)).expect_err("a writer has it open");
        assert!(
            matches!(
                &e,
                Error::Lease {
                    reason: LeaseRefusal::OpenForWriting,
                    ..
                }
            ),
            "{e}"
        );
        assert!(
            e.to_string().contains(path.to_str().expect("UTF-8"))
                && e.to_string().contains("open for writing")
        );
        drop(writer);
        check(&pool.map(open(&path)).expect("the writer is gone"), 1, 0);

        let e = pool
            .map(File::open("/proc/self/maps").expect("proc"))
            .expect_err("proc")
            .to_string();
        assert!(e.contains("proc") && e.contains("map_trusted"), "{e}");
        let e = pool
            .map(File::open(dir.path()).expect("a directory"))
            .expect_err("a directory")
            .to_string();
        assert!(e.contains("a directory"), "{e}");
        let shm = Path::new("/dev/shm");
        if shm.exists() {
            let tmpfs = tempfile::tempdir_in(shm).expect("tmpfs");
            check(
                &pool
                    .map(open(&file(tmpfs.path(), "t", 3, LEN)))
                    .expect("tmpfs is trusted"),
                3,
                0,
            );
        }
    });
}

#[test]
fn a_lease_on_another_user_s_file_is_refused() {
    let name = "a_lease_on_another_user_s_file_is_refused";
    if !is_root() {
        return common::not_run(name, "only root can become another user");
    }
    isolated_ok(name, || {
        let dir = dir();
        let path = file(dir.path(), "a", 1, LEN);
        let f = open(&path);
        become_nobody();
        let e = pool(8).map(&f).expect_err("root's file");
        assert!(
            matches!(
                &e,
                Error::Lease {
                    reason: LeaseRefusal::NotOwner,
                    ..
                }
            ),
            "{e}"
        );
    });
}

fn become_nobody() {
    unsafe {
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
        assert_eq!(libc::setgid(65534), 0);
        assert_eq!(libc::setuid(65534), 0);
    }
}

#[test]
fn an_ordinary_user_has_the_whole_engine() {
    let name = "an_ordinary_user_has_the_whole_engine";
    isolated_ok(name, || {
        // Below /dev/shm, since the way to the build directory may be closed to others.
        let dir = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
        let path = file(dir.path(), "a", 1, LEN);
        if is_root() {
            for p in [dir.path(), &path] {
                let p = std::ffi::CString::new(p.to_str().expect("UTF-8")).expect("no NUL");
                assert_eq!(unsafe { libc::chown(p.as_ptr(), 65534, 65534) }, 0);
            }
            become_nobody();
        }
        let pool = pool(8);
        assert_eq!(*pool.backend(), Backend::Full);
        check(&pool.map(open(&path)).expect("an owner may lease"), 1, 0);
        check(
            &unsafe { pool.map_trusted(open(&path)) }.expect("mapped"),
            1,
            0,
        );
    });
}

#[test]
fn a_process_that_changes_its_user_does_not_hang() {
    let name = "a_process_that_changes_its_user_does_not_hang";
    if !is_root() {
        return common::not_run(name, "only root can become another user");
    }
    isolated_ok(name, || {
        let dir = dir();
        let map = pool(8)
            .map(open(&file(dir.path(), "a", 1, LEN)))
            .expect("mapped");
        map.prefetch(..).expect("queued");
        // The C library signals every thread, those of the engine included, and waits for all.
        become_nobody();
        check(&map, 1, 0);
    });
}

/// Opens for writing, which a lease holds back, and overwrites all; says when it got in.
fn overwrite(path: &Path, got_in: &AtomicBool) {
    let f = OpenOptions::new().write(true).open(path).expect("a writer");
    got_in.store(true, Ordering::SeqCst);
    f.write_all_at(&content(1000, LEN), 0).expect("written");
}

#[test]
fn a_snapshot_keeps_the_old_bytes_when_a_writer_comes() {
    isolated_ok("a_snapshot_keeps_the_old_bytes_when_a_writer_comes", || {
        for (memory, kept) in [(8, PAGES), (1, 0)] {
            let dir = dir();
            let len = if memory == 1 { 1024 * PAGE } else { LEN };
            let path = file(dir.path(), "a", 1, len);
            let pool = Pool::builder()
                .memory(ByteSize::mib(memory))
                .build()
                .expect("a pool");
            let map = pool
                .options()
                .on_break(OnBreak::Snapshot)
                .map(open(&path))
                .expect("mapped");
            check(&map[..4 * PAGE], 1, 0);
            let got_in = AtomicBool::new(false);
            std::thread::scope(|s| {
                s.spawn(|| overwrite(&path, &got_in));
                eventually("the writer", || got_in.load(Ordering::SeqCst));
            });
            let mut right = 0;
            for page in 0..len / PAGE {
                match map.pin(page * PAGE..(page + 1) * PAGE) {
                    Ok(bytes) => {
                        check(&bytes, 1, page * PAGE);
                        right += 1;
                    }
                    Err(e) => assert!(matches!(e, Error::LeaseBroken { .. }), "{e}"),
                }
            }
            // All of what fits the budget, and whatever does not fit is refused.
            assert!(
                right >= kept && right > 4,
                "{right} pages of {}",
                len / PAGE
            );
            assert!(memory != 1 || right < len / PAGE);
            map.release(..).expect("allowed, and without effect");
            check(&map[..4 * PAGE], 1, 0);
        }
    });
}

#[test]
fn failing_on_a_break_refuses_what_is_not_there() {
    let out = isolated("failing_on_a_break_refuses_what_is_not_there", || {
        let dir = dir();
        let path = file(dir.path(), "a", 1, LEN);
        let pool = pool(8);
        let map = pool
            .options()
            .on_break(OnBreak::Fail)
            .advice(faultless::Advice::Random)
            .map(open(&path))
            .expect("mapped");
        check(&map[..4 * PAGE], 1, 0);
        let got_in = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| overwrite(&path, &got_in));
            eventually("the writer", || got_in.load(Ordering::SeqCst));
        });
        check(&map[..4 * PAGE], 1, 0);
        let e = map.pin(10 * PAGE..11 * PAGE).expect_err("not there");
        assert!(matches!(e, Error::LeaseBroken { .. }), "{e}");
        assert!(e.to_string().contains("opened for writing"), "{e}");
        drop(dir);
        std::hint::black_box(map[10 * PAGE]);
    });
    assert_sigbus(&out, "offset 40960: the file was opened for writing");
}

#[test]
fn a_writer_that_will_not_wait_is_turned_away_and_the_map_stays_whole() {
    isolated_ok(
        "a_writer_that_will_not_wait_is_turned_away_and_the_map_stays_whole",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 1, LEN);
            let map = pool(8).map(open(&path)).expect("mapped");
            let e = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path)
                .expect_err("held back");
            assert_eq!(e.raw_os_error(), Some(libc::EWOULDBLOCK));
            check(&map, 1, 0);
        },
    );
}

#[test]
fn the_program_s_posix_locks_survive_maps_of_the_same_file() {
    isolated_ok(
        "the_program_s_posix_locks_survive_maps_of_the_same_file",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 1, LEN);
            let f = std::sync::Arc::new(open(&path));
            let mut lock = libc::flock {
                l_type: libc::F_RDLCK as i16,
                l_whence: 0,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            assert_eq!(
                unsafe { libc::fcntl(f.as_raw_fd(), libc::F_SETLK, &lock) },
                0
            );
            // Whether another process finds it locked.
            let mut locked = || {
                let status = forked(|| {
                    lock.l_type = libc::F_WRLCK as i16;
                    unsafe { libc::fcntl(f.as_raw_fd(), libc::F_GETLK, &mut lock) };
                    i32::from(lock.l_type != libc::F_UNLCK as i16)
                });
                status.code() == Some(1)
            };
            assert!(locked());
            let pool = pool(8);
            for _ in 0..3 {
                let map = pool.map(&*f).expect("mapped");
                let trusted = unsafe { pool.map_trusted(f.clone()) }.expect("mapped");
                let direct = unsafe {
                    pool.options()
                        .reads(faultless::Reads::Buffered)
                        .map_trusted(f.clone())
                }
                .expect("mapped");
                check(&map, 1, 0);
                check(&trusted, 1, 0);
                check(&direct, 1, 0);
                assert!(locked(), "while mapped");
                drop((map, trusted, direct));
                assert!(locked(), "after the maps are gone");
            }
            // Once the program has closed its own, what lingered goes too: no descriptor is left behind.
            drop(pool.map(&*f).expect("mapped"));
            drop(f);
            drop(pool.map(open(&path)).expect("mapped"));
            let left = std::fs::read_dir("/proc/self/fd").expect("proc").flatten();
            let ours = left
                .filter(|e| std::fs::read_link(e.path()).is_ok_and(|p| p == path))
                .count();
            assert_eq!(ours, 0);
        },
    );
}

/// Puts this process into a new memory control group with a limit. Returns its directory.
fn enter_cgroup(limit: u64) -> io::Result<std::path::PathBuf> {
    let v1 = Path::new("/sys/fs/cgroup/memory");
    let (root, file) = if v1.join("memory.limit_in_bytes").exists() {
        (v1, "memory.limit_in_bytes")
    } else {
        (Path::new("/sys/fs/cgroup"), "memory.max")
    };
    let group = root.join(format!("faultless-test-{}", std::process::id()));
    std::fs::create_dir(&group)?;
    std::fs::write(group.join(file), limit.to_string())?;
    std::fs::write(group.join("cgroup.procs"), std::process::id().to_string())?;
    Ok(group)
}

#[test]
fn a_control_group_smaller_than_the_budget_costs_pages_but_not_the_process() {
    let name = "a_control_group_smaller_than_the_budget_costs_pages_but_not_the_process";
    if !is_root() {
        return common::not_run(name, "only root can make a control group");
    }
    let len = 256 << 20;
    isolated_ok(name, || {
        let dir = dir();
        let path = file(dir.path(), "a", 1, len);
        let group = match enter_cgroup(64 << 20) {
            Ok(group) => group,
            Err(e) => {
                return common::not_run(name, &format!("no memory control group can be made: {e}"));
            }
        };
        let pool = Pool::builder()
            .memory(ByteSize::mib(1024))
            .build()
            .expect("a budget beyond the group's limit");
        let map = pool.map(open(&path)).expect("mapped");
        for round in 0..2 {
            std::thread::scope(|s| {
                for part in 0..4 {
                    let map = &map;
                    s.spawn(move || {
                        let quarter = len / 4;
                        for at in (part * quarter..(part + 1) * quarter).step_by(PAGE) {
                            assert_eq!(map[at + 77], byte_at(1, at + 77), "round {round}");
                        }
                    });
                }
            });
            check(&map.pin(..1 << 20).expect("pinned"), 1, 0);
        }
        // It used what the group has room for, and not what it was allowed.
        let s = pool.stats();
        assert!(
            s.maps.evictions > 1000 && s.peak <= ByteSize::mib(64),
            "{s:?}"
        );
        // And less when the group has less. (Version 1 refuses a lower limit until enough was taken back.)
        let less = ByteSize::mib(40);
        let limit = ["memory.limit_in_bytes", "memory.max"]
            .map(|file| group.join(file))
            .into_iter()
            .find(|file| file.exists())
            .expect("a limit");
        eventually("the lower limit", || {
            std::fs::write(&limit, less.get().to_string()).is_ok()
        });
        let mut at = 0;
        eventually("the pool to follow", || {
            for _ in 0..256 {
                assert_eq!(map[at + 77], byte_at(1, at + 77));
                at = (at + PAGE) % len;
            }
            pool.stats().used <= less
        });
        drop(map);
        drop(pool);
        let _ = std::fs::write(
            group.parent().expect("a parent").join("cgroup.procs"),
            std::process::id().to_string(),
        );
        let _ = std::fs::remove_dir(group);
    });
}

static FOREIGN: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {

    fn __sigsetjmp(env: *mut [u64; 32], save: i32) -> i32;
    fn siglongjmp(env: *mut [u64; 32], value: i32) -> !;
}

extern "C" fn count_and_repair(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    FOREIGN.fetch_add(1, Ordering::SeqCst);
    // Puts a page under the address, so that the access succeeds.
    unsafe {
        let page = (*info).si_addr() as usize & !(PAGE - 1);
        libc::mmap(
            page as *mut _,
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        );
    }
}

fn install(handler: usize, signal: i32, flags: i32) {
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

/// A mapping of an empty file: any touch is a SIGBUS that is not the engine's.
fn bus_page(dir: &Path) -> *mut u8 {
    let f = open(&file(dir, "empty", 0, 0));
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            f.as_raw_fd(),
            0,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    page.cast()
}

#[test]
fn a_foreign_sigbus_goes_to_the_handler_that_was_there_before() {
    isolated_ok(
        "a_foreign_sigbus_goes_to_the_handler_that_was_there_before",
        || {
            install(
                count_and_repair as *const () as usize,
                libc::SIGBUS,
                libc::SA_SIGINFO,
            );
            let dir = dir();
            let map = pool(8)
                .map(open(&file(dir.path(), "a", 1, LEN)))
                .expect("mapped");
            check(&map, 1, 0);
            assert_eq!(
                FOREIGN.load(Ordering::SeqCst),
                0,
                "our own misses are not passed on"
            );
            for n in 1..=3 {
                let page = bus_page(dir.path());
                assert_eq!(unsafe { std::ptr::read_volatile(page) }, 0);
                assert_eq!(FOREIGN.load(Ordering::SeqCst), n);
            }
            map.release(..).expect("released");
            check(&map, 1, 0);
        },
    );
}

#[test]
fn a_foreign_sigbus_without_a_handler_ends_the_process_as_ever() {
    let out = isolated(
        "a_foreign_sigbus_without_a_handler_ends_the_process_as_ever",
        || {
            let dir = dir();
            let map = pool(8)
                .map(open(&file(dir.path(), "a", 1, LEN)))
                .expect("mapped");
            check(&map, 1, 0);
            let page = bus_page(dir.path());
            drop(dir);
            unsafe { std::ptr::read_volatile(page) };
        },
    );
    assert_eq!(out.status.signal(), Some(libc::SIGBUS), "{out:?}");
    let out = isolated(
        "a_foreign_sigbus_without_a_handler_ends_the_process_as_ever",
        || {
            drop(pool(8));
            unsafe { libc::raise(libc::SIGBUS) };
        },
    );
    assert_eq!(
        out.status.signal(),
        Some(libc::SIGBUS),
        "sent by kill: {out:?}"
    );
}

static mut JUMP: [u64; 32] = [0; 32];

extern "C" fn jump(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    FOREIGN.fetch_add(1, Ordering::SeqCst);
    unsafe { siglongjmp(&raw mut JUMP, 1) }
}

#[test]
fn a_former_handler_may_jump_out_and_misses_go_on() {
    isolated_ok("a_former_handler_may_jump_out_and_misses_go_on", || {
        install(jump as *const () as usize, libc::SIGBUS, libc::SA_SIGINFO);
        let dir = dir();
        let map = pool(8)
            .map(open(&file(dir.path(), "a", 1, LEN)))
            .expect("mapped");
        for n in 0..4usize {
            let page = bus_page(dir.path());
            // In C this would be a macro; no value lives in a register across it that is used after the jump.
            if unsafe { jumped_from(page) } {
                assert_eq!(FOREIGN.load(Ordering::SeqCst), n + 1);
            } else {
                panic!("the page could be read");
            }
            check(&map[n * 8 * PAGE..(n + 1) * 8 * PAGE], 1, n * 8 * PAGE);
            let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut mask) };
            assert_eq!(
                unsafe { libc::sigismember(&mask, libc::SIGUSR1) },
                0,
                "nothing stays blocked"
            );
        }
    });
}

/// Reads the page; returns true if a handler jumped out of the read.
#[inline(never)]
unsafe fn jumped_from(page: *mut u8) -> bool {
    if unsafe { __sigsetjmp(&raw mut JUMP, 1) } == 0 {
        unsafe { std::ptr::read_volatile(page) };
        return false;
    }
    true
}

extern "C" fn tick(_: i32) {
    FOREIGN.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_storm_of_other_signals_disturbs_nothing() {
    isolated_ok("a_storm_of_other_signals_disturbs_nothing", || {
        install(tick as *const () as usize, libc::SIGALRM, 0);
        let dir = dir();
        let len = 4 << 20;
        let map = pool(1)
            .map(open(&file(dir.path(), "a", 1, len)))
            .expect("mapped");
        let every = libc::timeval {
            tv_sec: 0,
            tv_usec: 100,
        };
        let timer = libc::itimerval {
            it_interval: every,
            it_value: every,
        };
        assert_eq!(
            unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &timer, 0) },
            0
        );
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    check(&map, 1, 0);
                    check(&map.pin(1000..2000).expect("pinned"), 1, 1000);
                });
            }
        });
        assert!(FOREIGN.load(Ordering::SeqCst) > 0);
    });
}

#[test]
fn a_handler_installed_later_without_chaining_is_noticed() {
    isolated_ok(
        "a_handler_installed_later_without_chaining_is_noticed",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 1, LEN);
            let pool = pool(8);
            install(
                count_and_repair as *const () as usize,
                libc::SIGBUS,
                libc::SA_SIGINFO,
            );
            let e = pool.map(open(&path)).expect_err("replaced");
            assert!(
                matches!(e, Error::HandlerReplaced { .. })
                    && e.to_string().contains("SIGBUS handler"),
                "{e}"
            );
        },
    );
}

#[test]
fn a_read_error_on_a_plain_load_is_a_line_and_sigbus() {
    struct Broken;
    impl Source for Broken {
        fn len(&self) -> io::Result<u64> {
            Ok(LEN as u64)
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::EIO))
        }
        fn name(&self) -> String {
            "broken disk".to_owned()
        }
    }
    let out = isolated("a_read_error_on_a_plain_load_is_a_line_and_sigbus", || {
        let map = unsafe { pool(8).map_trusted(Broken) }.expect("mapped");
        std::hint::black_box(map[7 * PAGE + 5]);
    });
    assert_sigbus(
        &out,
        "faultless: broken disk, offset 28672: read failed: error 5 (EIO, input/output error)",
    );
}

#[test]
fn a_truncated_file_is_sigbus_beyond_its_end_and_an_error_of_pin() {
    let out = isolated(
        "a_truncated_file_is_sigbus_beyond_its_end_and_an_error_of_pin",
        || {
            let dir = dir();
            let path = file(dir.path(), "a", 1, LEN);
            let map = unsafe { pool(8).map_trusted(open(&path)) }.expect("mapped");
            OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|f| f.set_len(10 * PAGE as u64 + 100))
                .expect("truncated");
            check(&map[..10 * PAGE + 100], 1, 0);
            assert!(
                map[10 * PAGE + 100..11 * PAGE].iter().all(|&b| b == 0),
                "zero behind the end, in its page"
            );
            let e = map.pin(11 * PAGE..12 * PAGE).expect_err("beyond the end");
            assert!(matches!(&e, Error::PastEnd { offset: 45056, .. }), "{e}");
            drop(dir);
            std::hint::black_box(map[11 * PAGE]);
        },
    );
    assert_sigbus(&out, "offset 45056: the source ends before this page");
}

/// Has the kernel refuse userfaultfd, as a container's seccomp filter does.
fn forbid_userfaultfd(error: i32) {
    // BPF: load the system-call number; if it is userfaultfd, return the error; else allow.
    let filter = [
        libc::sock_filter {
            code: 0x20,
            jt: 0,
            jf: 0,
            k: 0,
        },
        libc::sock_filter {
            code: 0x15,
            jt: 0,
            jf: 1,
            k: libc::SYS_userfaultfd as u32,
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0x0005_0000 | error as u32,
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0x7FFF_0000,
        },
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_ptr().cast_mut(),
    };
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, 2, &program), 0);
    }
}

#[test]
fn without_userfaultfd_the_same_api_runs_on_mmap() {
    let out = isolated("without_userfaultfd_the_same_api_runs_on_mmap", || {
        forbid_userfaultfd(libc::EPERM);
        let dir = dir();
        let path = file(dir.path(), "a", 1, LEN + 100);
        let pool = pool(8);
        assert!(
            matches!(pool.backend(), Backend::Mmap(why) if why.contains("seccomp")),
            "{}",
            pool.backend()
        );
        let map = pool
            .options()
            .offset(10_000)
            .map(open(&path))
            .expect("mapped");
        check(&map, 1, 10_000);
        check(&map.pin(5..50_000).expect("pinned"), 1, 10_005);
        map.prefetch(..).expect("advice");
        assert!(map.is_resident(..));
        map.release(..).expect("advice");
        map.advise(faultless::Advice::Sequential);
        check(&map, 1, 10_000);
        assert_eq!(map.stats(), faultless::Stats::default());

        struct Counting;
        impl Source for Counting {
            fn len(&self) -> io::Result<u64> {
                Ok(1 << 20)
            }
            fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
                for (i, b) in buf.iter_mut().enumerate() {
                    *b = byte_at(5, offset as usize + i);
                }
                Ok(buf.len().min(((1 << 20) - offset) as usize))
            }
        }
        check(
            &unsafe { pool.map_trusted(Counting) }.expect("read into memory"),
            5,
            0,
        );

        // What is copied is charged, and what does not fit is refused.
        let held = pool.stats().used;
        assert!(held.get() > LEN as u64 - 10_000, "{held}");
        let large = file(dir.path(), "large", 2, 9 << 20);
        let refused = pool.map(open(&large));
        assert!(
            matches!(refused, Err(Error::TooLargeToCopy { .. })),
            "{refused:?}"
        );
        // SAFETY: nobody writes to the file.
        check(
            &unsafe { pool.map_trusted(open(&large)) }.expect("the kernel's"),
            2,
            0,
        );
        assert_eq!(pool.stats().used, held);

        // A writer: the map is a copy, made before it gets in. No lease delays it.
        let got_in = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| overwrite(&path, &got_in));
            eventually("the writer", || got_in.load(Ordering::SeqCst));
        });
        check(&map, 1, 10_000);
        let refused = pool.map(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .expect("a writer"),
        );
        assert!(matches!(refused, Err(Error::Lease { .. })));
    });
    assert!(out.status.success(), "{out:?}");
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(
        stderr
            .matches("faultless: backend mmap (userfaultfd is forbidden")
            .count(),
        1,
        "one line: {stderr}"
    );
}

#[test]
fn threads_that_end_leave_nothing_behind() {
    isolated_ok("threads_that_end_leave_nothing_behind", || {
        let dir = dir();
        let map = pool(2)
            .map(open(&file(dir.path(), "a", 1, 1 << 20)))
            .expect("mapped");
        for round in 0..200 {
            let at = (round * 7919) % ((1 << 20) / PAGE) * PAGE;
            std::thread::scope(|s| {
                for _ in 0..4 {
                    s.spawn(|| check(&map[at..at + PAGE], 1, at));
                }
            });
        }
    });
}

#[test]
fn overlayfs_is_refused_a_lease() {
    let name = "overlayfs_is_refused_a_lease";
    if !is_root() {
        return common::not_run(name, "only root can mount overlayfs");
    }
    isolated_ok(name, || {
        let dir = dir();
        let at = |n: &str| {
            let p = dir.path().join(n);
            std::fs::create_dir(&p).expect("a directory");
            p
        };
        let (lower, upper, work, merged) = (at("lower"), at("upper"), at("work"), at("merged"));
        file(&lower, "a", 1, LEN);
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let c = |s: &str| std::ffi::CString::new(s).expect("no NUL");
        let (o, m) = (c(&options), c(merged.to_str().expect("UTF-8")));
        unsafe {
            // In a mount namespace of our own: nothing is left behind.
            assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
            let private = libc::MS_REC | libc::MS_PRIVATE;
            assert_eq!(
                libc::mount(
                    c"none".as_ptr(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    private,
                    std::ptr::null()
                ),
                0
            );
            if libc::mount(
                c"overlay".as_ptr(),
                m.as_ptr(),
                c"overlay".as_ptr(),
                0,
                o.as_ptr().cast(),
            ) != 0
            {
                return common::not_run(
                    name,
                    &format!("cannot mount overlayfs: {}", io::Error::last_os_error()),
                );
            }
        }
        let pool = pool(8);
        let e = pool
            .map(open(&merged.join("a")))
            .expect_err("overlayfs")
            .to_string();
        assert!(e.contains("overlayfs") && e.contains("map_trusted"), "{e}");
        check(
            &unsafe { pool.map_trusted(open(&merged.join("a"))) }.expect("mapped"),
            1,
            0,
        );
        unsafe { libc::umount2(m.as_ptr(), libc::MNT_DETACH) };
    });
}

#[test]
fn a_program_that_locks_all_its_memory_never_reads_zeros() {
    let name = "a_program_that_locks_all_its_memory_never_reads_zeros";
    if !is_root() {
        return common::not_run(name, "only root can lock memory without limit");
    }
    isolated_ok(name, || {
        let dir = dir();
        let len = 4 << 20;
        let path = file(dir.path(), "a", 1, len);
        for when in [libc::MCL_FUTURE, libc::MCL_CURRENT | libc::MCL_FUTURE] {
            assert_eq!(unsafe { libc::mlockall(when) }, 0);
            let pool = pool(2);
            let map = pool.map(open(&path)).expect("mapped");
            check(&map, 1, 0);
            check(&map.pin(5000..6000).expect("pinned"), 1, 5000);
            // What the program locks itself is still the pool's to give up.
            // (The call says that it cannot read absent pages in, and locks the range all the same.)
            unsafe { libc::mlock(map.as_ptr().cast(), 64 * PAGE) };
            check(&map, 1, 0);
            map.release(..).expect("released");
            assert!(!map.is_resident(0..PAGE));
            check(&map, 1, 0);
            let s = pool.stats();
            assert!(s.peak.get() <= ByteSize::mib(2).get() / 100 * 105, "{s:?}");
            assert_eq!(unsafe { libc::munlockall() }, 0);
        }
    });
}

#[test]
fn a_sparse_map_gives_its_page_tables_back() {
    let name = "a_sparse_map_gives_its_page_tables_back";
    let config = std::process::Command::new("zcat")
        .arg("/proc/config.gz")
        .output();
    if !config.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("CONFIG_PT_RECLAIM=y")) {
        return common::not_run(
            name,
            "the kernel has no CONFIG_PT_RECLAIM, or does not tell",
        );
    }
    isolated_ok(name, || {
        let dir = dir();
        let len = 4 << 30;
        let path = dir.path().join("sparse");
        std::fs::File::create(&path)
            .and_then(|f| f.set_len(len as u64))
            .expect("a sparse file");
        let pool = pool(64);
        let options = pool.options().advice(faultless::Advice::Random);
        let map = options.map(open(&path)).expect("mapped");
        let before = pool.stats().page_tables;
        // One page in each 2 MiB: a page table for each.
        assert!((0..len).step_by(2 << 20).all(|at| map[at] == 0));
        let touched = pool.stats().page_tables;
        assert!(touched.get() - before.get() > 7 << 20, "{touched}");
        map.release(..).expect("released");
        let after = pool.stats().page_tables;
        assert!(
            after.get() - before.get() < 2 << 20,
            "{before} {touched} {after}"
        );
        assert!((0..len).step_by(2 << 20).all(|at| map[at + 4096] == 0));
    });
}

struct Sevens;

impl Source for Sevens {
    fn len(&self) -> io::Result<u64> {
        Ok(64 * PAGE as u64)
    }

    fn read_at(&self, buf: &mut [u8], _: u64) -> io::Result<usize> {
        buf.fill(7);
        Ok(buf.len())
    }
}

/// A miss on the alternate stack that the standard library gives its threads, with a pattern beneath that must not change.
#[test]
fn a_miss_fits_an_alternate_stack_of_8_kib() {
    isolated_ok("a_miss_fits_an_alternate_stack_of_8_kib", || {
        const STACK: usize = 8 << 10;
        let dir = dir();
        let path = file(dir.path(), "a", 19, 8 << 20);
        let pool = pool(16);
        let map = pool.map(open(&path)).expect("mapped");
        let mut memory = vec![0xA5u8; 2 * STACK];
        let below = memory.as_mut_ptr();
        let stack = libc::stack_t {
            ss_sp: unsafe { below.add(STACK) }.cast(),
            ss_flags: 0,
            ss_size: STACK,
        };
        // (A kernel whose frames are larger refuses it.)
        if unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) } != 0 {
            return;
        }
        check(&map[..4 << 20], 19, 0);
        // With descriptors that must be fetched again.
        for at in (4 << 20..6 << 20).step_by(16 * PAGE) {
            close_all_descriptors();
            check(&map[at..at + PAGE], 19, at);
        }
        // From a source, whose pages are read by other threads.
        let source = unsafe { pool.map_trusted(Sevens) }.expect("mapped");
        assert!(source.iter().all(|b| *b == 7));
        assert!(map.stats().misses > 0);
        // The default action would end the process on the same stack.
        let none = libc::stack_t {
            ss_sp: std::ptr::null_mut(),
            ss_flags: libc::SS_DISABLE,
            ss_size: 0,
        };
        assert_eq!(
            unsafe { libc::sigaltstack(&raw const none, std::ptr::null_mut()) },
            0
        );
        let touched = memory[..STACK].iter().filter(|b| **b != 0xA5).count();
        assert_eq!(touched, 0, "bytes below the stack were overwritten");
        let used = memory[STACK..].iter().take_while(|b| **b == 0xA5).count();
        assert!(used < STACK, "the handler ran on another stack");
    });
}

/// Loads a page beyond the end of a file that was truncated after it was mapped. The pool tells `hook`.
fn a_load_fails(hook: impl Fn(&Event) + Send + Sync + 'static) {
    let dir = dir();
    let path = file(dir.path(), "told", 1, 8 * PAGE);
    let pool = Pool::builder().memory(ByteSize::mib(16)).on_event(hook);
    let pool = pool.build().expect("a pool");
    // SAFETY: the test means to break the promise.
    let map = unsafe { pool.map_trusted(open(&path)) }.expect("mapped");
    check(&map[..PAGE], 1, 0);
    let shorter = OpenOptions::new().write(true).open(&path);
    shorter
        .and_then(|f| f.set_len(PAGE as u64))
        .expect("truncated");
    std::hint::black_box(map[5 * PAGE]);
    std::process::exit(3);
}

/// The program's own code hears of a load that fails, before the thread gets SIGBUS; the engine writes nothing.
#[test]
fn a_load_that_fails_is_told_to_the_program_and_not_to_stderr() {
    let out = isolated(
        "a_load_that_fails_is_told_to_the_program_and_not_to_stderr",
        || {
            a_load_fails(|event| match event {
                Event::Degraded(_) => {}
                other => println!("told: {other}"),
            });
        },
    );
    assert_eq!(out.status.signal(), Some(libc::SIGBUS), "{out:?}");
    let stdout = String::from_utf8_lossy(&out.stdout);
    let told = stdout
        .lines()
        .find(|l| l.contains("told: a load failed: "))
        .expect("told");
    assert!(told.contains("/told ends before offset 20480"), "{told}");
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(!stderr.contains("ends before"), "{stderr}");
}

/// A hook that never returns does not keep a thread from the SIGBUS that it would have had.
#[test]
fn a_hook_that_never_returns_keeps_no_thread_from_its_sigbus() {
    let out = isolated(
        "a_hook_that_never_returns_keeps_no_thread_from_its_sigbus",
        || {
            a_load_fails(|event| {
                if matches!(event, Event::LoadFailed(_)) {
                    loop {
                        std::thread::park();
                    }
                }
            });
        },
    );
    assert_eq!(out.status.signal(), Some(libc::SIGBUS), "{out:?}");
}

#[test]
fn a_pool_that_must_have_all_of_the_engine_is_not_made_of_less() {
    let pool = Pool::builder()
        .backend(faultless::BackendChoice::Mmap)
        .require_full()
        .build();
    let error = pool.expect_err("the kernel's mmap is less");
    assert!(matches!(error, Error::NotFull(_)), "{error}");
    assert!(
        error.to_string().contains("mmap (it was asked for)"),
        "{error}"
    );
}
