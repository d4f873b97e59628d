//! Requests of futures, whose threads run other tasks meanwhile and must not wait.
//!
//! Threads that start when they are needed, and end when they are not, serve requests in the order in which they came: many together,
//! at the depth of the device ([`gather`](crate::read::gather)). A request that has to wait for another thread or for room is served
//! by itself. So one that is held up holds up no other.

use crate::base::ids::{MapId, Nanos, Serial, Unit};
use crate::base::primitive::{Mutex, lock};
use crate::base::thread;
use crate::base::thread::block_signals;
use crate::fault::ask::ask;
use crate::fault::refusal::Refusal;
use crate::fault::run::Need;
use crate::fault::serve::serve;
use crate::read::gather::{Wanted, gather};
use crate::read::rings::{Rings, Way};
use crate::space::map_core::MapCore;
use crate::space::page::State as UnitState;
use crate::space::registry::{self, Inside};
use crate::sync::bell::Bell;
use faultless_sys::signal;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::task::Waker;

/// Requests that one thread serves together.
const TOGETHER: usize = 64;
/// Threads that each serve one request which has to wait.
const WAITING_MAX: usize = 32;
/// How long a thread without work stays.
const IDLE: Nanos = Nanos::from_secs(2);

/// What came of a request. An error names the first unit, or page, that could not be had.
pub(crate) type Outcome = Result<(), (Unit, Refusal)>;

/// Something that a future waits for.
pub(crate) enum What {
    /// Units of a map, which are made resident, and pinned if that is said.
    Units {
        map: MapId,
        serial: Serial,
        units: Range<Unit>,
        pins: bool,
    },
    /// Something else that takes time.
    Other(Mutex<Option<Box<dyn FnOnce() + Send>>>),
}

#[derive(Default)]
struct State {
    waker: Option<Waker>,
    outcome: Option<Outcome>,
    /// No future waits any more.
    abandoned: bool,
}

/// What a future waits for, and whether it is there.
pub(crate) struct Request {
    what: What,
    state: Mutex<State>,
}

impl Request {
    pub(crate) fn new(what: What, waker: Waker) -> Arc<Self> {
        let state = State {
            waker: Some(waker),
            ..State::default()
        };
        Arc::new(Request {
            what,
            state: Mutex::new(state),
        })
    }

    /// What came of it, if it has been served; if not, `waker` is woken then. After `Ok` the pins are the caller's.
    pub(crate) fn poll(&self, waker: &Waker) -> Option<Outcome> {
        let mut state = lock(&self.state);
        let outcome = state.outcome.take();
        if outcome.is_none() {
            match &mut state.waker {
                Some(former) => former.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
        }
        outcome
    }

    /// No future waits any more. Returns the units whose pins are the caller's.
    pub(crate) fn abandon(&self) -> Option<Range<Unit>> {
        let mut state = lock(&self.state);
        state.abandoned = true;
        state.waker = None;
        match (&self.what, state.outcome.take()) {
            (
                What::Units {
                    units, pins: true, ..
                },
                Some(Ok(())),
            ) => Some(units.clone()),
            _ => None,
        }
    }

    fn is_abandoned(&self) -> bool {
        lock(&self.state).abandoned
    }

    /// Says what came of it. The waker is to be woken when no gate and no lock is held: it is the program's code. The pins come back
    /// if no future waits for them.
    fn finish(&self, outcome: Outcome) -> Result<Option<Waker>, ()> {
        let mut state = lock(&self.state);
        if state.abandoned {
            return Err(());
        }
        state.outcome = Some(outcome);
        Ok(state.waker.take())
    }
}

#[derive(Default)]
struct Queue {
    new: VecDeque<Arc<Request>>,
    /// Those that have to wait for something.
    waiting: VecDeque<Arc<Request>>,
    /// Threads that there are; that sleep; that serve new requests; and that serve one of the others.
    threads: usize,
    idle: usize,
    serving: usize,
    held_up: usize,
    stopping: bool,
}

enum Work {
    Together(Vec<Arc<Request>>),
    ByItself(Arc<Request>),
}

impl Queue {
    /// How many further threads would find work.
    fn work(&self) -> usize {
        let new = !self.new.is_empty() && self.serving < serving_max();
        usize::from(new) + self.waiting.len().min(WAITING_MAX - self.held_up)
    }

    /// Threads that will look for work, or sleep until there is some.
    fn unoccupied(&self) -> usize {
        self.threads - self.serving - self.held_up
    }

