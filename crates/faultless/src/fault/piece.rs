//! Fetching a piece of a map's file.

use crate::base::ids::{Addr, RegionAt};
use crate::fault::huge::huge_piece;
use crate::fault::install::{Filled, install_piece};
use crate::fault::read_file::read_file;
use crate::fault::refusal::Refusal;
use crate::fault::run::Piece;
use crate::space::fds::Fd;
use crate::space::map_core::MapCore;
use std::ops::Range;

/// Fetches a piece from the map's file, through a staging buffer.
pub(crate) fn file_piece(
    core: &MapCore,
    fd: &Fd,
    range: Range<RegionAt>,
    keep: Option<Addr>,
) -> Result<Piece, Refusal> {
    if keep.is_none()
        && let Some(piece) = huge_piece(core, fd, &range)
    {
        return piece;
    }
    let pool = &*core.pool;
    let len = (range.end - range.start) as usize;
    let buffer = pool.staging.take(len, &pool.budget);
    let src = buffer.addr();
    // Direct reads want whole pages; the source may well end in the last.
    let want = len.min(buffer.len());
    let piece = read_file(core, fd, src, want, core.source_at(range.start))
        .and_then(|got| install_piece(core, range.start, &Filled { src, got, want }, keep));
    pool.staging.give(buffer);
    piece
}
