//! Loads and pins for tasks, under executors of several makes.

#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "maps sources whose bytes the tests vouch for"
)]

mod common;

use common::{PAGE, byte_at, check, dir, eventually, file, open, pool};
use faultless::{BackendChoice, ByteSize, Error, Map, Pool, Source};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Wake, Waker};

/// Counts how often it is woken, and wakes the thread that made it.
struct Thread(std::thread::Thread, AtomicUsize);

impl Wake for Thread {
    fn wake(self: Arc<Self>) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.unpark();
    }
}

/// The smallest of executors.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let thread = Arc::new(Thread(std::thread::current(), AtomicUsize::new(0)));
    let waker = Waker::from(thread);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => return result,
            Poll::Pending => std::thread::park(),
        }
    }
}

async fn read_all_over(map: Arc<Map>, seed: u64, from: usize, pages: usize) {
    for i in 0..80 {
        let page = (from + i * 7919) % (pages - 9);
        let range = page * PAGE + 3..(page + i % 9 + 1) * PAGE;
        if i % 2 == 0 {
            let bytes = map.load_async(range.clone()).await.expect("there");
            check(bytes, seed, range.start);
        } else {
            let bytes = map.pin_async(range.clone()).await.expect("room");
            check(&bytes, seed, range.start);
        }
    }
}

/// Many tasks on few threads, with room for all and with room for an eighth.
#[test]
fn any_executor_can_wait_for_pages() {
    const PAGES: usize = 4096;
    let dir = dir();
    let path = file(dir.path(), "a", 61, PAGES * PAGE);
    for (memory, rings) in [(64, true), (64, false), (2, true)] {
        let fresh = || {
            let pool = Pool::builder().memory(ByteSize::mib(memory));
            let pool = pool.io_uring(rings).build().expect("a pool");
            Arc::new(pool.map(open(&path)).expect("mapped"))
        };
        let map = fresh();
        block_on(read_all_over(map, 61, 0, PAGES));

        let map = fresh();
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .build()
            .expect("a runtime");
        tokio.block_on(async {
            let task = |i: usize| tokio::spawn(read_all_over(map.clone(), 61, i * 97, PAGES));
            let tasks: Vec<_> = (0..24).map(task).collect();
            for task in tasks {
                task.await.expect("right bytes");
            }
        });

        let map = fresh();
        let tasks: Vec<_> = (0..24)
            .map(|i| smol::spawn(read_all_over(map.clone(), 61, i * 89, PAGES)))
            .collect();
        smol::block_on(async {
            for task in tasks {
                task.await;
            }
        });
        assert_eq!(map.stats().errors, 0);
    }
}

/// It is there: no thread has to be asked, and no task has to wait.
#[test]
fn a_prefetch_can_be_awaited() {
    let dir = dir();
    let path = file(dir.path(), "a", 3, 4 << 20);
    let pool = pool(16);
    let map = pool.map(open(&path)).expect("mapped");
    let (first, rest) = block_on(async {
        let first = map.prefetch(..1 << 20).expect("queued");
        let rest = map.prefetch(1 << 20..).expect("queued");
        (rest.await, first.await)
    });
    assert_eq!((first.dropped, rest.dropped), (0, 0));
    assert!(map.is_resident(..));
}

#[test]
fn what_is_resident_is_ready_immediately() {
    let dir = dir();
    let path = file(dir.path(), "a", 62, 64 * PAGE);
    let map = pool(16).map(open(&path)).expect("mapped");
    map.load(..).expect("there");
    let mut context = Context::from_waker(Waker::noop());
    let loaded = pin!(map.load_async(5..)).poll(&mut context);
    assert!(matches!(loaded, Poll::Ready(Ok(bytes)) if bytes.len() == 64 * PAGE - 5));
    let pinned = pin!(map.pin_async(PAGE..3 * PAGE)).poll(&mut context);
    let Poll::Ready(Ok(pinned)) = pinned else {
        panic!("not ready")
    };
    check(&pinned, 62, PAGE);
    let empty = pin!(map.load_async(7..7)).poll(&mut context);
    assert!(matches!(empty, Poll::Ready(Ok([]))));
    let beyond = pin!(map.pin_async(..64 * PAGE + 1)).poll(&mut context);
    assert!(matches!(beyond, Poll::Ready(Err(Error::OutOfRange { .. }))));
}

