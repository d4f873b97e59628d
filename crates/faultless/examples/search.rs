//! Counts how often a byte string occurs in files, under a memory budget: a memmap2 program with three lines changed.
//!
//! `cargo run --release --example search -- NEEDLE FILE…`

use faultless::{Advice, ByteSize, Pool};
use std::process::ExitCode;

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    let Some((&first, _)) = needle.split_first() else {
        return 0;
    };
    let mut found = 0;
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|&b| b == first) {
        rest = &rest[at..];
        found += usize::from(rest.starts_with(needle));
        rest = &rest[1..];
    }
    found
}

fn run(needle: &str, files: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let pool = Pool::builder().memory(ByteSize::mib(32)).build()?;
    for path in files {
        let map = pool
            .options()
            .advice(Advice::Sequential)
            .map(std::fs::File::open(path)?)?;
        println!("{path}: {}", count(&map, needle.as_bytes()));
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(needle), files) = (args.next(), args.collect::<Vec<_>>()) else {
        eprintln!("usage: search NEEDLE FILE…");
        return ExitCode::from(2);
    };
    match run(&needle, &files) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("search: {e}");
            ExitCode::FAILURE
        }
    }
}
