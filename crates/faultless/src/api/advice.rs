//! What users say about how a map will be read.

/// How a map will be read. As with `madvise`, it never changes what is read, only how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Advice {
    /// Nothing is known: the miss of a plain load fills one unit, or the 128 KiB around it where what lies around misses turns out to be
    /// used soon, and the budget has room. (In files, and with units of 4 KiB. To find out, one miss of 128 brings what lies around it, at
    /// first one of 16.)
    /// Threads that turn out to read in order, one unit after the other or at
    /// equal distances, forwards or backwards, are read ahead of. (In files. A user's [`Source`](crate::Source) is not called for a guess:
    /// say `Sequential`.)
    #[default]
    Normal,
    /// Here and there: a miss fills one unit, and nothing is read ahead.
    Random,
    /// In order: from the first miss on, what comes next is read ahead.
    Sequential,
}

/// How files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Reads {
    /// Directly where the file system can, buffered where it cannot: the pool's budget is the cache, and a second copy
    /// of the same bytes in the page cache would only take memory.
    #[default]
    Auto,
    /// Directly (`O_DIRECT`), or not at all. (A process that is killed during a direct read ends when the device has answered or
    /// failed. A buffered read ends with the process.)
    Direct,
    /// Through the page cache: right where other processes read the same file in other ways, or keep it cached.
    Buffered,
}

/// Where plain loads of a live map are served by guard markers. See [`MapOptions::markers`](crate::MapOptions::markers).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum GuardMarkers {
    /// Nowhere.
    #[default]
    Never,
    /// From Linux 6.19 on, where a miss then takes no `mmap_lock`.
    WhereFree,
    /// From Linux 6.15 on, also where the removal of a marker takes `mmap_lock` for reading: to try it. (Nothing is gained there.)
    WherePossible,
}