/// A source whose reads wait until they are let go, but for those of its first page.
struct Gated {
    open: Arc<(Mutex<bool>, Condvar)>,
    reads: Arc<AtomicUsize>,
    broken: Option<u64>,
}

impl Gated {
    fn new() -> Self {
        Gated {
            open: Arc::default(),
            reads: Arc::default(),
            broken: None,
        }
    }
}

fn let_go(open: &(Mutex<bool>, Condvar)) {
    *open.0.lock().expect("nobody panicked") = true;
    open.1.notify_all();
}

impl Source for Gated {
    fn len(&self) -> io::Result<u64> {
        Ok(1 << 20)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if offset > 0 {
            let mut open = self.open.0.lock().expect("nobody panicked");
            while !*open {
                open = self.open.1.wait(open).expect("nobody panicked");
            }
        }
        if self.broken.is_some_and(|at| offset + buf.len() as u64 > at) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        for (i, b) in buf.iter_mut().enumerate() {
            *b = byte_at(63, offset as usize + i);
        }
        Ok(buf.len())
    }
}

/// One thread polls both: it waits for none.
#[test]
fn a_page_that_does_not_come_holds_up_no_other() {
    let source = Gated::new();
    let (open, reads) = (source.open.clone(), source.reads.clone());
    let map = unsafe { pool(16).map_trusted(source) }.expect("mapped");
    let waker = Waker::noop();
    let mut context = Context::from_waker(waker);
    let mut stuck: Vec<_> = (1..9)
        .map(|i| Box::pin(map.pin_async(i * 16 * PAGE..(i * 16 + 1) * PAGE)))
        .collect();
    for future in &mut stuck {
        assert!(future.as_mut().poll(&mut context).is_pending());
    }
    eventually("the reads have begun", || reads.load(Ordering::SeqCst) > 0);
    let bytes = block_on(map.load_async(..PAGE)).expect("there");
    check(bytes, 63, 0);
    for future in &mut stuck {
        assert!(future.as_mut().poll(&mut context).is_pending());
    }
    let_go(&open);
    for (i, future) in stuck.into_iter().enumerate() {
        let bytes = block_on(future).expect("there");
        check(&bytes, 63, (i + 1) * 16 * PAGE);
    }
}