    fn take(&mut self) -> Option<Work> {
        if !self.new.is_empty() && self.serving < serving_max() {
            self.serving += 1;
            let n = self.new.len().min(TOGETHER);
            return Some(Work::Together(self.new.drain(..n).collect()));
        }
        if self.held_up < WAITING_MAX
            && let Some(request) = self.waiting.pop_front()
        {
            self.held_up += 1;
            return Some(Work::ByItself(request));
        }
        None
    }
}

/// Threads that serve new requests: they are busy all the time, and are to leave processors to the program.
fn serving_max() -> usize {
    (std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1)
}

/// The requests of a pool's futures.
#[derive(Default)]
pub(crate) struct Requests {
    queue: Mutex<Queue>,
    bell: Bell,
}

/// A thread that serves requests; however it ends, it is counted no more.
struct Server<'a> {
    requests: &'a Requests,
    /// The counter of what it does.
    at: Option<fn(&mut Queue) -> &mut usize>,
}

impl Server<'_> {
    fn done(&mut self) {
        if let Some(counter) = self.at.take() {
            *counter(&mut lock(&self.requests.queue)) -= 1;
        }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        self.done();
        lock(&self.requests.queue).threads -= 1;
    }
}

/// What a pool's workers share that the threads need.
pub(crate) trait Host: Send + Sync + 'static {
    fn requests(&self) -> &Requests;
    fn rings(&self) -> &Rings;
}

impl Requests {
    /// Queues a request.
    ///
    /// # Errors
    ///
    /// No thread serves requests, and the system refuses one.
    pub(crate) fn push(host: &Arc<impl Host>, request: Arc<Request>) -> io::Result<()> {
        let mut queue = lock(&host.requests().queue);
        match &request.what {
            What::Units { .. } => queue.new.push_back(request.clone()),
            What::Other(_) => queue.waiting.push_back(request.clone()),
        }
        drop(queue);
        let started = Self::start(host);
        if started.is_err() && lock(&host.requests().queue).threads == 0 {
            // (The others' futures were told, or will be.)
            let mut queue = lock(&host.requests().queue);
            queue.new.retain(|r| !Arc::ptr_eq(r, &request));
            queue.waiting.retain(|r| !Arc::ptr_eq(r, &request));
            return started;
        }
        Ok(())
    }

    /// Wakes a thread for what is queued, or starts one.
    fn start(host: &Arc<impl Host>) -> io::Result<()> {
        let requests = host.requests();
        let mut queue = lock(&requests.queue);
        if queue.work() <= queue.unoccupied() {
            if queue.work() > 0 && queue.idle > 0 {
                drop(queue);
                requests.bell.ring();
            }
            return Ok(());
        }
        queue.threads += 1;
        drop(queue);
        let host = host.clone();
        let spawned = thread::spawn(c"faultless-async", {
            let host = host.clone();
            move || Self::serve(&host)
        });
        // (It runs by itself: the program's code, which it may be in, may wait for the thread that drops the pool.)
        spawned.map(drop).inspect_err(|_| {
            lock(&host.requests().queue).threads -= 1;
        })
    }

    /// A thread's life.
    fn serve(host: &Arc<impl Host>) {
        block_signals();
        let requests = host.requests();
        let mut server = Server { requests, at: None };
        loop {
            let mut queue = lock(&requests.queue);
            match queue.take() {
                Some(Work::Together(all)) => {
                    drop(queue);
                    server.at = Some(|queue| &mut queue.serving);
                    let held_up = serve_together(host.rings(), all);
                    lock(&requests.queue).waiting.extend(held_up);
                    server.done();
                }
                Some(Work::ByItself(request)) => {
                    drop(queue);
                    server.at = Some(|queue| &mut queue.held_up);
                    // (What else there is may not wait for this one.)
                    let _ = Self::start(host);
                    serve_by_itself(&request);
                    server.done();
                }
                None if queue.stopping => return,
                None => {
                    queue.idle += 1;
                    drop(queue);
                    requests.bell.sleep(IDLE, || {
                        let queue = lock(&requests.queue);
                        queue.work() == 0 && !queue.stopping
                    });
                    let mut queue = lock(&requests.queue);
                    queue.idle -= 1;
                    if queue.work() == 0 {
                        // (A request that comes now starts another thread.)
                        return;
                    }
                    continue;
                }
            }
            // There may be more than this thread can do.
            let _ = Self::start(host);
        }
    }

