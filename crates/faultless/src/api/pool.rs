//! A memory budget, and the threads and descriptors that the maps under it share.

use crate::api::backend::Backend;
use crate::api::engine::Shared;
use crate::api::promise::{check_budget, check_units};
use crate::base::error::Error;
use crate::base::memory;
use crate::base::primitive::{Ordering, lock};
use crate::base::size::ByteSize;
use crate::base::stats::Stats;
use crate::evict::limits;
use crate::read::rings::Way;
use crate::space::pool_core::PoolCore;
use crate::space::registry;
use std::fmt;
use std::sync::Arc;

/// A memory budget shared by any number of maps. Cloning gives another handle to the same pool; the pool lives until
/// its last handle and its last map are gone.
///
/// ```
/// use faultless::{ByteSize, Pool};
/// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
/// # file.set_len(1 << 20)?;
/// # let file = std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))?;
/// let pool = Pool::builder().memory(ByteSize::mib(64)).build()?;
/// println!("misses are served by: {}", pool.backend());
/// # let map = unsafe { pool.map_trusted(file) }?;
/// # assert_eq!(map[4096], 0);
/// pool.resize(ByteSize::mib(32))?;
/// assert!(pool.stats().used <= ByteSize::mib(32));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Pool(pub(crate) Arc<Shared>);

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("budget", &self.budget())
            .field("backend", &self.0.backend)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// What serves the misses of this pool.
    pub fn backend(&self) -> &Backend {
        &self.0.backend
    }

    /// The budget.
    pub fn budget(&self) -> ByteSize {
        self.0.budget()
    }

    /// Changes the budget. A smaller one is reached by eviction, soon after; pages that are pinned stay.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] as for [`PoolBuilder::build`](crate::PoolBuilder::build); the budget is then unchanged.
    pub fn resize(&self, budget: ByteSize) -> Result<(), Error> {
        check_budget(budget, memory::look().machine)?;
        if let Some(engine) = &self.0.engine {
            let mut largest = 0;
            registry::for_each(|core| {
                if Arc::ptr_eq(&core.pool, &engine.core) {
                    largest = largest.max(core.unit_bytes());
                }
            });
            check_units(budget, largest)?;
        }
        lock(&self.0.promise).change(budget)?;
        self.0.copies.set_limit(budget.get());
        if let Some(engine) = &self.0.engine {
            let core = &engine.core;
            limits::set_budget(core, budget.get());
        }
        Ok(())
    }
    /// What happened in all maps of the pool, and what it holds.
    pub fn stats(&self) -> PoolStats {
        let maps = match &self.0.engine {
            Some(engine) => sum_of(&engine.core),
            None => Stats::default(),
        };
        let budget = self
            .0
            .engine
            .as_ref()
            .map_or(&*self.0.copies, |e| &e.core.budget);
        let (used, peak) = (budget.charged(), budget.peak());
        PoolStats {
            maps,
            budget: self.budget(),
            used: ByteSize::new(used),
            peak: ByteSize::new(peak),
            batches: match self.0.workers.rings.way() {
                Way::Unknown => Batches::None,
                Way::Uring => Batches::Uring,
                Way::Blocking(why) => Batches::Blocking(why),
            },
            page_tables: ByteSize::new(memory::page_tables()),
        }
    }
}

/// What happened in all maps that a pool has, and had.
fn sum_of(pool: &Arc<PoolCore>) -> Stats {
    // Held all the while: a map that closes meanwhile is counted once, so that no figure goes back.
    let past = lock(&pool.past);
    let mut maps = past.clone();
    registry::for_each(|core| {
        if Arc::ptr_eq(&core.pool, pool) && !core.summed.load(Ordering::Acquire) {
            maps.add(&core.counters.snapshot());
        }
    });
    maps
}

/// What a pool holds, and what happened in its maps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// The sum over all maps that the pool has, and had.
    pub maps: Stats,
    /// The budget.
    pub budget: ByteSize,
    /// What is charged to it now: frames, staging buffers, page states, queues. On the mmap backend: copies.
    pub used: ByteSize,
    /// The most that was ever charged at once.
    pub peak: ByteSize,
    /// How batches are read.
    pub batches: Batches,
    /// Page tables of the whole process, which the kernel allocates beside the budget (`VmPTE`).
    pub page_tables: ByteSize,
}

/// How a pool does many reads at a time ([`Map::load_many`](crate::Map::load_many)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Batches {
    /// There were none yet.
    #[default]
    None,
    /// By io_uring: up to 64 in flight for each thread.
    Uring,
    /// One after the other, and why.
    Blocking(String),
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Pool>();
};
