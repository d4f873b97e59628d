//! How soon a program is at speed that begins with the working set that its last run recorded.
//!
//!     cargo run --release -p faultless --example startup [THREADS [PAGES]]
//!
//! THREADS (16) read at random among PAGES (30000) that are scattered over 1 GiB, and sum each page up. Printed is the time from the
//! start, with nothing in memory, until the program does 90 % of the reads per second that it does in the end: without a recording, and
//! with one that is read in first ([`Map::warm`]). The file is in the current directory, and is removed again.

#[path = "common/mod.rs"]
mod common;

use common::{PAGE, check, evict_cache, make};
use faultless::{Advice, ByteSize, Map, Pool};
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const FILE_PAGES: usize = 1 << 18;
const ROUNDS: usize = 4;
/// Rates are taken over this time, and the last ones count as steady.
const WINDOW: Duration = Duration::from_millis(20);
const WINDOWS: usize = 250;
const STEADY: usize = 50;

struct Run {
    until_at_speed: Duration,
    /// How much of it went into the recording.
    warming: Duration,
    recorded: Vec<u8>,
}

/// Reads from random pages of the working set until told to stop.
fn reader(map: &Map, set: &[usize], seed: u64, reads: &AtomicU64, stop: &AtomicBool) {
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    while !stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let page = set[(random % set.len() as u64) as usize];
        check(&map[page * PAGE..(page + 1) * PAGE], page);
        reads.fetch_add(1, Ordering::Relaxed);
    }
}

/// How many reads the program had done at the end of each window.
fn watch(began: Instant, reads: &AtomicU64) -> Vec<(Duration, u64)> {
    (0..WINDOWS)
        .map(|_| {
            thread::sleep(WINDOW);
            (began.elapsed(), reads.load(Ordering::Relaxed))
        })
        .collect()
}

/// When the program did 90 % of what it does in the end.
fn at_speed(seen: &[(Duration, u64)]) -> Duration {
    let rate =
        |a: (Duration, u64), b: (Duration, u64)| (b.1 - a.1) as f64 / (b.0 - a.0).as_secs_f64();
    let steady = rate(seen[seen.len() - 1 - STEADY], seen[seen.len() - 1]);
    let first = seen.windows(2).find(|w| rate(w[0], w[1]) >= 0.9 * steady);
    first.map_or(seen[seen.len() - 1].0, |w| w[1].0)
}

fn run(
    path: &Path,
    threads: usize,
    set: &[usize],
    recorded: Option<&[u8]>,
) -> Result<Run, Box<dyn Error>> {
    let file = File::open(path)?;
    evict_cache(&file);
    let pool = Pool::builder().memory(ByteSize::gib(1)).build()?;
    let options = pool.options().advice(Advice::Random);
    // SAFETY: this program's own file, which nobody writes to.
    #[allow(unsafe_code, reason = "vouches for the file")]
    let map = unsafe { options.map_trusted(file)? };
    let recording = map.record();
    let (reads, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let began = Instant::now();
    if let Some(recorded) = recorded {
        map.warm(recorded)?;
    }
    let warming = began.elapsed();
    let seen = thread::scope(|scope| {
        for seed in 1..=threads as u64 {
            let (map, reads, stop) = (&map, &reads, &stop);
            scope.spawn(move || reader(map, set, seed, reads, stop));
        }
        let seen = watch(began, &reads);
        stop.store(true, Ordering::Relaxed);
        seen
    });
    let mut saved = Vec::new();
    recording.save(&mut saved)?;
    drop(recording);
    Ok(Run {
        until_at_speed: at_speed(&seen),
        warming,
        recorded: saved,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads: usize = arguments.next().as_deref().unwrap_or("16").parse()?;
    let pages: usize = arguments.next().as_deref().unwrap_or("30000").parse()?;
    let made = make(FILE_PAGES)?;
    // (Multiples of an odd number, modulo a power of two: no page twice.)
    let set: Vec<usize> = (0..pages.min(FILE_PAGES))
        .map(|i| i * 40_503 % FILE_PAGES)
        .collect();
    println!(
        "{threads} threads, {} pages at random among {FILE_PAGES}",
        set.len()
    );
    for number in 1..=ROUNDS {
        let without = run(made.path(), threads, &set, None)?;
        let with = run(made.path(), threads, &set, Some(&without.recorded))?;
        println!(
            "round {number}: at speed after {:.2?} without a recording, {:.2?} with one ({:.2?} to read it in): {:.2} x",
            without.until_at_speed,
            with.until_at_speed,
            with.warming,
            with.until_at_speed.as_secs_f64() / without.until_at_speed.as_secs_f64()
        );
    }
    Ok(())
}
