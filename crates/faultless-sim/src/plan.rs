//! What a run is to be like: how the scheduler chooses, what fails how often, how large everything is. All of it comes from the seed.

use crate::rng::Rng;

/// How the scheduler chooses among threads that can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// At random; another thread gets its turn once in so many steps.
    Random(u64),
    /// The one with the highest priority, which changes once in so many steps (PCT: Burckhardt et al., ASPLOS 2010). So threads are held
    /// up for long, which chance alone does seldom.
    Priorities(u64),
}

/// What fails, once in so many times; 0 for never.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    /// A read of a file: EIO.
    pub(crate) eio: u64,
    /// A read of a file: fewer bytes than were asked for.
    pub(crate) short: u64,
    /// A read: EAGAIN.
    pub(crate) again: u64,
    /// A call that waits: EINTR, or an early return.
    pub(crate) interrupted: u64,
    /// An installation of a page: ENOMEM.
    pub(crate) no_memory: u64,
    /// An installation: EAGAIN.
    pub(crate) busy: u64,
    /// A batch of advice stops early.
    pub(crate) batch: u64,
    /// A handler that never returns, or the end of a thread that is cancelled, where a signal may come.
    pub(crate) abandoned: u64,
}

/// What other parties do, as threads of their own.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Parties {
    /// The kernel takes pages back that are marked `MADV_FREE`.
    pub(crate) reclaim: bool,
    /// Somebody holds `mmap_lock` for long.
    pub(crate) neighbour: bool,
    /// A writer opens a leased file.
    pub(crate) writer: bool,
    /// The writer does not wait for longer than the kernel makes it: the lease is taken by force.
    pub(crate) impatient: bool,
    /// Somebody truncates a file of a map whose user vouched for it.
    pub(crate) truncation: bool,
    /// The program closes descriptors that are not its own.
    pub(crate) closer: bool,
    /// The process forks.
    pub(crate) forks: bool,
    /// The budget changes.
    pub(crate) resizes: bool,
}

/// A run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) policy: Policy,
    pub(crate) faults: Faults,
    pub(crate) parties: Parties,
    /// Threads of the program.
    pub(crate) threads: u64,
    /// Operations of each.
    pub(crate) operations: u64,
    /// The budget, in bytes.
    pub(crate) budget: u64,
    /// Pages of the largest file.
    pub(crate) pages: u64,
    /// Maps that live at once.
    pub(crate) maps: u64,
    /// Whether maps of user's sources are among them.
    pub(crate) sources: bool,
    /// The machine has little memory, so that the engine marks pages as reclaimable.
    pub(crate) scarce: bool,
}

/// Threads of a crowd.
pub(crate) const CROWD_THREADS: u64 = 64;

/// Steps after which a run that has not ended does not make progress.
pub(crate) const STEPS_MAX: u64 = 40_000_000;
/// Simulated time that one operation may take, in nanoseconds.
pub(crate) const OPERATION_NS: u64 = 200_000_000_000;

impl Plan {
    pub(crate) fn of(seed: u64) -> Self {
        let mut r = Rng::new(seed);
        let policy = match r.below(4) {
            0 => Policy::Random(3),
            1 => Policy::Random(20),
            2 => Policy::Priorities(*r.pick(&[50, 300, 2000])),
            _ => Policy::Random(100),
        };
        // Most runs have few kinds of faults: many at once hide each other.
        let mut some = |often: &[u64]| if r.once_in(4) { *r.pick(often) } else { 0 };
        let faults = Faults {
            eio: some(&[20, 200]),
            short: some(&[5, 50]),
            again: some(&[10, 100]),
            interrupted: some(&[5, 50]),
            no_memory: some(&[10, 100]),
            busy: some(&[5, 50]),
            batch: some(&[3, 20]),
            abandoned: some(&[500, 5000]),
        };
        let parties = Parties {
            reclaim: r.once_in(2),
            neighbour: r.once_in(3),
            writer: r.once_in(3),
            impatient: r.once_in(4),
            truncation: r.once_in(6),
            closer: r.once_in(6),
            forks: r.once_in(6),
            resizes: r.once_in(4),
        };
        let budget = *r.pick(&[1 << 20, 1 << 20, 2 << 20]);
        let plan = Plan {
            seed,
            policy,
            faults,
            parties,
            threads: r.between(1, 4),
            operations: r.between(20, 120),
            budget,
            pages: *r.pick(&[40, 150, 600, 1200]),
            maps: r.between(1, 3),
            sources: r.once_in(3),
            scarce: r.once_in(3),
        };
        if r.once_in(12) {
            plan.with_a_crowd(&mut r)
        } else {
            plan
        }
    }

    /// Many threads over the smallest budget, and nothing that fails: each must get its turn.
    fn with_a_crowd(self, r: &mut Rng) -> Self {
        Plan {
            policy: Policy::Random(*r.pick(&[3, 20, 100])),
            faults: Faults::default(),
            parties: Parties {
                reclaim: self.parties.reclaim,
                ..Parties::default()
            },
            threads: CROWD_THREADS,
            operations: r.between(10, 40),
            budget: 1 << 20,
            pages: *r.pick(&[600, 1200]),
            ..self
        }
    }
}

impl Plan {
    /// Whether many threads want more than there is.
    pub(crate) fn is_crowded(&self) -> bool {
        self.threads >= CROWD_THREADS
    }

    /// Whether nothing fails, no party holds another up, and each thread gets its turn soon: then no operation may take long.
    pub(crate) fn is_calm(&self) -> bool {
        let Faults {
            eio,
            short,
            again,
            interrupted,
            no_memory,
            busy,
            batch,
            abandoned,
        } = self.faults;
        let p = self.parties;
        let fails = eio + short + again + interrupted + no_memory + busy + batch + abandoned > 0;
        let held_up = p.neighbour || p.writer || p.closer || p.forks || p.resizes;
        !fails && !held_up && matches!(self.policy, Policy::Random(_))
    }
}
