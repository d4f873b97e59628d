//! Runs a workload under a design.

use crate::calls;
use crate::chain::Chain;
use crate::designs;
use crate::kernel::{self, Access, Kernel, Mm, Running, Thread};
use crate::stats::{Group, LOCK_KEYS};
use crate::storage::Storage;
use crate::vma::{Backing, Vma};
use crate::workload::{Error, Order, Step, Workload};
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Zipf};
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::Serialize;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A recording is replayed until so many times its length have gone by, if it has not ended before.
const LONGEST_REPLAY: f64 = 20.0;
/// Events after which a run is given up: the built-in workloads take 6 million.
const EVENTS_MAX: u64 = 100_000_000;
/// Skew of [`Order::Zipf`].
const THETA: f64 = 0.99;

/// Durations that a share of all does not exceed, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Half of all.
    pub p50: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Quantiles {
    fn of(h: &hdrhistogram::Histogram<u64>) -> Quantiles {
        let us = |q: f64| h.value_at_quantile(q) as f64 / 1e3;
        Quantiles {
            p50: us(0.5),
            p99: us(0.99),
            p999: us(0.999),
            max: h.max() as f64 / 1e3,
        }
    }
}

/// What a group of threads did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupOutcome {
    /// Its name.
    pub name: String,
    /// Threads.
    pub threads: u32,
    /// Rounds of its loop a second, of all threads together.
    pub per_second: f64,
    /// How long a round takes. One that was not over at the end counts as what it had taken by then, if that is more than the median.
    pub round_us: Quantiles,
    /// Faults a second.
    pub faults_per_second: f64,
    /// How long a fault takes.
    pub fault_us: Quantiles,
    /// Time that its threads waited, in milliseconds for each second of the run: by lock, and for a processor.
    pub waited_ms_per_second: BTreeMap<&'static str, f64>,
}

/// What a workload did under a design.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The workload.
    pub workload: String,
    /// The design.
    pub design: String,
    /// Simulated time that was measured.
    pub seconds: f64,
    /// By group of threads, in the workload's order.
    pub groups: Vec<GroupOutcome>,
    /// Acquisitions of mmap_lock (or of ranges) a second.
    pub mmap_locks_per_second: f64,
    /// Pages read a second: what is read ahead counts, and so do the holes of files, which are read as zeros.
    pub reads_per_second: f64,
    /// Of these, pages that had been read before, in %.
    pub read_again_percent: f64,
    /// Second attempts of faults that found the page gone, in %.
    pub gone_at_retry_percent: f64,
    /// Processors in use, of all, in %.
    pub processors_percent: f64,
    /// A recording had not been done again, all of it, when its time was over (twenty times as long as it took).
    pub unfinished: bool,
    /// The longest wait for mmap_lock, in milliseconds.
    pub longest_mmap_wait_ms: f64,
    /// The longest wait for mmap_lock that was under way at a look at all threads, which is made each simulated millisecond.
    pub worst: Option<Chain>,
    /// Events that were simulated.
    pub events: u64,
}

impl Outcome {
    /// A group, by its name.
    pub fn group(&self, name: &str) -> Option<&GroupOutcome> {
        self.groups.iter().find(|g| g.name == name)
    }
}

/// A file or region that steps name.
struct Named {
    vma: Rc<Vma>,
    next: Cell<u64>,
    stride: u64,
}

struct Machine {
    kernel: Rc<Kernel>,
    mms: BTreeMap<String, Rc<Mm>>,
    /// Objects of files that threads share, by name.
    files: BTreeMap<String, u32>,
    /// By process and name.
    named: BTreeMap<(String, String), Rc<Named>>,
}

