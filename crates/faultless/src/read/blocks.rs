//! Reading users' sources, in whole blocks.

use crate::base::clock;
use crate::base::ids::{Addr, Nanos, RegionAt};
use crate::base::source;
use crate::base::source::Source;
use crate::fault::charge::{BUDGET_WAIT, Wish, wait_for_room};
use crate::fault::install::{Filled, install_piece};
use crate::fault::piece::file_piece;
use crate::fault::refusal::Refusal;
use crate::fault::run::{Fetch, Need, Piece};
use crate::space::map_core::{MapCore, Reading};
use crate::space::pool_core::PoolCore;
use std::ops::Range;

/// Largest piece of a source that is read at once, unless its blocks are larger.
const PIECE: u64 = 256 * 1024;

/// How long a load or a pin waits for room for its buffer, before it goes over the budget: a source may hold what others wait
/// for, so no thread may wait for long here.
const ROOM_WAIT: Nanos = Nanos::from_millis(100);
/// How far buffers may go over the budget, as a divisor of it. Beyond that, a thread waits as it would for a page.
const OVER_SHARE: u64 = 8;
/// How long to sleep before looking whether it may go over the budget: no thread says so.
const ROOM_LOOK: Nanos = Nanos::from_millis(10);

/// Charges a buffer. What is read ahead takes only what is free.
fn charge_buffer(pool: &PoolCore, bytes: u64, need: Need) -> Result<(), Refusal> {
    if pool.budget.try_charge(bytes) {
        return Ok(());
    }
    if need == Need::Prefetch {
        return Err(Refusal::Budget);
    }
    let since = clock::now();
    let wish = Wish {
        bytes,
        pages: false,
        look: ROOM_LOOK,
    };
    wait_for_room(pool, wish, |_| {
        let waited = clock::now().since(since);
        let limit = pool.budget.limit();
        if waited > ROOM_WAIT && pool.budget.used() <= limit + limit / OVER_SHARE {
            pool.budget.charge_anyway(bytes);
            return Some(Ok(()));
        }
        (waited > BUDGET_WAIT).then_some(Err(Refusal::Budget))
    })
}

/// Fetches pieces of a user's source, whole blocks at a time. For ordinary contexts only.
pub(crate) fn source_pieces<'a>(
    core: &'a MapCore,
    source: &'a dyn Source,
    align: u64,
    need: Need,
) -> impl FnMut(Range<RegionAt>, Option<Addr>) -> Result<Piece, Refusal> + 'a {
    move |range, keep| {
        // Pieces begin at multiples of the alignment, since units do.
        let want = (range.end - range.start).min(PIECE.max(align));
        let len = want.next_multiple_of(align) as usize;
        let pool = &*core.pool;
        let charge = |bytes| charge_buffer(pool, bytes, need);
        let mut block = pool.blocks.take(len, &pool.budget, charge)?;
        let bytes = &mut block.bytes()[..len];
        let at = core.source_at(range.start);
        let got = source::read_full(source, align as usize, bytes, at)
            .map_err(|e| e.raw_os_error().map_or(Refusal::Source, Refusal::Read))?;
        let filled = Filled {
            src: Addr::new(bytes.as_mut_ptr() as usize),
            got,
            want: want as usize,
        };
        install_piece(core, range.start, &filled, keep)
    }
}

/// Runs `f` with what fetches pieces of a map, whatever it is made of. For ordinary contexts only.
pub(crate) fn with_pieces<R>(core: &MapCore, need: Need, f: impl FnOnce(Fetch<'_>) -> R) -> R {
    match &core.reading {
        Reading::File { fd, .. } => f(&mut |range, keep| file_piece(core, fd, range, keep)),
        Reading::Source { source, align } => f(&mut source_pieces(core, &**source, *align, need)),
    }
}
