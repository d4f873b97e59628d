//! Checksums files under a memory budget, with several threads.
//!
//! `cargo run --release --example checksum -- FILE…`
//!
//! Each thread walks its own part of the file and prefetches ahead of itself; memory stays within 64 MiB however large
//! the files are.

use faultless::{Advice, ByteSize, Pool};
use std::process::ExitCode;

/// How far ahead of the sum to prefetch.
const AHEAD: usize = 4 << 20;
const STEP: usize = 1 << 20;

/// FNV-1a over 8-byte words, so that the sum of parts can be combined by exclusive or.
fn sum(bytes: &[u8], mut position: u64) -> u64 {
    bytes.chunks(8).fold(0, |acc, chunk| {
        let mut word = [0u8; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        position = position.wrapping_add(1);
        acc ^ (u64::from_le_bytes(word) ^ position).wrapping_mul(0x100_0000_01b3)
    })
}

fn main() -> ExitCode {
    let files: Vec<_> = std::env::args_os().skip(1).collect();
    if files.is_empty() {
        eprintln!("usage: checksum FILE…");
        return ExitCode::from(2);
    }
    match run(&files) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("checksum: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(files: &[std::ffi::OsString]) -> Result<(), Box<dyn std::error::Error>> {
    let pool = Pool::builder().memory(ByteSize::mib(64)).build()?;
    for path in files {
        let map = pool
            .options()
            .advice(Advice::Sequential)
            .map(std::fs::File::open(path)?)?;
        let threads = std::thread::available_parallelism()?.get();
        let part = map.len().div_ceil(threads).next_multiple_of(STEP).max(STEP);
        let total = std::thread::scope(|s| {
            let workers: Vec<_> = (0..map.len())
                .step_by(part)
                .map(|start| {
                    let map = &map;
                    s.spawn(move || -> Result<u64, faultless::Error> {
                        let end = (start + part).min(map.len());
                        let mut acc = 0;
                        for at in (start..end).step_by(STEP) {
                            let ahead = (at + AHEAD).min(end);
                            map.prefetch(ahead..(ahead + STEP).min(end))?;
                            // Pinned, so that a read error is an error here and not a signal.
                            let bytes = map.pin(at..(at + STEP).min(end))?;
                            acc ^= sum(&bytes, (at / 8) as u64);
                        }
                        Ok(acc)
                    })
                })
                .collect();
            workers
                .into_iter()
                .map(|w| w.join().expect("no panic in a worker"))
                .try_fold(0, |a, r| r.map(|x| a ^ x))
        })?;
        println!("{total:016x}  {}", path.to_string_lossy());
    }
    let stats = pool.stats();
    eprintln!(
        "{} misses, {} read, at most {} held",
        stats.maps.misses,
        ByteSize::new(stats.maps.bytes_read),
        stats.peak
    );
    Ok(())
}