/// Runs a workload under a design. The same workload, design and seed give the same outcome.
///
/// # Errors
///
/// When the workload says something that cannot be, or there is no such design.
///
/// # Panics
///
/// When an invariant of the model is broken.
pub fn simulate(w: &Workload, design: &str, seed: u64) -> Result<Outcome, Error> {
    w.check()?;
    let chosen = designs::of(design).ok_or_else(|| {
        let all: Vec<&str> = designs::DESIGNS.iter().map(|d| d.id).collect();
        Error::Design(design.to_owned(), all.join(", "))
    })?;
    let monitors = if chosen.has_monitors() { w.monitors } else { 0 };
    let kernel = Rc::new(Kernel::new(
        kernel::Machine {
            cores: w.cores,
            costs: w.costs,
            storage: Storage::new(w.device.clone(), seed),
            memory: (w.memory.pages(), w.memory_high.map(|h| h.pages())),
            steals: w.rwsem_steals,
            preempts: w.preempt,
            seed,
        },
        chosen,
    ));
    let mut machine = Machine {
        kernel: Rc::clone(&kernel),
        mms: BTreeMap::new(),
        files: BTreeMap::new(),
        named: BTreeMap::new(),
    };
    machine.lay_out(w);
    let mut bodies: Vec<(crate::cpu::Tid, Running<'_>)> = Vec::new();
    if let Some(recording) = &w.recorded {
        bodies = recording.bodies(&kernel, !w.reads_anew);
    }
    for group in &w.threads {
        let no = kernel.stats.new_group(&group.name);
        for _ in 0..group.count {
            let thread = kernel.new_thread(&machine.mms[&group.process], no);
            let random = Xoshiro256PlusPlus::seed_from_u64(
                seed ^ (u64::from(thread.tid.0) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            );
            let body = body(&kernel, &machine, w, &group.r#loop, thread.clone(), random);
            bodies.push((thread.tid, Box::pin(body)));
        }
    }
    // These end when what is recorded has been done; monitors and workloads do not end.
    let ends = bodies.len();
    if monitors > 0 {
        let no = kernel.stats.new_group("monitor");
        for mm in &kernel.mms.borrow().clone() {
            mm.monitor.monitors.set(monitors as usize);
            for _ in 0..monitors {
                let thread = kernel.new_thread(mm, no);
                let k = &kernel;
                let tid = thread.tid;
                bodies.push((
                    tid,
                    Box::pin(async move {
                        designs::uffd_monitor::monitor(k, &thread).await;
                    }),
                ));
            }
        }
    }
    let judged = w
        .threads
        .first()
        .map(|g| Rc::clone(&machine.mms[&g.process]));
    if let Some(mm) = judged.filter(|_| w.is_limited() && kernel.design.has_evictor()) {
        let no = kernel.stats.new_group("evictor");
        let thread = kernel.new_thread(&mm, no);
        kernel.reclaimer.set(Some(thread.tid));
        let k = &kernel;
        bodies.push((
            thread.tid,
            Box::pin(async move { designs::faultless::evict(k, &thread).await }),
        ));
    } else if w.kswapd {
        let no = kernel.stats.new_group("kswapd");
        let thread = kernel.new_thread(&kernel.new_mm("kernel"), no);
        kernel.reclaimer.set(Some(thread.tid));
        let k = &kernel;
        bodies.push((
            thread.tid,
            Box::pin(async move { k.reclaim_ahead(&thread).await }),
        ));
    }
    let ns = |s: f64| (s * 1e9) as u64;
    let (warm_up, measured) = match &w.recorded {
        Some(recording) => (
            0,
            ns(recording.seconds * LONGEST_REPLAY).saturating_add(1_000_000_000),
        ),
        None => (ns(w.warm_up), ns(w.seconds).max(1)),
    };
    let most = w.recorded.as_ref().map_or(EVENTS_MAX, |r| r.events_max());
    if !kernel.run(
        bodies,
        ends,
        warm_up.saturating_add(measured),
        warm_up,
        most,
    ) {
        return Err(Error::TooLong {
            workload: w.name.clone(),
            design: design.to_owned(),
            events: most,
        });
    }
    Ok(outcome(w, design, &kernel))
}

impl Machine {
    fn lay_out(&mut self, w: &Workload) {
        let k = Rc::clone(&self.kernel);
        for group in &w.threads {
            if !self.mms.contains_key(&group.process) {
                self.mms
                    .insert(group.process.clone(), k.new_mm(&group.process));
            }
        }
        let mut add = |process: &str, name: &str, backing, pages, read_ahead, touched: bool| {
            let Some(mm) = self.mms.get(process) else {
                return;
            };
            // One mapping of a file in each process.
            if matches!(backing, Backing::File { .. })
                && self
                    .named
                    .contains_key(&(process.to_owned(), name.to_owned()))
            {
                return;
            }
            let vma = k.new_vma(mm, backing, pages, read_ahead);
            if touched {
                vma.fill();
                k.cache.count(pages as i64);
            }
            mm.vmas.borrow_mut().push(Rc::clone(&vma));
            let named = Named {
                vma,
                next: Cell::new(0),
                stride: stride(pages),
            };
            self.named
                .insert((process.to_owned(), name.to_owned()), Rc::new(named));
        };
        for file in w.files.iter().filter(|f| !f.each) {
            let object = k.new_object();
            self.files.insert(file.name.clone(), object);
            let backing = Backing::File {
                object,
                holes: file.holes,
            };
            for group in &w.threads {
                let reads = |s: &Step| match s {
                    Step::Read { of, .. } | Step::Punch(of) | Step::Protect(of) => *of == file.name,
                    _ => false,
                };
                if group.r#loop.iter().any(reads) {
                    add(
                        &group.process,
                        &file.name,
                        backing,
                        file.size.pages(),
                        file.read_ahead,
                        false,
                    );
                }
            }
        }
        for region in &w.regions {
            for _ in 0..region.count {
                let object = k.new_object();
                let backing = Backing::Anonymous { object };
                add(
                    &region.process,
                    &region.name,
                    backing,
                    region.size.pages(),
                    0,
                    region.touched,
                );
            }
        }
    }

    fn named(&self, process: &str, name: &str) -> Option<Rc<Named>> {
        self.named
            .get(&(process.to_owned(), name.to_owned()))
            .cloned()
    }
}

/// A step from page to page that goes through all of them, far apart.
fn stride(pages: u64) -> u64 {
    let coprime = |s: &u64| {
        let (mut a, mut b) = (*s, pages);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    let golden = (pages as f64 * 0.618_033_988_75) as u64;
    (golden.max(1)..).find(coprime).unwrap_or(1)
}

async fn body(
    k: &Rc<Kernel>,
    machine: &Machine,
    w: &Workload,
    steps: &[Step],
    t: Thread,
    mut random: Xoshiro256PlusPlus,
) {
    let process = &w
        .threads
        .iter()
        .flat_map(|g| std::iter::repeat_n(&g.process, g.count as usize))
        .nth(t.tid.index())
        .cloned()
        .unwrap_or_default();
    // A file of its own, for each that is each thread's.
    let own: BTreeMap<&str, u32> = w
        .files
        .iter()
        .filter(|f| f.each)
        .map(|f| (f.name.as_str(), k.new_object()))
        .collect();
    let mut sequential: BTreeMap<&str, u64> = BTreeMap::new();
    let mut mapped: Vec<Rc<Vma>> = Vec::new();
    // Threads do not begin all at once.
    k.cpu
        .sleep(t.tid, 1 + random.random_range(0..1_000_000))
        .await;
    loop {
        let from = k.cpu.now();
        k.stats.round_begins(t.tid, from);
        for step in steps {
            match step {
                Step::Read { of, order } => {
                    let Some(named) = machine.named(process, of) else {
                        continue;
                    };
                    let pages = named.vma.pages;
                    let page = match order {
                        Order::Once => {
                            let no = named.next.replace(named.next.get() + 1);
                            (u128::from(no) * u128::from(named.stride) % u128::from(pages)) as u64
                        }
                        Order::Uniform => random.random_range(0..pages),
                        Order::Zipf => {
                            let zipf = Zipf::new(pages as f64, THETA).expect("pages, and a skew");
                            let rank = zipf.sample(&mut random) as u64 - 1;
                            (u128::from(rank) * u128::from(named.stride) % u128::from(pages)) as u64
                        }
                        Order::Sequential => {
                            let next = sequential.entry(of).or_default();
                            *next += 1;
                            (*next - 1) % pages
                        }
                    };
                    let a = Access {
                        vma: Rc::clone(&named.vma),
                        page,
                        read: None,
                    };
                    calls::touch(k, &t, &a).await;
                    k.cpu.work(t.tid, k.costs.use_page).await;
                }
                Step::Map(size) => {
                    let backing = Backing::Anonymous {
                        object: k.new_object(),
                    };
                    mapped.push(calls::mmap(k, &t, backing, size.pages(), 0).await);
                }
                Step::MapFile(name) => {
                    let Some(file) = w.files.iter().find(|f| &f.name == name) else {
                        continue;
                    };
                    let object = own.get(name.as_str()).copied();
                    let shared = machine.files.get(name).copied();
                    let backing = Backing::File {
                        object: object.or(shared).unwrap_or(0),
                        holes: file.holes,
                    };
                    let vma = calls::mmap(k, &t, backing, file.size.pages(), file.read_ahead).await;
                    mapped.push(vma);
                }
                Step::Touch => {
                    let Some(vma) = mapped.last() else { continue };
                    let mut a = Access {
                        vma: Rc::clone(vma),
                        page: 0,
                        read: None,
                    };
                    for page in 0..vma.pages {
                        a.page = page;
                        calls::touch(k, &t, &a).await;
                    }
                }
                Step::Unmap => {
                    if let Some(vma) = mapped.pop() {
                        calls::munmap(k, &t, &vma).await;
                    }
                }
                Step::Fork => calls::fork(k, &t).await,
                Step::Smaps(of) => calls::smaps(k, &t, &machine.mms[of]).await,
                Step::PageOut(of) => {
                    if let Some(named) = machine.named(process, of) {
                        calls::page_out(k, &t, &named.vma).await;
                    }
                }
                Step::Punch(of) => {
                    if let Some(named) = machine.named(process, of) {
                        let page = random.random_range(0..named.vma.pages);
                        calls::punch(k, &t, &named.vma, page).await;
                    }
                }
                Step::Protect(of) => {
                    if let Some(named) = machine.named(process, of) {
                        calls::protect(k, &t, &named.vma).await;
                    }
                }
                Step::WorkUs(us) => k.cpu.work(t.tid, (us * 1e3) as u64).await,
                Step::SleepUs(us) => k.cpu.sleep(t.tid, (us * 1e3).max(1.0) as u64).await,
            }
        }
        // A loop that nothing holds up takes time all the same.
        if k.cpu.now() == from {
            k.cpu.work(t.tid, k.costs.syscall.max(1)).await;
        }
        k.stats.round(t.tid, k.cpu.now() - from);
    }
}

/// What a recording says of itself: what its threads did then.
pub(crate) fn recorded(w: &Workload) -> Option<Outcome> {
    let recording = w.recorded.as_ref()?;
    let groups = recording
        .durations()
        .into_iter()
        .map(|(name, threads, round, fault)| GroupOutcome {
            name,
            threads,
            per_second: round.len() as f64 / recording.seconds.max(1e-9),
            round_us: Quantiles::of(&round),
            faults_per_second: fault.len() as f64 / recording.seconds.max(1e-9),
            fault_us: Quantiles::of(&fault),
            waited_ms_per_second: BTreeMap::new(),
        });
    Some(Outcome {
        workload: w.name.clone(),
        design: "(recorded)".to_owned(),
        seconds: recording.seconds,
        groups: groups.collect(),
        mmap_locks_per_second: 0.0,
        reads_per_second: 0.0,
        read_again_percent: 0.0,
        gone_at_retry_percent: 0.0,
        processors_percent: 0.0,
        unfinished: recording.cut_off,
        longest_mmap_wait_ms: 0.0,
        worst: None,
        events: 0,
    })
}

fn outcome(w: &Workload, design: &str, k: &Kernel) -> Outcome {
    let s = &k.stats;
    let seconds = (s.until.get() - s.from.get()) as f64 / 1e9;
    let rate = |n: u64| n as f64 / seconds;
    let percent = |part: u64, whole: u64| match whole {
        0 => 0.0,
        whole => 100.0 * part as f64 / whole as f64,
    };
    let group = |g: &Group| GroupOutcome {
        name: g.name.clone(),
        threads: g.threads,
        per_second: rate(g.rounds),
        round_us: Quantiles::of(&g.round),
        faults_per_second: rate(g.faults),
        fault_us: Quantiles::of(&g.fault),
        waited_ms_per_second: LOCK_KEYS
            .into_iter()
            .zip(g.waited)
            .chain([("processor", g.no_processor)])
            .map(|(key, ns)| (key, ns as f64 / 1e6 / seconds))
            .collect(),
    };
    Outcome {
        workload: w.name.clone(),
        design: design.to_owned(),
        seconds,
        groups: s.groups.borrow().iter().map(group).collect(),
        mmap_locks_per_second: rate(s.mmap_locks.get()),
        reads_per_second: rate(s.reads.get()),
        read_again_percent: percent(s.reads_again.get(), s.reads.get()),
        gone_at_retry_percent: percent(s.gone.get(), s.retries.get()),
        processors_percent: 100.0 * s.busy.get() as f64 / 1e9 / seconds / f64::from(w.cores),
        unfinished: w.recorded.is_some() && k.unfinished.get(),
        longest_mmap_wait_ms: s.longest_mmap_wait.get() as f64 / 1e6,
        worst: s.chain.borrow().clone(),
        events: k.cpu.events(),
    }
}
