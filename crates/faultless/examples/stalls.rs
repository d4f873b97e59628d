//! What cold pages do to the tasks of an async runtime: 10,000 tasks on two threads read a random page each, beside a ticker that
//! wakes each millisecond. How late it was at most, with plain loads from the kernel's mmap, with plain loads of a map, and with
//! futures.
//!
//!     cargo run --release -p faultless --example stalls [FILE]
//!
//! FILE must have 40 MiB; without one, a file is made in the current directory, and removed.

#[path = "common/mod.rs"]
mod common;

use common::{PAGE, evict_cache, make};
use faultless::{Advice, BackendChoice, ByteSize, Map, Pool};
use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const TASKS: usize = 10_000;
const TICK: Duration = Duration::from_millis(1);

#[derive(Clone, Copy)]
enum Way {
    Kernel,
    Plain,
    Futures,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Kernel => "kernel mmap, plain loads",
            Way::Plain => "faultless, plain loads",
            Way::Futures => "faultless, pin_async",
        }
    }
}

/// The file without its pages in the page cache, as a map.
fn map(way: Way, file: &File) -> Result<Map, faultless::Error> {
    let backend = match way {
        Way::Kernel => BackendChoice::Mmap,
        Way::Plain | Way::Futures => BackendChoice::default(),
    };
    let pool = Pool::builder().memory(ByteSize::mib(128)).backend(backend);
    let pool = pool.build()?;
    let options = pool.options().advice(Advice::Random);
    // SAFETY: this program's own file, which nobody writes to.
    #[allow(unsafe_code, reason = "vouches for the file")]
    unsafe {
        options.map_trusted(file.try_clone().expect("a descriptor"))
    }
}

async fn read(way: Way, map: &Map, page: usize) -> u64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u64::from(b)).sum();
    let range = page * PAGE..(page + 1) * PAGE;
    match way {
        Way::Kernel | Way::Plain => sum(&map[range]),
        Way::Futures => sum(&map.pin_async(range).await.expect("readable")),
    }
}

/// How late the ticker was at most, and how long all tasks took.
async fn run(way: Way, map: Arc<Map>) -> (Duration, Duration) {
    let done = Arc::new(AtomicBool::new(false));
    let ticker = tokio::spawn({
        let done = done.clone();
        async move {
            let mut late = Duration::ZERO;
            while !done.load(Ordering::Relaxed) {
                let due = Instant::now() + TICK;
                tokio::time::sleep_until(due.into()).await;
                late = late.max(due.elapsed());
            }
            late
        }
    });
    let pages = map.len() / PAGE;
    let began = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|i| {
            let map = map.clone();
            tokio::spawn(async move { read(way, &map, i * 7919 % pages).await })
        })
        .collect();
    for task in tasks {
        task.await.expect("a task");
    }
    let took = began.elapsed();
    done.store(true, Ordering::Relaxed);
    (ticker.await.expect("the ticker"), took)
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1);
    let file = match &path {
        Some(path) => File::open(path)?,
        None => File::open(make(10_000)?.path())?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()?;
    println!("{TASKS} tasks on 2 threads, a cold page each; a ticker each millisecond");
    for round in 1..=3 {
        for way in [Way::Kernel, Way::Plain, Way::Futures] {
            evict_cache(&file);
            let map = Arc::new(map(way, &file)?);
            let (late, took) = runtime.block_on(run(way, map));
            println!(
                "round {round}, {:<26} late by {late:>10.1?} at most; all tasks in {took:.1?}",
                way.name()
            );
        }
    }
    Ok(())
}
