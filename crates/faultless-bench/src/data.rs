//! The data file, and the order in which its pages are read.
//!
//! Page `p` consists of 512 little-endian words `seed(p) + i · STEP`: any page can be checked by itself, at the speed of
//! memory, and no page of one file can pass for another.

use crate::contender::open_direct;
use anyhow::{Context, bail};
use faultless::ByteSize;
use faultless_sys::mem::PAGE;
use faultless_untrusted::input;
use faultless_untrusted::output::{Kept, Output, Readers};
use faultless_untrusted::printable;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Words of a page.
const WORDS: usize = PAGE / 8;
pub(crate) const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
/// Written and checked at a time.
const CHUNK_PAGES: u64 = 1024;
/// Read at a time, when all is read.
const WARM_CHUNK: usize = 4 << 20;
/// Pages that are read twice to see whether the data is cold; how many at a time; and how much longer the first read takes then.
const COLD_PROBES: u64 = 256;
const PROBES_AT_A_TIME: u64 = 8;
const COLD_RATIO: f64 = 4.0;
/// Smallest data file.
const SIZE_MIN: ByteSize = ByteSize::mib(4);
/// Pages of an existing file that are checked before it is used again.
const PROBES: u64 = 64;

/// A mixing function (SplitMix64, by S. Vigna).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(STEP);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Fills `page` with the bytes of page number `number`.
pub fn fill_page(page: &mut [u8], number: u64) {
    let seed = mix(number);
    for (i, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = seed.wrapping_add(STEP.wrapping_mul(i as u64)).to_le_bytes();
    }
}

/// Word `index` of page number `number`.
#[inline]
pub fn word_of(number: u64, index: u64) -> u64 {
    mix(number).wrapping_add(STEP.wrapping_mul(index))
}

/// How many bytes of `page` are not what they must be.
#[inline]
pub fn wrong_bytes(page: &[u8], number: u64) -> u64 {
    let seed = mix(number);
    let (words, rest) = page.as_chunks::<8>();
    let mut differences = (words.len() ^ WORDS) as u64 | rest.len() as u64;
    let mut expected = seed;
    for word in words {
        differences |= u64::from_le_bytes(*word) ^ expected;
        expected = expected.wrapping_add(STEP);
    }
    if differences == 0 {
        return 0;
    }
    let mut right = vec![0u8; PAGE];
    fill_page(&mut right, number);
    page.iter().zip(&right).filter(|(a, b)| a != b).count() as u64
        + page.len().abs_diff(PAGE) as u64
}

/// A random permutation of the numbers below `n`, computed and not stored: a Feistel network over the next power of
/// four, walked until the result is below `n`.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..n`.
    pub fn new(n: u64) -> Self {
        let bits = 64 - n.max(2).saturating_sub(1).leading_zeros();
        Permutation {
            n,
            half_bits: bits.div_ceil(2),
        }
    }

    /// The number at position `i`, which must be below `n`.
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = i;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for round in 0..4 {
                (left, right) = (right, left ^ (mix(right ^ (round << 56)) & mask));
            }
            x = (left << self.half_bits) | right;
            if x < self.n {
                return x;
            }
        }
    }
}

/// Whether a benchmark can use this much of a file.
pub fn check_size(size: ByteSize) -> anyhow::Result<()> {
    if size < SIZE_MIN || !size.get().is_multiple_of(PAGE as u64) {
        bail!(
            "the size of the data is {size}: it must be a multiple of 4 KiB, and at least {SIZE_MIN}"
        );
    }
    Ok(())
}

/// Makes sure that `path` is a data file of `size`: uses it if it is one, makes it if there is nothing there, and
/// refuses to touch anything else. `progress` is told how many bytes of how many are written.
pub fn prepare(
    path: &Path,
    size: ByteSize,
    mut progress: impl FnMut(u64, u64),
) -> anyhow::Result<()> {
    check_size(size)?;
    match input::open(path) {
        Ok(file) => return check_existing(&file, path, size),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("cannot open {}", printable(path))),
    }
    let cannot = || format!("cannot make the data file {} of {size}", printable(path));
    let (output, file) =
        Output::create(path, Readers::AsUsual, Kept::IfWhole).with_context(cannot)?;
    let written = write_all(file.get_ref(), size, &mut progress);
    output.finish(written.map(|()| file)).with_context(cannot)
}

/// Reads all of the data once, past the page cache. Beneath a virtual machine, or a volume in a cloud, what was read before comes from
/// a cache and all else from far away, ten times as slow: whoever measures first must not be the one who pays for that. `progress`
/// is told how many bytes of how many are read.
pub fn warm(path: &Path, size: ByteSize, mut progress: impl FnMut(u64, u64)) -> anyhow::Result<()> {
    let file = open_direct(path)?;
    let size = size.get();
    let mut buffer = vec![0u8; WARM_CHUNK + PAGE];
    let aligned = buffer.as_ptr().align_offset(PAGE);
    let buffer = &mut buffer[aligned..aligned + WARM_CHUNK];
    let mut at = 0;
    while at < size {
        let n = (size - at).min(WARM_CHUNK as u64) as usize;
        file.read_exact_at(&mut buffer[..n], at)
            .with_context(|| format!("cannot read {} at byte {at}", printable(&path)))?;
        at += n as u64;
        progress(at, size);
    }
    Ok(())
}

