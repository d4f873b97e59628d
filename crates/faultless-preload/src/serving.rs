//! A mapping of the program's that is served: by a map that stands in for it, or live.

use faultless::live::Live;
use faultless::standin::StandIn;
use faultless_sys::Errno;
use faultless_sys::file::FileId;
use std::ops::Range;

/// What serves a mapping.
#[derive(Debug)]
pub(crate) enum Served {
    /// A map of the engine's in its place.
    StandIn(StandIn),
    /// The kernel's own mapping, with markers.
    Live(Live),
}

/// Counts of the events in it.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Happened {
    pub(crate) misses: u64,
    pub(crate) read: u64,
    /// Bytes that it holds of the budget.
    pub(crate) resident: u64,
    /// Pages whose markers were put back.
    pub(crate) put_back: u64,
}

impl Served {
    pub(crate) fn stand_in(&self) -> Option<&StandIn> {
        match self {
            Served::StandIn(standin) => Some(standin),
            Served::Live(_) => None,
        }
    }

    pub(crate) fn live(&self) -> Option<&Live> {
        match self {
            Served::StandIn(_) => None,
            Served::Live(live) => Some(live),
        }
    }

    /// From the first address that is still its own to the end of the last; empty if there are none.
    pub(crate) fn range(&self) -> Range<usize> {
        match self {
            Served::StandIn(standin) => standin.range(),
            Served::Live(live) => live.range(),
        }
    }

    /// Whether some of a range is still its own.
    pub(crate) fn touches(&self, range: &Range<usize>) -> bool {
        match self {
            Served::StandIn(standin) => standin.touches(range),
            Served::Live(live) => live.touches(range),
        }
    }

    /// Whether all of a range is still its own.
    pub(crate) fn covers(&self, range: &Range<usize>) -> bool {
        match self {
            Served::StandIn(standin) => standin.covers(range),
            Served::Live(live) => live.covers(range),
        }
    }

    /// How many bytes the program had mapped with it, at first.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Served::StandIn(standin) => standin.bytes(),
            Served::Live(live) => live.bytes(),
        }
    }

    pub(crate) fn serial(&self) -> u64 {
        match self {
            Served::StandIn(standin) => standin.serial(),
            Served::Live(live) => live.serial(),
        }
    }

    pub(crate) fn file_id(&self) -> FileId {
        match self {
            Served::StandIn(standin) => standin.file_id(),
            Served::Live(live) => live.file_id(),
        }
    }

    /// The reports' word for how its bytes stay the file's.
    pub(crate) fn coherence(&self) -> &'static str {
        match self {
            Served::StandIn(standin) if standin.leased() => "lease",
            Served::StandIn(_) => "trust",
            Served::Live(_) => "live",
        }
    }

    pub(crate) fn happened(&self) -> Happened {
        match self {
            Served::StandIn(standin) => {
                let stats = standin.stats();
                Happened {
                    misses: stats.misses,
                    read: stats.bytes_read,
                    resident: standin.resident(),
                    put_back: 0,
                }
            }
            Served::Live(live) => {
                let counts = live.counts();
                Happened {
                    misses: counts.misses,
                    put_back: counts.put_back,
                    ..Happened::default()
                }
            }
        }
    }

    /// Ends it with a call that unmaps its addresses.
    pub(crate) fn unmap_with(
        self,
        unmap: impl FnOnce() -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        match self {
            Served::StandIn(standin) => standin.unmap_with(unmap),
            Served::Live(live) => live.unmap_with(unmap),
        }
    }

    /// Whether a part can be unmapped, and the rest be served.
    pub(crate) fn can_be_trimmed(&self, gone: &Range<usize>) -> bool {
        match self {
            Served::StandIn(standin) => standin.can_be_trimmed(gone),
            Served::Live(live) => live.can_be_trimmed(gone),
        }
    }

    /// Unmaps such a part, by a call that does so.
    pub(crate) fn trim_with(
        &self,
        gone: &Range<usize>,
        unmap: impl Fn() -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        match self {
            Served::StandIn(standin) => standin.trim_with(gone, unmap),
            Served::Live(live) => live.trim_with(gone, unmap),
        }
    }

    /// Leaves it to the kernel. Returns the longest time that a part was held up, in nanoseconds; or gives it back, where the kernel did
    /// not take it, with what it said.
    pub(crate) fn hand_back(self) -> Result<u64, Box<(Served, faultless::Error)>> {
        match self {
            Served::StandIn(standin) => standin.hand_back().map_err(|failed| {
                let (standin, error) = *failed;
                Box::new((Served::StandIn(standin), error))
            }),
            Served::Live(live) => {
                live.end();
                Ok(0)
            }
        }
    }

    /// Ends one that has no addresses left.
    pub(crate) fn end(self) {
        match self {
            Served::StandIn(standin) => standin.end(),
            Served::Live(live) => live.end(),
        }
    }
}

/// Whether a mapping that is served has a part of a range. Takes no lock.
pub(crate) fn touches(range: &Range<usize>) -> bool {
    faultless::standin::touches(range) || faultless::live::touches(range)
}
