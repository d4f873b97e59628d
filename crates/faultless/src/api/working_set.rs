//! Recorded working sets: what one run used is there early in the next.

use crate::api::backing::{Backing, units_of};
use crate::api::map::Map;
use crate::base::ids::Unit;
use crate::fault::run::Need;
use crate::read::gather::{Wanted, gather};
use crate::space::map_core::MapCore;
use crate::space::page::State;
use crate::space::recorder::{GROUP, Mask, Used};
use faultless_sys::mem::PAGE;
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;

/// How a recording begins; the last byte is the version.
const MAGIC: [u8; 8] = *b"FLTWSET1";
/// Most groups that a recording is believed to have: those of the largest map there can be.
const GROUPS_MAX: u64 = (64 << 40) / (GROUP * PAGE as u64);

impl Map {
    /// Records which pages are used from now on, in the order of their first use, until the result is dropped. With
    /// [`warm`](Self::warm), the next run of a program has them in memory before it asks for them.
    ///
    /// It takes 80 bytes for each 2 MiB of which something is used, beside the budget, and no time in a miss.
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 1_000_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(&path)?;
    /// # let again = std::fs::File::open(&path)?;
    /// # drop(file);
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = pool.map(&reader)?;
    /// let recording = map.record();
    /// assert_eq!(map[5_000] + map[900_000], 14);
    /// let mut saved = Vec::new(); // a file, as a rule
    /// recording.save(&mut saved)?;
    ///
    /// let next = pool.map(&again)?;
    /// let warmed = next.warm(&saved[..])?;
    /// assert_eq!((warmed.wanted, warmed.resident), (8192, 8192));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn record(&self) -> Recording<'_> {
        if let Backing::Engine(core) = &self.backing {
            core.recorder.start();
        }
        Recording { map: self }
    }

    /// Reads in what a recording names, in its order and at the depth of the device, as far as the budget has room. It returns when
    /// that is done: a program that does not want to wait calls it in a thread of its own. A recording is advice: one of another file,
    /// or of another part of it, brings other pages in, and no wrong byte.
    ///
    /// # Errors
    ///
    /// The reader's; [`io::ErrorKind::InvalidData`] if this is no recording, or not all of it.
    pub fn warm(&self, recording: impl Read) -> io::Result<Warmed> {
        let saved = Saved::read(recording)?;
        self.check_process()?;
        let ranges: Vec<Range<usize>> = saved
            .ranges()
            .filter_map(|range| self.bytes_of(range))
            .collect();
        let wanted = ranges.iter().map(|range| range.len() as u64).sum();
        match &self.backing {
            Backing::Empty => {}
            Backing::Mmap(mmap) => ranges.iter().for_each(|range| _ = mmap.populate(range)),
            Backing::Engine(core) => self.warm_units(core, &ranges),
        }
        let there = ranges
            .iter()
            .filter(|range| self.backing.is_resident(range));
        Ok(Warmed {
            wanted,
            resident: there.map(|range| range.len() as u64).sum(),
        })
    }

    fn warm_units(&self, core: &MapCore, ranges: &[Range<usize>]) {
        let workers = &self.pool.0.workers;
        if core.is_source() {
            for range in ranges {
                let _ = workers.queue(core, units_of(core, range));
            }
            return;
        }
        let wanted: Vec<Wanted<'_>> = ranges
            .iter()
            .map(|range| Wanted {
                core,
                units: units_of(core, range),
                need: Need::Ask,
            })
            .collect();
        gather(&workers.rings, &wanted, |_, _| false);
    }

    /// The bytes of the region that are some bytes of the source, as far as the map has them: whole pages.
    fn bytes_of(&self, source: Range<u64>) -> Option<Range<usize>> {
        let (base, end) = match &self.backing {
            Backing::Empty => return None,
            Backing::Mmap(mmap) => (mmap.base(), (self.head + self.len) as u64),
            Backing::Engine(core) => (core.base.get(), core.pages_end().get()),
        };
        let at = |offset: u64| offset.saturating_sub(base).min(end) as usize;
        let bytes = at(source.start)..at(source.end);
        (!bytes.is_empty()).then_some(bytes)
    }
}

/// What [`Map::warm`] came to, in bytes of whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Warmed {
    /// What the recording names, as far as the map has it.
    pub wanted: u64,
    /// What of it was in memory when it was done. (The rest had no room, or could not be read.)
    pub resident: u64,
}

/// Notes which pages of a map are used, until it is dropped. See [`Map::record`].
pub struct Recording<'a> {
    map: &'a Map,
}

