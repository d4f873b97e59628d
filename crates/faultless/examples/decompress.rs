//! Reads a run-length-encoded file as if it were the file that it encodes: a user's own `Source`.
//!
//! `cargo run --release --example decompress -- OFFSET LENGTH`
//!
//! The encoded form has 16 bytes for each run (length, then a byte repeated); the decoded form has gigabytes. Only the
//! pages that are looked at are ever decoded, by fill threads, while the thread that touched them sleeps.

#![allow(unsafe_code, reason = "vouches for the bytes of its own source")]

use faultless::{ByteSize, Pool, Source};
use std::process::ExitCode;

/// Runs of bytes, with the position at which each begins.
struct RunLength {
    runs: Vec<(u64, u8)>,
    len: u64,
}

impl RunLength {
    fn parse(encoded: &[u8]) -> Self {
        let mut len = 0;
        let mut runs = Vec::new();
        for run in encoded.chunks_exact(16) {
            let (count, byte) = (
                u64::from_le_bytes(run[..8].try_into().unwrap_or_default()),
                run[8],
            );
            runs.push((len, byte));
            len += count;
        }
        RunLength { runs, len }
    }
}

impl Source for RunLength {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let n = (self.len.saturating_sub(offset)).min(buf.len() as u64) as usize;
        let mut run = self
            .runs
            .partition_point(|&(start, _)| start <= offset)
            .saturating_sub(1);
        for (i, b) in buf[..n].iter_mut().enumerate() {
            while self
                .runs
                .get(run + 1)
                .is_some_and(|&(start, _)| start <= offset + i as u64)
            {
                run += 1;
            }
            *b = self.runs[run].1;
        }
        Ok(n)
    }

    fn name(&self) -> String {
        "run-length-encoded data".to_owned()
    }
}

fn run(offset: usize, len: usize) -> Result<(), Box<dyn std::error::Error>> {
    // 64 Mi runs of 1 to 255 bytes would be 8 GiB; here 100,000 runs of 80 KiB.
    let encoded: Vec<u8> = (0..100_000u64)
        .flat_map(|i| {
            let mut run = [0u8; 16];
            run[..8].copy_from_slice(&81_920u64.to_le_bytes());
            run[8] = b'a' + (i % 26) as u8;
            run
        })
        .collect();
    let pool = Pool::builder().memory(ByteSize::mib(16)).build()?;
    // SAFETY: the runs never change.
    let map = unsafe { pool.map_trusted(RunLength::parse(&encoded)) }?;
    let end = offset.saturating_add(len).min(map.len());
    println!("{}", String::from_utf8_lossy(&map[offset.min(end)..end]));
    eprintln!("{} bytes decoded of {}", map.stats().bytes_read, map.len());
    Ok(())
}

fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse::<usize>());
    match (numbers.next(), numbers.next()) {
        (Some(Ok(offset)), Some(Ok(len))) => match run(offset, len) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("decompress: {e}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("usage: decompress OFFSET LENGTH");
            ExitCode::from(2)
        }
    }
}
