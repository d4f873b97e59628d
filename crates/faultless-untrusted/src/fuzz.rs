//! A harness for tests that feed damaged input to what reads input.
//!
//! `FAULTLESS_FUZZ_SECONDS` says how long each of them runs (1 by default), `FAULTLESS_FUZZ_SEED` runs one case again.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant, SystemTime};

/// Longest that one case may take: what takes longer hangs, as far as a user can tell.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest input.
const LEN_MAX: usize = 1 << 16;

/// Random numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Of a seed.
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// One below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n.max(1) as u64) as usize
    }
}

/// Feeds mutations of `seeds` to `f`, which must not panic, whatever it is given.
///
/// # Panics
///
/// When `f` does, or takes too long; after a line on stderr that says how to run the case again.
pub fn run(name: &str, seeds: &[Vec<u8>], f: impl Fn(&[u8], &mut Random)) {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let budget = Duration::from_secs(number("FAULTLESS_FUZZ_SECONDS").unwrap_or(1));
    let given = number("FAULTLESS_FUZZ_SEED");
    let fresh = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(1, |d| d.as_nanos() as u64);
    let mut seed = given.unwrap_or(fresh);
    let began = Instant::now();
    let mut cases = 0u64;
    while cases == 0 || (given.is_none() && began.elapsed() < budget) {
        let mut random = Random::new(seed);
        let mut input = seeds[random.below(seeds.len())].clone();
        for _ in 0..random.below(8) {
            mutate(&mut input, seeds, &mut random);
        }
        let case = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| f(&input, &mut random)));
        let again = || eprintln!("{name}: FAULTLESS_FUZZ_SEED={seed} runs this case again");
        if let Err(panic) = done {
            again();
            resume_unwind(panic);
        }
        if case.elapsed() > PATIENCE {
            again();
            panic!("{name}: it took {:?}", case.elapsed());
        }
        cases += 1;
        seed = seed.wrapping_add(1);
    }
    eprintln!("{name}: {cases} cases in {:?}", began.elapsed());
}

/// Numbers that programs fall over.
const ODD: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_f000,
    u64::MAX,
];
/// Texts that parsers fall over.
const TEXTS: [&[u8]; 12] = [
    b"\n",
    b"\0",
    b" ",
    b"-1",
    b"18446744073709551616",
    b"1e999",
    b"\xff",
    b"\x1b[2J",
    b"\"",
    b"\\u0000",
    b"nan",
    b":",
];

fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let len = random.below(64).min(input.len() - at.min(input.len()));
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = random.number() as u8,
        2 => drop(input.drain(at..at + len)),
        3 => {
            let again: Vec<u8> = input[at..at + len].to_vec();
            let times = 1 + random.below(8);
            let more = again.repeat(times);
            drop(input.splice(at..at, more));
        }
        4 => {
            let odd = ODD[random.below(ODD.len())].to_le_bytes();
            let width = 1 << random.below(4);
            let end = (at + width).min(input.len());
            input[at..end].copy_from_slice(&odd[..end - at]);
        }
        5 => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len() + 1);
            let to = (from + random.below(256)).min(other.len());
            drop(input.splice(at..at, other[from..to].iter().copied()));
        }
        6 => {
            let text = TEXTS[random.below(TEXTS.len())];
            drop(input.splice(at..at + len.min(4), text.iter().copied()));
        }
        _ => {
            // A number in a text becomes another.
            let start = input[at..]
                .iter()
                .position(u8::is_ascii_digit)
                .map(|i| at + i);
            if let Some(start) = start {
                let end = input[start..]
                    .iter()
                    .position(|b| !b.is_ascii_digit())
                    .map_or(input.len(), |i| start + i);
                let odd = ODD[random.below(ODD.len())] >> random.below(64);
                drop(input.splice(start..end, odd.to_string().bytes()));
            }
        }
    }
    input.truncate(LEN_MAX);
}
