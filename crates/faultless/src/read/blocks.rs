//! Reading users' sources, in whole blocks.

use crate::base::ids::{Addr, RegionAt};
use crate::base::source;
use crate::base::source::Source;
use crate::fault::install::{Filled, install_piece};
use crate::fault::read_file::file_piece;
use crate::fault::refusal::Refusal;
use crate::fault::run::{Fetch, Piece};
use crate::space::map_core::{MapCore, Reading};
use std::ops::Range;

/// Largest piece of a source that is read at once, unless its blocks are larger.
const PIECE: u64 = 256 * 1024;

/// Fetches pieces of a user's source, whole blocks at a time. For ordinary contexts only.
pub(crate) fn source_pieces<'a>(
    core: &'a MapCore,
    source: &'a dyn Source,
    align: u64,
) -> impl FnMut(Range<RegionAt>, Option<Addr>) -> Result<Piece, Refusal> + 'a {
    move |range, keep| {
        // Pieces begin at multiples of the alignment, since units do.
        let want = (range.end - range.start).min(PIECE.max(align));
        let len = want.next_multiple_of(align) as usize;
        let pool = &*core.pool;
        let mut block = pool.blocks.take(len, &pool.budget);
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
pub(crate) fn with_pieces<R>(core: &MapCore, f: impl FnOnce(Fetch<'_>) -> R) -> R {
    match &core.reading {
        Reading::File { fd, .. } => f(&mut |range, keep| file_piece(core, fd, range, keep)),
        Reading::Source { source, align } => f(&mut source_pieces(core, &**source, *align)),
    }
}
