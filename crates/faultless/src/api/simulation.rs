//! What the simulator looks at, and the handlers that a simulated fork calls. Built under `--cfg faultless_sim` alone.

#![allow(missing_docs, reason = "for the project's own simulator")]

use crate::api::map::Map;
use crate::api::pool::Pool;
use crate::base::ids::Unit;
use crate::base::primitive::Ordering;
use crate::coherence::fork;
use crate::space::page::State;
pub use crate::space::pool_core::LOSSES;
use crate::space::registry;

/// What a forking thread does before the process is copied.
pub fn before_fork() {
    fork::before();
}

/// What it does afterwards, in the parent.
pub fn after_fork() {
    fork::after();
}

/// How a unit stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Its bytes are in memory: installed, or in a slot.
    pub kept: bool,
    /// A thread fills it, from its slot or anew.
    pub filling: bool,
    /// The kernel may take it, or a batch may discard it.
    pub soft: bool,
    pub pins: u64,
}

/// How the units of a map stand, and whether absent ones are refused from now on.
pub fn look(map: &Map) -> (Vec<Look>, bool) {
    let Some(core) = map.core() else {
        return (Vec::new(), false);
    };
    let units = Unit::each(Unit::new(0)..core.units_end()).map(|unit| {
        let word = core.page(unit).load();
        Look {
            kept: word.state() == State::Resident || word.cool(),
            filling: word.state() == State::Filling,
            soft: word.soft() || word.batch(),
            pins: word.pins(),
        }
    });
    (units.collect(), core.refusal.load(Ordering::SeqCst) != 0)
}

/// What a pool has charged, and what it may.
pub fn charged(pool: &Pool) -> (u64, u64) {
    let engine = pool.0.engine.as_ref();
    engine.map_or((0, 0), |e| {
        (e.core.budget.charged(), e.core.budget.allowed())
    })
}

/// How many units the evictor has taken out of a pool's maps. The count wraps.
pub fn evicted(pool: &Pool) -> u32 {
    let engine = pool.0.engine.as_ref();
    engine.map_or(0, |e| e.core.evicted.load(Ordering::Relaxed))
}

/// The figures by which threads wait for memory.
pub fn describe(pool: &Pool) -> String {
    let Some(engine) = &pool.0.engine else {
        return String::new();
    };
    let core = &engine.core;
    let get = |n: &crate::base::primitive::AtomicU64| n.load(Ordering::Relaxed);
    format!(
        "used {} of {}, reserve {}, wanted {} or {}, firm {} and fresh {} of {}, evicted {}; futures: {}",
        core.budget.used(),
        core.budget.limit(),
        get(&core.reserve),
        get(&core.wanted),
        core.budget.line.least(),
        get(&core.firm),
        core.filled.bytes(),
        get(&core.firm_max),
        core.evicted.load(Ordering::Relaxed),
        pool.0.workers.requests.describe(),
    )
}

/// Whether some thread is inside the gate of some map.
pub fn inside() -> bool {
    registry::any_inside()
}
