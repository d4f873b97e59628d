//! Recorded working sets: what one run used is there early in the next.

use crate::api::backing::{Backing, units_of};
use crate::api::map::Map;
use crate::base::error::Error;
use crate::base::ids::Unit;
use crate::base::primitive::Ordering;
use crate::fault::refusal::Refusal;
use crate::fault::run::{Fetch, Need};
use crate::read::blocks::with_pieces;
use crate::read::gather::{gather, is_absent};
use crate::read::prefetch::prefetch;
use crate::read::progress::Progress;
use crate::space::map_core::MapCore;
use crate::space::recorder::{GROUP, Mask, Used};
use crate::sync::staging::CHUNK_MAX;
use faultless_sys::mem::PAGE;
use faultless_sys::signal;
use std::collections::HashSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;

/// How a recording begins; the last byte is the version.
const MAGIC: [u8; 8] = *b"FLTWSET1";
/// Groups that are read together.
const GROUPS_AT_A_TIME: usize = 64;
/// Most groups that a recording is believed to have: those of the largest map there can be.
const GROUPS_MAX: u64 = (64 << 40) / (GROUP * PAGE as u64);

impl Map {
    /// Records which pages are read in from now on, in the order of their first use, until the result is dropped. What is in memory
    /// already, and what is read ahead, belongs to it. With [`warm`](Self::warm), the next run of a program has all that in memory
    /// before it asks for it. A map has one recording at a time: another begins anew, and the former notes nothing any more. (On the
    /// mmap backend it is what the page cache has as it is saved.)
    ///
    /// It takes some hundred bytes for each 2 MiB of which something is used, beside the budget, and no time in a miss.
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 1_000_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(&path)?;
    /// # let again = std::fs::File::open(&path)?;
    /// # drop(file);
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = pool.options().advice(faultless::Advice::Random).map(&reader)?;
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
        let beginning = match &self.backing {
            Backing::Engine(core) if self.check_process().is_ok() => {
                let beginning = core.recorder.start();
                let mut used = Used::default();
                note_present(core, &mut used);
                core.recorder.add(beginning, used);
                beginning
            }
            _ => 0,
        };
        Recording {
            map: self,
            beginning,
        }
    }

    /// Reads in what a recording names, in its order and at the depth of the device, until the budget has no room without an eviction. It
    /// returns when that is done: a program that does not want to wait calls it in a thread of its own. A recording is advice: one of another file,
    /// or of another part of it, brings other pages in, and no wrong byte.
    ///
    /// # Errors
    ///
    /// The reader's; [`io::ErrorKind::InvalidData`] if this is no recording, or not all of it.
    pub fn warm(&self, recording: impl Read) -> io::Result<Warmed> {
        self.check_process()?;
        // (Parts that lie beyond the map take no memory, however many a hostile file names.)
        let saved = Saved::read(recording, |range| self.bytes_of(range).is_some())?;
        let mut warmed = Warmed {
            wanted: 0,
            resident: 0,
        };
        for groups in saved.groups.chunks(GROUPS_AT_A_TIME) {
            let ranges = || {
                saved
                    .ranges(groups)
                    .filter_map(|range| self.bytes_of(range))
            };
            let goes_on = match &self.backing {
                Backing::Empty => false,
                Backing::Mmap(mmap) => {
                    mmap.begin_all(ranges());
                    let goes_on = |range| match mmap.populate(&range) {
                        Ok(()) => true,
                        // (The file may have been truncated since.)
                        Err(Error::Read { .. } | Error::PastEnd { .. }) => mmap.is_live(),
                        Err(_) => false,
                    };
                    ranges().all(goes_on)
                }
                Backing::Engine(core) => self.warm_units(core, ranges()),
            };
            if !goes_on {
                break;
            }
        }
        for range in saved
            .ranges(&saved.groups)
            .filter_map(|range| self.bytes_of(range))
        {
            warmed.wanted += range.len() as u64;
            warmed.resident += self.resident_bytes(range);
        }
        Ok(warmed)
    }

    /// How many bytes of a range of whole pages are in memory.
    fn resident_bytes(&self, range: Range<usize>) -> u64 {
        if self.backing.is_resident(&range) {
            return range.len() as u64;
        }
        let is_resident = |&at: &usize| self.backing.is_resident(&(at..at + PAGE));
        let pages = range.step_by(PAGE).filter(is_resident);
        (pages.count() * PAGE) as u64
    }

    /// Reads what there is room for, and says whether there may be more.
    fn warm_units(&self, core: &MapCore, ranges: impl Iterator<Item = Range<usize>>) -> bool {
        let workers = &self.pool.0.workers;
        let (units, fits) = absent_that_fit(core, ranges);
        if core.is_source() {
            let progress = Progress::new(&workers.wakers);
            for units in units {
                let _ = workers.queue(core, units, &progress);
            }
            progress.wait(|| core.pool.reads_sources());
        } else if core.unit_bytes() <= CHUNK_MAX as u64 {
            gather(&workers.rings, core, Need::Ask, &units, |_| false);
        } else {
            // Each is read in several pieces.
            for unit in units.into_iter().flat_map(Unit::each) {
                let blocked = signal::Blocked::all();
                let _serving = core.pool.withheld.serving(blocked.former());
                let read = |fetch: Fetch<'_>| prefetch(core, unit, 1, fetch);
                match with_pieces(core, Need::Prefetch, read) {
                    Ok(_) | Err(Refusal::Read(_) | Refusal::PastEnd) => {}
                    Err(_) => return false,
                }
            }
        }
        fits && !core.closing.load(Ordering::Relaxed)
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

/// The absent units of some ranges, up to those for which the budget has no room, and whether all fit. (What is read without room would
/// take the place of what came first.)
fn absent_that_fit(
    core: &MapCore,
    ranges: impl Iterator<Item = Range<usize>>,
) -> (Vec<Range<Unit>>, bool) {
    let pool = &core.pool;
    let taken = pool.budget.charged() + pool.reserve.load(Ordering::Relaxed);
    let mut room = pool.budget.limit().saturating_sub(taken) / core.unit_bytes();
    let mut absent: Vec<Range<Unit>> = Vec::new();
    // (Two ranges may have their ends in one unit.)
    let mut next = None;
    for unit in ranges.flat_map(|range| Unit::each(units_of(core, &range))) {
        if next.replace(unit) == Some(unit) || !is_absent(core, unit) {
            continue;
        }
        if room == 0 {
            return (absent, false);
        }
        room -= 1;
        match absent.last_mut() {
            Some(last) if last.end == unit => last.end = unit + 1,
            _ => absent.push(unit..unit + 1),
        }
    }
    (absent, true)
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
    /// Which of the map's recordings it is.
    beginning: u64,
}

impl Recording<'_> {
    /// Writes what was used so far.
    ///
    /// # Errors
    ///
    /// The writer's.
    pub fn save(&self, mut to: impl Write) -> io::Result<()> {
        self.map.check_process()?;
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

/// What was noted, and what is in memory: the evictor may not have heard of the last units.
fn used(core: &MapCore) -> Used {
    let mut used = core.recorder.used();
    note_present(core, &mut used);
    used
}

/// Notes the units that are in memory, those included that the evictor may take.
fn note_present(core: &MapCore, used: &mut Used) {
    let mut first = Unit::new(0);
    while first < core.units_end() {
        let end = (first + GROUP).min(core.units_end());
        // (The words of a group in which nothing is resident may not be there.)
        if core.table.live(first) > 0 {
            let units = Unit::each(first..end).filter(|&unit| core.is_present(unit));
            units.for_each(|unit| used.note(unit));
        }
        first = end;
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Backing::Engine(core) = &self.map.backing
            && self.map.check_process().is_ok()
        {
            core.recorder.stop(self.beginning);
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
    /// Reads a recording, of which only the groups are kept that have a part of the source which `matters`.
    fn read(mut from: impl Read, matters: impl Fn(Range<u64>) -> bool) -> io::Result<Self> {
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
        let mut saved = Saved {
            unit,
            base,
            groups: Vec::new(),
        };
        let mut seen = HashSet::new();
        for _ in 0..count {
            let mut bytes = [0; 8 + size_of::<Mask>()];
            fill(&mut from, &mut bytes)?;
            let mut words = bytes.chunks(8).map(|word| {
                let word = word.iter().rev();
                word.fold(0u64, |sum, &byte| sum << 8 | u64::from(byte))
            });
            let group = words.next().unwrap_or(0);
            let mut mask = Mask::default();
            mask.iter_mut().zip(words).for_each(|(to, word)| *to = word);
            if !matters(saved.place(group, 0)..saved.place(group, GROUP)) {
                continue;
            }
            if !seen.insert(group) {
                return Err(invalid("it names a part twice"));
            }
            saved.groups.push((group, mask));
        }
        Ok(saved)
    }

    /// Where a unit of a group lies in the source.
    fn place(&self, group: u64, unit: u64) -> u64 {
        let unit = group.saturating_mul(GROUP).saturating_add(unit);
        unit.saturating_mul(self.unit).saturating_add(self.base)
    }

    /// The bytes of the source of some groups, in order: neighbouring units together.
    fn ranges(&self, groups: &[(u64, Mask)]) -> impl Iterator<Item = Range<u64>> {
        groups.iter().flat_map(move |&(group, mask)| {
            runs(mask).map(move |run| self.place(group, run.start)..self.place(group, run.end))
        })
    }
}

/// The runs of bits that are set.
fn runs(mask: Mask) -> impl Iterator<Item = Range<u64>> {
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
            let _ = Saved::read(&bytes[..], |_| true);
            let mut begun = MAGIC.to_vec();
            for number in [unit, 0, count] {
                begun.extend_from_slice(&number.to_le_bytes());
            }
            begun.extend_from_slice(&bytes);
            if let Ok(saved) = Saved::read(&begun[..], |_| true) {
                prop_assert!(saved.ranges(&saved.groups).all(|range| range.start <= range.end));
            }
        }
    }

    #[test]
    fn runs_of_bits_are_found_across_words() {
        let mut mask = Mask::default();
        for bit in [0, 1, 63, 64, 65, 200, 511] {
            mask[bit / 64] |= 1 << (bit % 64);
        }
        let found: Vec<_> = runs(mask).collect();
        assert_eq!(found, [0..2, 63..66, 200..201, 511..512]);
    }
}