    /// The threads end.
    pub(crate) fn stop(&self) {
        lock(&self.queue).stopping = true;
        self.bell.ring_all();
    }
}

/// Goes into the map of a request, if it is still there.
fn enter(request: &Request) -> Option<Inside<'static>> {
    match request.what {
        What::Units { map, serial, .. } => registry::gate(map)
            .and_then(registry::enter)
            .filter(|core| core.serial == serial),
        What::Other(_) => None,
    }
}

/// Pins units, as far as no thread has to be waited for and nothing is to be read: all of them or none.
pub(crate) fn pin_resident(core: &MapCore, units: Range<Unit>) -> bool {
    let pin = |&unit: &Unit| {
        let page = core.page(unit);
        page.pin(page.load()).is_ok()
    };
    let all = units.end - units.start;
    let pinned = Unit::each(units.clone()).take_while(pin).count() as u64;
    if pinned < all {
        unpin(core, units.start..units.start + pinned);
    }
    pinned == all
}

fn unpin(core: &MapCore, units: Range<Unit>) {
    Unit::each(units).for_each(|unit| core.page(unit).unpin());
}

/// Whether units are resident, as far as is known.
pub(crate) fn are_resident(core: &MapCore, units: Range<Unit>) -> bool {
    Unit::each(units).all(|unit| core.page(unit).load().state() == UnitState::Resident)
}

/// Says what came of a request. Returns what is to be woken.
fn finish(core: &MapCore, request: &Request, outcome: Outcome) -> Option<Waker> {
    let good = outcome.is_ok();
    request.finish(outcome).unwrap_or_else(|()| {
        if let What::Units {
            units, pins: true, ..
        } = &request.what
            && good
        {
            unpin(core, units.clone());
        }
        None
    })
}

/// Serves requests as far as nothing has to be waited for but devices. Returns those that have to wait for more.
fn serve_together(rings: &Rings, all: Vec<Arc<Request>>) -> Vec<Arc<Request>> {
    let entered = all.into_iter().filter(|request| !request.is_abandoned());
    // (If the map is gone, so is the future: it borrows it.)
    let entered: Vec<(Arc<Request>, Inside<'_>)> = entered
        .filter_map(|request| enter(&request).map(|core| (request, core)))
        .collect();
    let units = |request: &Request| match &request.what {
        What::Units { units, .. } => units.clone(),
        What::Other(_) => Unit::new(0)..Unit::new(0),
    };
    // (One after the other they are read faster by several threads.)
    if !matches!(rings.way(), Way::Blocking(_)) {
        let wanted: Vec<Wanted<'_>> = entered
            .iter()
            .map(|(request, core)| Wanted {
                core,
                units: units(request),
                need: Need::Ask,
            })
            .collect();
        gather(rings, &wanted, |_, _| false);
    }
    let (mut wakers, mut held_up) = (Vec::new(), Vec::new());
    for (request, core) in entered {
        let there = match &request.what {
            What::Units {
                units, pins: true, ..
            } => pin_resident(&core, units.clone()),
            _ => are_resident(&core, units(&request)),
        };
        match there {
            true => wakers.extend(finish(&core, &request, Ok(()))),
            false => held_up.push(request),
        }
    }
    wakers.into_iter().for_each(Waker::wake);
    held_up
}

/// Serves a request, however long that takes.
fn serve_by_itself(request: &Request) {
    if request.is_abandoned() {
        return;
    }
    let waker = match &request.what {
        What::Other(work) => {
            let work = lock(work).take();
            work.into_iter().for_each(|work| work());
            request.finish(Ok(())).ok().flatten()
        }
        What::Units { units, pins, .. } => {
            let Some(core) = enter(request) else {
                return;
            };
            let outcome = match pins {
                true => pin(&core, units.clone()),
                false => ask(&core, units.clone(), false),
            };
            finish(&core, request, outcome)
        }
    };
    waker.into_iter().for_each(Waker::wake);
}

/// Pins units, however long that takes: all of them, or none.
fn pin(core: &MapCore, units: Range<Unit>) -> Outcome {
    // (What cannot be read is found out below.)
    let _ = ask(core, units.clone(), false);
    for unit in Unit::each(units.clone()) {
        if pin_resident(core, unit..unit + 1) {
            continue;
        }
        let blocked = signal::Blocked::all();
        let _serving = core.pool.withheld.serving(blocked.former());
        if let Err(why) = serve(core, unit, Need::Pin) {
            unpin(core, units.start..unit);
            return Err((unit, why));
        }
    }
    Ok(())
}
