//! Loads that ask first.

use crate::api::backing::{Backing, check_end, units_of};
use crate::api::map::Map;
use crate::base::error::Error;
use crate::base::process;
use crate::fault::ask::ask;
use std::ops::{Range, RangeBounds};

impl Map {
    /// Makes a range resident, and returns it. A miss costs what a read and the installation of its pages cost: no fault and no
    /// signal, with which a plain load of an absent page begins and ends. A hit costs one look at a word for each fill unit. Use it
    /// where a program knows what it is about to read.
    ///
    /// It pins nothing. If a page is evicted before it is touched, or the kernel takes it back because memory is short, the touch is a
    /// plain load, with the fault and the signal of one, and SIGBUS if the page cannot be read again. So ask for little at a time,
    /// against the budget; and pin what is handed to a system call, or must not be SIGBUS on any account ([`pin`](Self::pin)).
    ///
    /// It reads neighbouring absent units together, 256 KiB at a time and several such parts concurrently, and blocks all signals of
    /// the calling thread meanwhile, as a pin does. Loads in order are read ahead of, as plain loads are. On the mmap backend the kernel reads the range in (since
    /// Linux 5.14; before, nothing is read until it is touched).
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(path)?;
    /// # drop(file);
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = pool.map(&reader)?;
    /// let record = map.load(5_000..6_000)?; // an error of this read is an Err, not a SIGBUS
    /// assert!(record.iter().all(|&b| b == 7));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Kernel`] if pages cannot be installed; [`Error::Read`], [`Error::PastEnd`],
    /// [`Error::LeaseBroken`] if a page cannot be read;
    /// [`Error::BudgetExhausted`] if pinned pages leave no room for a unit (after ten seconds without any progress, or more beside
    /// threads that go on);
    /// [`Error::Recursion`] in a source that reads its own pool; [`Error::Forked`].
    #[inline]
    pub fn load(&self, range: impl RangeBounds<usize>) -> Result<&[u8], Error> {
        let bytes = self.range(range)?;
        if !self.is_there(&bytes) {
            self.load_absent(&bytes)?;
        }
        Ok(&self[bytes.start - self.head..bytes.end - self.head])
    }

    /// Whether a range is in memory: a hit. [`load_absent`](Self::load_absent) does the work of a miss.
    #[inline]
    fn is_there(&self, bytes: &Range<usize>) -> bool {
        match &self.backing {
            // (A forked child does not have the table.)
            Backing::Engine(core) => {
                !process::forked() && process::pid() == core.pid && core.has_resident(bytes)
            }
            _ => false,
        }
    }

    #[cold]
    fn load_absent(&self, bytes: &Range<usize>) -> Result<(), Error> {
        self.check_process()?;
        if bytes.is_empty() {
            return Ok(());
        }
        match &self.backing {
            Backing::Empty => Ok(()),
            Backing::Mmap(mmap) => mmap.populate(bytes),
            Backing::Engine(core) => {
                check_end(core, bytes)?;
                let units = units_of(core, bytes);
                // (Of more than the budget, the first would be gone when the last has come.)
                if self.leaves_room_for_buffers(bytes.len() as u64) {
                    self.fetch_units(core, std::slice::from_ref(&units), true);
                }
                ask(core, units, true).map_err(|(unit, refusal)| {
                    let offset = core.source_at(core.unit_start(unit)).get();
                    refusal.into_error(&core.name, offset, self.pool.budget())
                })
            }
        }
    }
}