/// Whether the storage gives much sooner what it has given just before: if it has not been read for long, [`warm`] helps.
pub fn is_cold(path: &Path, size: ByteSize) -> anyhow::Result<bool> {
    let file = open_direct(path)?;
    let pages = size.get() / PAGE as u64;
    let order = Permutation::new(pages);
    let from = faultless_sys::raw::monotonic_ns();
    let mut times = [0.0; 2];
    for time in &mut times {
        let began = std::time::Instant::now();
        std::thread::scope(|s| -> anyhow::Result<()> {
            let readers: Vec<_> = (0..PROBES_AT_A_TIME)
                .map(|t| {
                    let (file, order) = (&file, &order);
                    s.spawn(move || -> std::io::Result<()> {
                        let mut buffer = vec![0u8; 2 * PAGE];
                        let aligned = buffer.as_ptr().align_offset(PAGE);
                        for i in (t..COLD_PROBES).step_by(PROBES_AT_A_TIME as usize) {
                            let page = order.at(from.wrapping_add(i) % pages);
                            let buffer = &mut buffer[aligned..aligned + PAGE];
                            file.read_exact_at(buffer, page * PAGE as u64)?;
                        }
                        Ok(())
                    })
                })
                .collect();
            for reader in readers {
                let done = reader.join();
                done.map_err(|_| anyhow::anyhow!("a reader panicked"))?
                    .with_context(|| format!("cannot read {}", printable(&path)))?;
            }
            Ok(())
        })?;
        *time = began.elapsed().as_secs_f64();
    }
    Ok(times[0] > COLD_RATIO * times[1])
}

fn check_existing(file: &File, path: &Path, size: ByteSize) -> anyhow::Result<()> {
    let len = file.metadata()?.len();
    let pages = len.min(size.get()) / PAGE as u64;
    let foreign = || {
        format!(
            "{} exists and is not a data file of this benchmark; name another with --file",
            printable(&path)
        )
    };
    if pages == 0 || !file.metadata()?.is_file() {
        bail!(foreign());
    }
    let mut page = vec![0u8; PAGE];
    for i in 0..PROBES.min(pages) {
        let number = Permutation::new(pages).at(i);
        file.read_exact_at(&mut page, number * PAGE as u64)?;
        if wrong_bytes(&page, number) != 0 {
            bail!(foreign());
        }
    }
    if len < size.get() {
        bail!(
            "{} has {}, and --size is {size}; remove it to have it made anew, or ask for a smaller size",
            printable(&path),
            ByteSize::new(len)
        );
    }
    Ok(())
}

fn write_all(
    file: &File,
    size: ByteSize,
    progress: &mut impl FnMut(u64, u64),
) -> std::io::Result<()> {
    let mut out = file;
    let mut chunk = vec![0u8; CHUNK_PAGES as usize * PAGE];
    let pages = size.get() / PAGE as u64;
    let mut at = 0;
    while at < pages {
        let n = CHUNK_PAGES.min(pages - at);
        for (i, page) in chunk.chunks_mut(PAGE).take(n as usize).enumerate() {
            fill_page(page, at + i as u64);
        }
        out.write_all(&chunk[..n as usize * PAGE])?;
        at += n;
        progress(at * PAGE as u64, size.get());
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_visits_every_page_once() {
        for n in [1, 2, 3, 1000, 1024, 4097] {
            let p = Permutation::new(n);
            let mut seen = vec![false; n as usize];
            (0..n).for_each(|i| assert!(!std::mem::replace(&mut seen[p.at(i) as usize], true)));
            assert!(
                n < 1000
                    || (0..n - 1).filter(|&i| p.at(i + 1) == p.at(i) + 1).count() < n as usize / 50
            );
        }
    }

    #[test]
    fn every_wrong_byte_is_counted() {
        let mut page = vec![0u8; PAGE];
        fill_page(&mut page, 77);
        assert_eq!(wrong_bytes(&page, 77), 0);
        assert!(wrong_bytes(&page, 78) > 4000);
        page[4095] ^= 1;
        page[0] ^= 0x80;
        assert_eq!(wrong_bytes(&page, 77), 2);
    }

    #[test]
    fn a_foreign_file_is_not_touched() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("letters");
        std::fs::write(&path, vec![b'x'; 4 << 20]).expect("writable");
        let e = prepare(&path, ByteSize::mib(4), |_, _| ())
            .expect_err("not ours")
            .to_string();
        assert!(e.contains("letters") && e.contains("--file"), "{e}");
        assert_eq!(
            std::fs::read(&path).expect("still there"),
            vec![b'x'; 4 << 20]
        );
    }

    #[test]
    fn a_data_file_is_made_once_and_used_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("data");
        let mut written = 0;
        prepare(&path, ByteSize::mib(4), |n, _| written = n).expect("made");
        assert_eq!(written, 4 << 20);
        prepare(&path, ByteSize::mib(4), |_, _| panic!("written again")).expect("used again");
        assert!(
            prepare(&path, ByteSize::mib(8), |_, _| ()).is_err(),
            "too short"
        );
    }
}