impl Recording<'_> {
    /// Writes what was used so far.
    ///
    /// # Errors
    ///
    /// The writer's.
    pub fn save(&self, mut to: impl Write) -> io::Result<()> {
        let (used, unit, base) = match &self.map.backing {
            Backing::Engine(core) => (used(core), core.unit_bytes(), core.base.get()),
            Backing::Mmap(mmap) => {
                let mut used = Used::default();
                let pages = (self.map.head + self.map.len).div_ceil(PAGE);
                let there = |&page: &usize| mmap.is_resident(&(page * PAGE..page * PAGE + 1));
                (0..pages)
                    .filter(there)
                    .for_each(|page| used.note(Unit::new(page as u64)));
                (used, PAGE as u64, mmap.base())
            }
            Backing::Empty => (Used::default(), PAGE as u64, 0),
        };
        let mut bytes = MAGIC.to_vec();
        for number in [unit, base, used.groups().len() as u64] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for (group, mask) in used.groups() {
            bytes.extend_from_slice(&group.to_le_bytes());
            mask.iter()
                .for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        }
        to.write_all(&bytes)?;
        to.flush()
    }
}

/// What was noted, and what is resident: the evictor may not have heard of the last units.
fn used(core: &MapCore) -> Used {
    let mut used = core.recorder.used();
    let resident = |&unit: &Unit| core.page(unit).load().state() == State::Resident;
    Unit::each(Unit::new(0)..core.units_end())
        .filter(resident)
        .for_each(|unit| used.note(unit));
    used
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Backing::Engine(core) = &self.map.backing
            && self.map.check_process().is_ok()
        {
            core.recorder.stop();
        }
    }
}

impl fmt::Debug for Recording<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording")
            .field("source", &self.map.name())
            .finish_non_exhaustive()
    }
}

/// A recording as it was saved.
struct Saved {
    unit: u64,
    base: u64,
    groups: Vec<(u64, Mask)>,
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("this is no recording of a working set: {why}; record it anew"),
    )
}

impl Saved {
    fn read(mut from: impl Read) -> io::Result<Self> {
        let mut magic = [0; MAGIC.len()];
        fill(&mut from, &mut magic)?;
        if magic != MAGIC {
            return Err(invalid("it begins otherwise"));
        }
        let [unit, base, count] = [(); 3].map(|()| number(&mut from));
        let (unit, base, count) = (unit?, base?, count?);
        let good = unit.is_power_of_two() && (PAGE as u64..=1 << 30).contains(&unit);
        if !good || !base.is_multiple_of(PAGE as u64) || count > GROUPS_MAX {
            return Err(invalid("its numbers cannot be"));
        }
        let mut groups = Vec::new();
        for _ in 0..count {
            let group = number(&mut from)?;
            let mut mask = Mask::default();
            for word in &mut mask {
                *word = number(&mut from)?;
            }
            groups.push((group, mask));
        }
        Ok(Saved { unit, base, groups })
    }

    /// The bytes of the source, in order: neighbouring units together.
    fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let place = |unit: u64| {
            let at = unit.saturating_mul(self.unit);
            at.saturating_add(self.base)
        };
        self.groups.iter().flat_map(move |(group, mask)| {
            let first = group.saturating_mul(GROUP);
            runs(mask).map(move |run| {
                place(first.saturating_add(run.start))..place(first.saturating_add(run.end))
            })
        })
    }
}

/// The runs of bits that are set.
fn runs(mask: &Mask) -> impl Iterator<Item = Range<u64>> + use<> {
    let mask = *mask;
    let is_set = move |bit: u64| mask[bit as usize / 64] >> (bit % 64) & 1 == 1;
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = (at..GROUP).find(|&bit| is_set(bit))?;
        let end = (start..GROUP).find(|&bit| !is_set(bit)).unwrap_or(GROUP);
        at = end;
        Some(start..end)
    })
}

fn fill(from: &mut impl Read, bytes: &mut [u8]) -> io::Result<()> {
    from.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => invalid("it ends early"),
        _ => e,
    })
}

fn number(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    fill(from, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the bytes are: an error or ranges, and no panic.
        #[test]
        fn foreign_bytes_are_an_error_or_advice(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            unit in prop_oneof![Just(4096u64), any::<u64>()],
            count in prop_oneof![0u64..4, any::<u64>()],
        ) {
            let _ = Saved::read(&bytes[..]);
            let mut begun = MAGIC.to_vec();
            for number in [unit, 0, count] {
                begun.extend_from_slice(&number.to_le_bytes());
            }
            begun.extend_from_slice(&bytes);
            if let Ok(saved) = Saved::read(&begun[..]) {
                prop_assert!(saved.ranges().all(|range| range.start <= range.end));
            }
        }
    }

    #[test]
    fn runs_of_bits_are_found_across_words() {
        let mut mask = Mask::default();
        for bit in [0, 1, 63, 64, 65, 200, 511] {
            mask[bit / 64] |= 1 << (bit % 64);
        }
        let found: Vec<_> = runs(&mask).collect();
        assert_eq!(found, [0..2, 63..66, 200..201, 511..512]);
    }
}
