//! The engine's own descriptors of files that are mapped live: one for each file.

use crate::base::descriptor::Owned;
use crate::base::primitive::{Mutex, MutexGuard, lock};
use crate::coherence::keeper;
use crate::coherence::opening::reopen;
use crate::space::fds::Fd;
use faultless_sys::file::{self, FileId};
use std::io;
use std::sync::Arc;

/// A file of which something is mapped live.
#[derive(Debug)]
pub(crate) struct LiveFile {
    fd: Fd,
    pub(crate) id: FileId,
}

impl LiveFile {
    #[cfg(all(test, not(faultless_sim)))]
    pub(crate) fn of(fd: Fd, id: FileId) -> Self {
        LiveFile { fd, id }
    }

    /// The number in the table of the keeper's threads.
    pub(crate) fn keepers_number(&self) -> i32 {
        self.fd.engine_number()
    }

    /// The descriptor in a copy of the process, if it has one. Nothing is fetched there.
    pub(crate) fn number_in_copy(&self) -> Option<i32> {
        self.fd.if_it_names(self.id)
    }

    /// The descriptor, or `None` if the engine cannot get it back: the program may have closed the number, and have put another file there.
    pub(crate) fn number(&self) -> Option<i32> {
        self.fd.found(self.id)
    }
}

static OPEN: Mutex<Vec<Arc<LiveFile>>> = Mutex::new(Vec::new());

/// The lock on the descriptors, held across `fork`.
pub(crate) fn freeze() -> MutexGuard<'static, Vec<Arc<LiveFile>>> {
    lock(&OPEN)
}

/// The file behind the program's descriptor `fd`, opened anew for reading if it is not open yet.
pub(crate) fn open(fd: i32) -> io::Result<Arc<LiveFile>> {
    let id = file::status(fd)?.id;
    let mut open = lock(&OPEN);
    if let Some(known) = open.iter().find(|f| f.id == id) {
        return Ok(known.clone());
    }
    let number = Owned::new(reopen(fd, false)?);
    // Reads of one page read that page alone: what is read ahead is decided here. (`MADV_RANDOM` on the mapping would make reclaim
    // forget that its pages are used.)
    let _ = file::advise(number.number(), 0, 0, libc::POSIX_FADV_RANDOM);
    let fd = keeper::adopt(number, Some(id))?;
    let file = Arc::new(LiveFile { fd, id });
    open.push(file.clone());
    Ok(file)
}

/// Whether no descriptor of a file is open.
pub(crate) fn holds_none_of(id: FileId) -> bool {
    lock(&OPEN).iter().all(|f| f.id != id)
}

/// Whether no descriptor of any file is open.
pub(crate) fn holds_nothing() -> bool {
    lock(&OPEN).is_empty()
}

/// Closes the descriptors of files of which nothing is mapped any more.
pub(crate) fn close_unused() {
    let unused: Vec<_> = {
        let mut open = lock(&OPEN);
        let gone = open.extract_if(.., |f| Arc::strong_count(f) == 1);
        gone.filter_map(Arc::into_inner).collect()
    };
    for file in unused {
        keeper::retire(file.fd, file.id);
    }
}

/// In a forked child: the descriptors are closed there.
pub(crate) fn forget(mut open: MutexGuard<'static, Vec<Arc<LiveFile>>>) {
    std::mem::forget(std::mem::take(&mut *open));
}
