//! Pinned ranges that keep their map.

#![allow(unsafe_code, reason = "makes slices of mapped memory")]

use crate::api::map::Map;
use crate::api::pin::Pinned;
use crate::base::error::Error;
use crate::base::ids::Unit;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, Range, RangeBounds};
use std::sync::Arc;

impl Map {
    /// As [`pin`](Self::pin); the result keeps the map, borrows nothing, and may go anywhere.
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(path)?;
    /// # drop(file);
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = std::sync::Arc::new(pool.map(&reader)?);
    /// let part = map.pin_owned(5_000..6_000)?;
    /// drop(map);
    /// std::thread::spawn(move || assert!(part.iter().all(|&b| b == 7))).join().unwrap();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`pin`](Self::pin).
    pub fn pin_owned(
        self: &Arc<Self>,
        range: impl RangeBounds<usize>,
    ) -> Result<PinnedOwned, Error> {
        self.pin(range)
            .map(|pinned| PinnedOwned::new(self.clone(), pinned))
    }
}

/// A part of a map that is resident and stays so until this is dropped, which keeps the map as well. See [`Map::pin_owned`].
///
/// With the feature `bytes` it converts to `bytes::Bytes`, whose clones and slices share the one pin.
pub struct PinnedOwned {
    map: Arc<Map>,
    slice: (usize, usize),
    units: Range<Unit>,
}

impl PinnedOwned {
    pub(crate) fn new(map: Arc<Map>, pinned: Pinned<'_>) -> Self {
        let (slice, units) = pinned.into_parts();
        PinnedOwned { map, slice, units }
    }

    /// The map that it is a part of.
    pub fn map(&self) -> &Arc<Map> {
        &self.map
    }
}

impl Deref for PinnedOwned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: a checked part of the map, which self keeps.
        unsafe { std::slice::from_raw_parts(self.slice.0 as *const u8, self.slice.1) }
    }
}

impl AsRef<[u8]> for PinnedOwned {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for PinnedOwned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedOwned")
            .field("source", &self.map.name())
            .field("len", &self.slice.1)
            .finish_non_exhaustive()
    }
}

impl Drop for PinnedOwned {
    fn drop(&mut self) {
        self.map.unpin(self.units.clone());
    }
}

#[cfg(feature = "bytes")]
impl From<PinnedOwned> for bytes::Bytes {
    fn from(pinned: PinnedOwned) -> bytes::Bytes {
        bytes::Bytes::from_owner(pinned)
    }
}

impl Pinned<'_> {
    /// The slice and the pinned units, which the caller unpins.
    fn into_parts(self) -> ((usize, usize), Range<Unit>) {
        let pinned = ManuallyDrop::new(self);
        (pinned.slice, pinned.units.clone())
    }
}

const _: fn() = || {
    fn anywhere<T: Send + Sync + 'static>() {}
    anywhere::<PinnedOwned>();
};
