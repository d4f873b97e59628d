//! What must be true, whatever happens.

use crate::kernel::files::word_of;
use crate::kernel::memory::{self, Loaded, PAGE};
use crate::world::{fail, quietly, with};
use faultless::{Error, Map, Pool, Stats, simulation};

/// Where the bytes of a map come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A file, guarded by a lease.
    Leased,
    /// A file, for which the program vouches.
    Trusted,
    /// The program's own code.
    Code,
}

/// What a map must show.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Truth {
    pub(crate) origin: Origin,
    pub(crate) inode: usize,
    /// The version of the bytes, when it was mapped.
    pub(crate) version: u64,
    /// Where in the source the map begins: a multiple of the page size.
    pub(crate) offset: u64,
    /// The length of the source, when it was mapped.
    pub(crate) source_len: u64,
    pub(crate) pages: u64,
    /// Pages of a fill unit.
    pub(crate) unit: u64,
}

/// Why the bytes of a page may be missing, if they may.
fn excuse(truth: &Truth, page: u64) -> Option<&'static str> {
    with(|w| {
        let f = w.plan.faults;
        if f.eio > 0 {
            return Some("the device fails");
        }
        if f.abandoned > 0 {
            return Some("pins can be lost, and fill the budget");
        }
        if w.kept_maps {
            return Some("pages that must be kept fill the budget");
        }
        if truth.origin == Origin::Code {
            return None;
        }
        let inode = &w.kernel.files.inodes[truth.inode];
        if inode.broken.is_some() {
            return Some("a sector is broken");
        }
        if inode.version != truth.version {
            return Some("a writer has been there");
        }
        // (A unit is there as a whole, or it is not.)
        let unit_end = (page / truth.unit + 1) * truth.unit + truth.offset / PAGE as u64;
        if unit_end > inode.len / PAGE as u64 && inode.len < truth.source_len {
            return Some("the file has been truncated");
        }
        // A writer that waits has the map refuse what it cannot read in time.
        (truth.origin == Origin::Leased && w.plan.parties.writer).then_some("the lease was broken")
    })
}

/// Checks one page's bytes.
fn check_bytes(truth: &Truth, page: u64, bytes: &[u8; PAGE], how: &str) {
    let now = match truth.origin {
        Origin::Code => truth.source_len,
        _ => with(|w| w.kernel.files.inodes[truth.inode].len),
    };
    for (i, got) in bytes.chunks_exact(8).enumerate() {
        let at = truth.offset + page * PAGE as u64 + i as u64 * 8;
        let want = word_of(truth.version, at).to_le_bytes();
        for (b, (got, want)) in got.iter().zip(want).enumerate() {
            let at = at + b as u64;
            // Behind the end of the source a page is zero; a file may have lost its end since, and a page the bytes behind it.
            let right = at < truth.source_len && *got == want;
            if !right && !(at >= now.min(truth.source_len) && *got == 0) {
                fail(&format!(
                    "wrong bytes in {how}: {truth:?}, page {page}, offset {at}: {got:02x}, and the source had {want:02x}"
                ));
            }
        }
    }
}

/// Where a page of a map lies.
fn address(map: &Map, page: u64) -> usize {
    map.as_ptr() as usize + page as usize * PAGE
}

/// Loads a page, as the program does.
pub(crate) fn load(map: &Map, truth: &Truth, page: u64) {
    let addr = address(map, page);
    match memory::load(addr) {
        Loaded::Bytes(bytes) => check_bytes(truth, page, &bytes, "a load"),
        Loaded::Killed if excuse(truth, page).is_some() => {}
        Loaded::Killed => {
            let said = with(|w| w.kernel.stderr.clone());
            fail(&format!(
                "a load is refused without a reason: {truth:?}, page {page}\n  {said}"
            ));
        }
    }
}

/// Checks pages that were asked for: each has been there. (They may have been evicted since, or taken back before, unseen.)
pub(crate) fn check_asked(map: &Map, truth: &Truth, pages: std::ops::Range<u64>) {
    for page in pages {
        let addr = address(map, page);
        if !with(|w| w.kernel.memory.has_been_there(addr)) {
            fail(&format!(
                "a page that was asked for was never read: {truth:?}, page {page}"
            ));
        }
    }
}

/// Checks pages that are pinned: they are there, they are not the kernel's to take, and touching them raises nothing.
pub(crate) fn check_pinned(map: &Map, truth: &Truth, pages: std::ops::Range<u64>) {
    for page in pages {
        let addr = address(map, page);
        if !with(|w| w.kernel.memory.is_firm(addr)) {
            fail(&format!(
                "a pinned page is gone, or may go: {truth:?}, page {page}"
            ));
        }
        match quietly(|| memory::load(addr)) {
            Loaded::Bytes(bytes) => check_bytes(truth, page, &bytes, "a pin"),
            Loaded::Killed => fail("a pinned page is refused"),
        }
    }
}

/// An error of the engine's, where the bytes of some pages were wanted.
pub(crate) fn check_error(truth: &Truth, pages: std::ops::Range<u64>, error: &Error) {
    if pages.clone().all(|page| excuse(truth, page).is_none()) {
        fail(&format!(
            "an error without a reason: {truth:?}, pages {pages:?}: {error}"
        ));
    }
}

/// The budget is kept, but for what is small and bounded.
pub(crate) fn check_budget(pool: &Pool) {
    let (used, limit) = quietly(|| simulation::charged(pool));
    let (since_resize, largest) = with(|w| (w.clock.saturating_sub(w.resized_at), w.largest_pins));
    let allowed = limit + limit / 20 + (96 << 10) + largest;
    if used > allowed && since_resize > 2_000_000_000 {
        fail(&format!(
            "{used} bytes are charged, and the budget is {limit}"
        ));
    }
}

/// Figures do not go back.
pub(crate) fn check_figures(before: &Stats, after: &Stats) {
    let figures = |s: &Stats| {
        [
            s.misses,
            s.fills,
            s.bytes_read,
            s.evictions,
            s.cooled,
            s.rescued,
            s.errors,
        ]
    };
    for (b, a) in figures(before).iter().zip(figures(after)) {
        if a < *b {
            fail(&format!("a figure goes back: {before:?}, then {after:?}"));
        }
    }
}

/// Once absent pages are refused, what was kept stays: nowhere else are its bytes.
pub(crate) fn check_kept(map: &Map, kept: &mut Option<Vec<bool>>) {
    let (looks, refused) = quietly(|| simulation::look(map));
    if !refused {
        return;
    }
    with(|w| w.kept_maps = true);
    // (Once absent pages are refused, only what is kept is being filled: it is rescued.)
    let now: Vec<bool> = looks.iter().map(|l| l.kept || l.filling).collect();
    match kept {
        None => *kept = Some(looks.iter().map(|l| l.kept && !l.soft).collect()),
        Some(before) => {
            for (unit, (b, n)) in before.iter().zip(&now).enumerate() {
                if *b && !n {
                    fail(&format!(
                        "unit {unit} was kept when the lease was given up, and is gone"
                    ));
                }
            }
        }
    }
}
