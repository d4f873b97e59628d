//! How long it takes to pin 1 MiB that is not in memory, beside one direct read (`O_DIRECT`) of the same size.
//!
//!     cargo run --release -p faultless --example pins
//!
//! Both read each a different half of 256 ranges, in turns, from a file of 256 MiB in the current directory, which is removed again.

#[path = "common/mod.rs"]
mod common;

use common::{PAGE, check, evict_cache, make, median};
use faultless::{Advice, ByteSize, Pool};
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

const RANGE: usize = 1 << 20;
const RANGES: usize = 256;
const ROUNDS: usize = 5;

/// Memory that a direct read can fill.
#[repr(align(4096))]
struct Buffer([u8; RANGE]);

/// How long each of a round's ranges took: pinned, and read.
fn round(path: &std::path::Path, shift: usize) -> Result<[Vec<Duration>; 2], Box<dyn Error>> {
    let file = File::open(path)?;
    evict_cache(&file);
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let pool = Pool::builder().memory(ByteSize::mib(512)).build()?;
    let options = pool.options().advice(Advice::Random);
    // SAFETY: this program's own file, which nobody writes to.
    #[allow(unsafe_code, reason = "vouches for the file")]
    let map = unsafe { options.map_trusted(file)? };
    let mut buffer = Box::new(Buffer([0; RANGE]));
    let mut times = [Vec::new(), Vec::new()];
    // (An odd number that has no divisor in common with the number of ranges: each range is visited once, none after its neighbour.)
    for i in 0..RANGES {
        let at = i * 91 % RANGES * RANGE;
        let pins = (i + shift).is_multiple_of(2);
        let began = Instant::now();
        if pins {
            let pinned = map.pin(at..at + RANGE)?;
            times[0].push(began.elapsed());
            check(&pinned, at / PAGE);
        } else {
            direct.read_exact_at(&mut buffer.0, at as u64)?;
            times[1].push(began.elapsed());
            check(&buffer.0, at / PAGE);
        }
    }
    Ok(times)
}

fn main() -> Result<(), Box<dyn Error>> {
    let made = make(RANGES * RANGE / PAGE)?;
    println!("{} ranges of 1 MiB, each cold; medians", RANGES / 2);
    for number in 0..ROUNDS {
        let [pinned, read] = round(made.path(), number)?.map(median);
        println!(
            "round {}: pinned in {pinned:.1?}, read in {read:.1?}: {:.2} x its speed",
            number + 1,
            read.as_secs_f64() / pinned.as_secs_f64()
        );
    }
    Ok(())
}