/// Before it was served, while it is served, and when its pins were there already.
#[test]
fn a_future_can_be_dropped_at_any_point_and_leaves_nothing_pinned() {
    let source = Gated::new();
    let (open, reads) = (source.open.clone(), source.reads.clone());
    let map = unsafe { pool(16).map_trusted(source) }.expect("mapped");
    let mut context = Context::from_waker(Waker::noop());
    drop(map.pin_async(..));
    let mut during = Box::pin(map.pin_async(16 * PAGE..17 * PAGE));
    assert!(during.as_mut().poll(&mut context).is_pending());
    // (It is the first.)
    eventually("the read has begun", || reads.load(Ordering::SeqCst) > 0);
    drop(during);
    let mut before = Box::pin(map.pin_async(20 * PAGE..21 * PAGE));
    assert!(before.as_mut().poll(&mut context).is_pending());
    drop(before);
    let thread = Arc::new(Thread(std::thread::current(), AtomicUsize::new(0)));
    let waker = Waker::from(thread.clone());
    let mut after = Box::pin(map.pin_async(..PAGE));
    assert!(
        after
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    eventually("it was woken", || thread.1.load(Ordering::SeqCst) == 1);
    drop(after);
    let_go(&open);
    eventually("the other read is done", || {
        map.is_resident(16 * PAGE..17 * PAGE)
    });
    // What is pinned stays.
    eventually("nothing is pinned", || {
        map.release(..).expect("a range");
        !map.is_resident(..PAGE) && !map.is_resident(16 * PAGE..17 * PAGE)
    });
}

#[test]
fn errors_are_values_and_a_map_can_go_while_its_pages_are_read() {
    let source = Gated {
        broken: Some(40 * PAGE as u64),
        ..Gated::new()
    };
    let_go(&source.open);
    let pool = pool(16);
    let map = unsafe { pool.map_trusted(source) }.expect("mapped");
    for _ in 0..2 {
        let error = block_on(map.load_async(50 * PAGE..51 * PAGE)).expect_err("EIO");
        assert!(
            matches!(&error, Error::Read { offset, error, .. }
                if *offset == 50 * PAGE as u64 && error.raw_os_error() == Some(libc::EIO)),
            "{error}"
        );
        let error = block_on(map.pin_async(38 * PAGE..42 * PAGE)).expect_err("EIO");
        assert!(
            matches!(&error, Error::Read { offset, .. } if *offset == 40 * PAGE as u64),
            "{error}"
        );
        check(&block_on(map.pin_async(..8 * PAGE)).expect("good"), 63, 0);
    }
    let source = Gated::new();
    let open = source.open.clone();
    let map = Arc::new(unsafe { pool.map_trusted(source) }.expect("mapped"));
    let mut future = Box::pin(map.pin_owned_async(64 * PAGE..65 * PAGE));
    let mut context = Context::from_waker(Waker::noop());
    assert!(future.as_mut().poll(&mut context).is_pending());
    let_go(&open);
    // The future has the map, and is forgotten with it.
    drop(map);
    drop(future);
    drop(pool);
}

/// More futures at a time than there are threads, buffers, or room in the budget.
#[test]
fn thousands_of_futures_are_served_in_a_small_budget() {
    const PAGES: usize = 8192;
    let dir = dir();
    let path = file(dir.path(), "a", 64, PAGES * PAGE);
    let map = Arc::new(pool(4).map(open(&path)).expect("mapped"));
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .expect("a runtime");
    tokio.block_on(async {
        let task = |i: usize| {
            let map = map.clone();
            tokio::spawn(async move {
                let page = i * 7919 % PAGES;
                let range = page * PAGE..(page + 1) * PAGE;
                let bytes = map.pin_async(range).await.expect("room");
                check(&bytes, 64, page * PAGE);
            })
        };
        let tasks: Vec<_> = (0..10_000).map(task).collect();
        for task in tasks {
            task.await.expect("right bytes");
        }
    });
    assert!(map.stats().misses >= PAGES as u64);
}

/// On the mmap backend the kernel reads the pages in, in another thread.
#[test]
fn the_mmap_backend_has_futures_too() {
    let dir = dir();
    let path = file(dir.path(), "a", 65, 256 * PAGE);
    let pool = Pool::builder().backend(BackendChoice::Mmap).build();
    let map = pool.expect("a pool").map(open(&path)).expect("mapped");
    check(block_on(map.load_async(3..)).expect("there"), 65, 3);
    let mut forgotten = Box::pin(map.pin_async(..));
    let _ = forgotten
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    drop(forgotten);
    check(&block_on(map.pin_async(PAGE..)).expect("there"), 65, PAGE);
}

/// A program's source that reads another one of the same pool would wait for itself.
#[test]
fn a_source_cannot_wait_for_its_own_pool() {
    struct Outer(Arc<Map>);
    impl Source for Outer {
        fn len(&self) -> io::Result<u64> {
            Ok(1 << 16)
        }
        fn read_at(&self, buf: &mut [u8], _: u64) -> io::Result<usize> {
            let inner = block_on(self.0.load_async(..PAGE));
            match inner {
                Err(Error::Recursion { .. }) => buf.fill(7),
                other => panic!("{other:?}"),
            }
            Ok(buf.len())
        }
    }
    let pool = Pool::builder().memory(ByteSize::mib(16)).fill_threads(1);
    let pool = pool.build().expect("a pool");
    let inner = unsafe { pool.map_trusted(Gated::new()) }.expect("mapped");
    let outer = unsafe { pool.map_trusted(Outer(Arc::new(inner))) }.expect("mapped");
    assert_eq!(outer[100], 7);
}
