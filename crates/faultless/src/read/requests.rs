//! Requests of futures, whose threads run other tasks meanwhile and must not wait.
//!
//! Threads that start when they are needed, and end when they are not, serve requests in the order in which they came: many together,
//! at the depth of the device ([`gather`](crate::read::gather)). A request that has to wait for another thread or for room is served
//! by itself. So one that is held up holds up no other.

use crate::base::error::Error;
use crate::base::ids::{MapId, Nanos, Serial, Unit};
use crate::base::primitive::{AtomicBool, Mutex, MutexGuard, Ordering, lock};
use crate::base::thread;
use crate::base::thread::block_signals;
use crate::base::{clock, process};
use crate::fault::ahead::part_units;
use crate::fault::ask::ask;
use crate::fault::refusal::Refusal;
use crate::fault::run::Need;
use crate::fault::serve::serve;
use crate::read::gather::gather;
use crate::read::lanes::Lanes;
use crate::read::progress::wake;
use crate::read::rings::{Rings, Way};
use crate::space::map_core::MapCore;
use crate::space::registry;
use crate::sync::bell::Bell;
use faultless_sys::signal;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::task::Waker;

/// Requests that one thread serves together.
const TOGETHER: usize = 64;
/// Threads that each serve one request which has to wait.
const WAITING_MAX: usize = 64;
/// So many of them of one map.
const WAITING_OF_A_MAP: usize = 16;
/// Threads that serve new requests, those included that a device holds up; and after how long a thread counts as held up.
const SERVING_MAX: usize = 32;
const SLOW: Nanos = Nanos::from_millis(20);
/// How long a thread without work stays.
const IDLE: Nanos = Nanos::from_secs(2);

/// Why a request cannot be served.
pub(crate) enum Failure {
    /// The first unit that could not be had.
    Unit(Unit, Refusal),
    Other(Error),
    /// The system refuses the thread that was to serve it.
    NoThread(io::Error),
}

/// What came of a request.
pub(crate) type Outcome = Result<(), Failure>;

/// Work for a thread that may wait.
pub(crate) type Job = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// The source of the bytes that a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Of {
    Map(MapId, Serial),
    /// Something else, by the number that was given.
    Other(usize),
}

/// Something that a future waits for.
pub(crate) enum What {
    /// Units of a map, which are made resident, and pinned if that is said.
    Units {
        map: MapId,
        serial: Serial,
        units: Range<Unit>,
        pins: bool,
    },
    /// Something else that takes time, and the number of what it is done with. (Of each, some are done at a time.)
    Other {
        with: usize,
        job: Mutex<Option<Job>>,
    },
}

impl What {
    fn of(&self) -> Of {
        match self {
            What::Units { map, serial, .. } => Of::Map(*map, *serial),
            What::Other { with, .. } => Of::Other(*with),
        }
    }

    fn units(&self) -> Option<Range<Unit>> {
        match self {
            What::Units { units, .. } => Some(units.clone()),
            What::Other { .. } => None,
        }
    }
}

#[derive(Default)]
struct State {
    waker: Option<Waker>,
    outcome: Option<Outcome>,
}

/// What a future waits for, and whether it is there.
pub(crate) struct Request {
    what: What,
    /// No future waits any more. Written with the lock on the state held.
    abandoned: AtomicBool,
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
            abandoned: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    /// What came of it, if it has been served; if not, `waker` is woken then. After `Ok` the pins are the caller's.
    pub(crate) fn poll(&self, waker: &Waker) -> Option<Outcome> {
        // (Wakers are the program's code: cloned and dropped without the lock.)
        let waker = waker.clone();
        let mut state = lock(&self.state);
        let outcome = state.outcome.take();
        let former = match outcome {
            None => state.waker.replace(waker),
            Some(_) => Some(waker),
        };
        drop(state);
        drop(former);
        outcome
    }

    /// No future waits any more. Returns the units whose pins are the caller's, and the waker, which is the program's code to drop.
    fn abandon(&self) -> (Option<Range<Unit>>, Option<Waker>) {
        let mut state = lock(&self.state);
        self.abandoned.store(true, Ordering::Release);
        let (waker, outcome) = (state.waker.take(), state.outcome.take());
        drop(state);
        let pinned = match (&self.what, outcome) {
            (
                What::Units {
                    units, pins: true, ..
                },
                Some(Ok(())),
            ) => Some(units.clone()),
            _ => None,
        };
        (pinned, waker)
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Says what came of it. The waker is to be woken when no gate and no lock is held: it is the program's code. The pins come back
    /// if no future waits for them.
    fn finish(&self, outcome: Outcome) -> Result<Option<Waker>, ()> {
        let mut state = lock(&self.state);
        if self.is_abandoned() {
            return Err(());
        }
        state.outcome = Some(outcome);
        Ok(state.waker.take())
    }
}

struct Queue {
    new: Lanes<Of, Arc<Request>>,
    /// Those that have to wait for something.
    waiting: Lanes<Of, Arc<Request>>,
    /// Threads that there are, and those that sleep.
    threads: usize,
    idle: usize,
    /// Threads that serve one request which has to wait.
    held_up: usize,
    /// Threads that wake tasks, which is the program's code.
    waking: usize,
    /// Since when the threads serve that serve new requests.
    serving: Vec<Nanos>,
    /// Of those that are queued, so many no future waits for, at most.
    abandoned: usize,
    /// A thread sleeps that will look again soon.
    watched: bool,
    stopping: bool,
}

enum Work {
    Together(Nanos, Of, Vec<Arc<Request>>),
    ByItself(Arc<Request>),
}

impl Default for Queue {
    fn default() -> Self {
        Queue {
            new: Lanes::new(serving_of_a_map(process::processors())),
            waiting: Lanes::new(WAITING_OF_A_MAP),
            threads: 0,
            idle: 0,
            held_up: 0,
            waking: 0,
            serving: Vec::new(),
            abandoned: 0,
            watched: false,
            stopping: false,
        }
    }
}

impl Queue {
    /// How many further threads would find work.
    fn work(&self) -> usize {
        let new = self.next_new().is_some();
        usize::from(self.next_waiting().is_some()) + usize::from(new)
    }

    /// Whether a further thread may serve new requests now: few do, or those that do are held up by a device.
    fn may_serve(&self) -> bool {
        self.serving_now() < serving_max() && self.next_new().is_some()
    }

    /// Threads that serve new requests and are not held up.
    fn serving_now(&self) -> usize {
        let now = clock::now();
        let busy = self.serving.iter().filter(|&&then| now.since(then) < SLOW);
        busy.count()
    }

    /// How many further threads have work now.
    fn work_now(&self) -> usize {
        usize::from(self.next_waiting().is_some()) + usize::from(self.may_serve())
    }

    /// Threads that will look for work, or sleep until there is some.
    fn unoccupied(&self) -> usize {
        self.threads - self.serving.len() - self.held_up - self.waking
    }

    fn take(&mut self) -> Option<Work> {
        if self.may_serve() {
            let (now, map) = (clock::now(), self.next_new()?);
            self.serving.push(now);
            return Some(Work::Together(now, map, self.new.take(map, TOGETHER)));
        }
        let map = self.next_waiting()?;
        let request = self.waiting.take(map, 1).pop()?;
        self.held_up += 1;
        Some(Work::ByItself(request))
    }

    /// The map whose new requests are served next.
    fn next_new(&self) -> Option<Of> {
        (self.serving.len() < SERVING_MAX)
            .then(|| self.new.next())
            .flatten()
    }

    /// The map of the request that waits and is served next.
    fn next_waiting(&self) -> Option<Of> {
        (self.held_up < WAITING_MAX)
            .then(|| self.waiting.next())
            .flatten()
    }
}

/// The most threads that serve new requests and are not held up. They are busy all the time. (Half as many leave a processor idle while all tasks
/// wait: on two processors, 16 threads then read a quarter to a third less, and a ticker beside them gains nothing.)
fn serving_max() -> usize {
    process::processors()
}

/// The most threads that serve new requests of one map, those that a device holds up included. A quarter of all is for other maps.
fn serving_of_a_map(processors: usize) -> usize {
    processors.clamp(4, SERVING_MAX / 4 * 3)
}

/// The requests of a pool's futures.
#[derive(Default)]
pub(crate) struct Requests {
    queue: Mutex<Queue>,
    bell: Bell,
}

/// What a thread is at, as it is counted.
enum At {
    Nothing,
    Serving(Nanos, Of),
    HeldUp(Of),
    Waking,
}

/// A thread that serves requests; however it ends, it is counted no more.
struct Server<'a> {
    requests: &'a Requests,
    at: At,
    left: bool,
}

impl Server<'_> {
    fn done(&mut self) {
        match std::mem::replace(&mut self.at, At::Nothing) {
            At::Nothing => {}
            At::HeldUp(map) => {
                let mut queue = lock(&self.requests.queue);
                queue.held_up -= 1;
                queue.waiting.done(map);
            }
            At::Waking => lock(&self.requests.queue).waking -= 1,
            At::Serving(since, map) => {
                let mut queue = lock(&self.requests.queue);
                queue.new.done(map);
                if let Some(i) = queue.serving.iter().position(|&then| then == since) {
                    queue.serving.swap_remove(i);
                }
            }
        }
    }
}

impl Server<'_> {
    /// Wakes tasks. The thread does not count meanwhile, for it is the program's.
    fn wake(&mut self, host: &Arc<impl Host>, wakers: Vec<Waker>) {
        if !wakers.is_empty() {
            lock(&self.requests.queue).waking += 1;
            self.at = At::Waking;
        }
        let told = Requests::start(host);
        wake(wakers);
        wake(told);
        self.done();
    }

    /// The thread ends. A request that comes from now on starts another.
    fn leave(mut self, mut queue: MutexGuard<'_, Queue>) {
        queue.threads -= 1;
        self.left = true;
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        self.done();
        if !self.left {
            lock(&self.requests.queue).threads -= 1;
        }
    }
}

/// What a pool's workers share that the threads need.
pub(crate) trait Host: Send + Sync + 'static {
    fn requests(&self) -> &Requests;
    fn rings(&self) -> &Rings;
}

impl Requests {
    /// Queues a request.
    pub(crate) fn push(host: &Arc<impl Host>, request: Arc<Request>) {
        let told = {
            // A signal handler of the program may leave by `siglongjmp`. It would leave the queue locked, or a thread counted that was never
            // started. (If it leaves right after this, tasks are not told that no thread could be started.)
            let _no_handler_in_between = signal::Blocked::all();
            let mut queue = lock(&host.requests().queue);
            match &request.what {
                What::Units { .. } => queue.new.push(request.what.of(), request.clone()),
                What::Other { .. } => queue.waiting.push(request.what.of(), request.clone()),
            }
            drop(queue);
            Self::start(host)
        };
        wake(told);
    }

    /// Has a thread of the pool do something that takes time, for which nothing waits.
    pub(crate) fn do_later(host: &Arc<impl Host>, job: Job) {
        /// No map has this address. All such jobs together get as many threads as one map.
        const LATER: usize = 1;
        let what = What::Other {
            with: LATER,
            job: Mutex::new(Some(job)),
        };
        Self::push(host, Request::new(what, Waker::noop().clone()));
    }

    /// A future does not wait any more. Returns the units whose pins are the caller's.
    pub(crate) fn abandon(&self, request: &Request) -> Option<Range<Unit>> {
        let mut left = None;
        let (pinned, waker) = {
            let _no_handler_in_between = signal::Blocked::all();
            let abandoned = request.abandon();
            let mut queue = lock(&self.queue);
            queue.abandoned += 1;
            if queue.abandoned > (queue.new.len() + queue.waiting.len()) / 2 {
                queue.abandoned = 0;
                let gone = queue.new.take_out(|r| r.is_abandoned());
                left = Some((gone, queue.waiting.take_out(|r| r.is_abandoned())));
            }
            abandoned
        };
        // (Some of this may be the program's code.)
        drop((left, waker));
        pinned
    }

    /// Wakes a thread for what is queued, or starts one. If there can be none, the futures are told: returns what is to be woken.
    #[must_use = "tasks wait for it"]
    fn start(host: &Arc<impl Host>) -> Vec<Waker> {
        let requests = host.requests();
        let queue = lock(&requests.queue);
        // (A thread that sleeps is woken though it may not serve yet: then it sleeps less long.)
        if queue.work() > queue.unoccupied() - queue.idle && queue.idle > 0 {
            let watched = queue.watched && queue.work_now() == 0;
            drop(queue);
            if !watched {
                requests.bell.ring();
            }
            return Vec::new();
        }
        if queue.work() <= queue.unoccupied() {
            return Vec::new();
        }
        let Err(error) = Self::start_thread(host, queue) else {
            return Vec::new();
        };
        let mut queue = lock(&requests.queue);
        // (Threads that serve look for more when they have done.)
        if queue.unoccupied() > 0 || queue.serving_now() > 0 {
            return Vec::new();
        }
        let mut all = queue.new.take_out(|_| true);
        all.append(&mut queue.waiting.take_out(|_| true));
        drop(queue);
        let code = error.raw_os_error().unwrap_or(libc::EAGAIN);
        let told = all.iter().filter_map(|request| {
            let error = io::Error::from_raw_os_error(code);
            request.finish(Err(Failure::NoThread(error))).ok().flatten()
        });
        told.collect()
    }

    /// Starts a thread that serves; the caller has all signals blocked. It runs by itself: a caller may be in the program's code, which may
    /// wait for the thread that drops the pool.
    fn start_thread(host: &Arc<impl Host>, mut queue: MutexGuard<'_, Queue>) -> io::Result<()> {
        queue.threads += 1;
        drop(queue);
        let serve = {
            let host = host.clone();
            move || Self::serve(&host)
        };
        let started = thread::spawn(c"faultless-async", serve).map(drop);
        if started.is_err() {
            lock(&host.requests().queue).threads -= 1;
        }
        started
    }

    /// A thread's life.
    fn serve(host: &Arc<impl Host>) {
        block_signals();
        let requests = host.requests();
        let mut server = Server {
            requests,
            at: At::Nothing,
            left: false,
        };
        loop {
            let mut queue = lock(&requests.queue);
            match queue.take() {
                Some(Work::Together(since, map, all)) => {
                    drop(queue);
                    server.at = At::Serving(since, map);
                    // (What else there is may not wait for these.)
                    wake(Self::start(host));
                    let (wakers, held_up) = serve_together(host.rings(), map, all);
                    let mut queue = lock(&requests.queue);
                    for request in held_up {
                        queue.waiting.push(map, request);
                    }
                    drop(queue);
                    server.done();
                    server.wake(host, wakers);
                }
                Some(Work::ByItself(request)) => {
                    drop(queue);
                    server.at = At::HeldUp(request.what.of());
                    // (What else there is may not wait for this one.)
                    wake(Self::start(host));
                    let waker = serve_by_itself(&request);
                    server.done();
                    server.wake(host, waker.into_iter().collect());
                }
                None if queue.stopping => return server.leave(queue),
                None => {
                    queue.idle += 1;
                    let watches = queue.work() > 0;
                    queue.watched |= watches;
                    let time = if watches { SLOW } else { IDLE };
                    drop(queue);
                    requests.bell.sleep(time, || {
                        let queue = lock(&requests.queue);
                        queue.work_now() == 0 && (watches || queue.work() == 0) && !queue.stopping
                    });
                    let mut queue = lock(&requests.queue);
                    queue.idle -= 1;
                    queue.watched &= !watches;
                    if queue.work() == 0 {
                        return server.leave(queue);
                    }
                }
            }
        }
    }

    /// What is queued, and the threads that there are.
    #[cfg(faultless_sim)]
    pub(crate) fn describe(&self) -> String {
        let queue = lock(&self.queue);
        format!(
            "{} new requests and {} that wait, {} threads of which {} sleep, {} serve, {} are held up and {} wake tasks",
            queue.new.len(),
            queue.waiting.len(),
            queue.threads,
            queue.idle,
            queue.serving.len(),
            queue.held_up,
            queue.waking,
        )
    }

    /// The threads end.
    pub(crate) fn stop(&self) {
        lock(&self.queue).stopping = true;
        self.bell.ring_all();
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
    Unit::each(units).all(|unit| core.is_resident(unit))
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

/// Serves requests of one map, as far as it has to wait for devices alone. Returns the tasks to wake, and the requests that have to wait
/// for more.
fn serve_together(
    rings: &Rings,
    of: Of,
    all: Vec<Arc<Request>>,
) -> (Vec<Waker>, Vec<Arc<Request>>) {
    let (mut wakers, mut held_up) = (Vec::new(), Vec::new());
    let Of::Map(id, serial) = of else {
        return (wakers, all);
    };
    // (If the map is gone, so are the futures: they borrow it.)
    let Some(core) = registry::enter_map(id, serial) else {
        return (wakers, held_up);
    };
    let wanted = all.iter().filter(|request| !request.is_abandoned());
    // (Where there is no ring, several threads read faster than one.)
    if !matches!(rings.way(), Way::Blocking(_)) {
        let units = wanted.clone().filter_map(|request| request.what.units());
        let units: Vec<Range<Unit>> = units.collect();
        gather(rings, &core, Need::Ask, &units, |_| false);
    }
    for request in wanted {
        let there = match &request.what {
            What::Units { units, pins, .. } => match pins {
                true => pin_resident(&core, units.clone()),
                false => are_resident(&core, units.clone()),
            },
            What::Other { .. } => false,
        };
        match there {
            true => wakers.extend(finish(&core, request, Ok(()))),
            false => held_up.push(request.clone()),
        }
    }
    (wakers, held_up)
}

/// Serves a request, however long that takes. Returns the task to wake.
fn serve_by_itself(request: &Request) -> Option<Waker> {
    if request.is_abandoned() {
        return None;
    }
    match &request.what {
        What::Other { job: work, .. } => {
            let work = lock(work).take();
            let done = work.map_or(Ok(()), |work| work());
            let outcome = done.map_err(Failure::Other);
            request.finish(outcome).ok().flatten()
        }
        What::Units {
            map,
            serial,
            units,
            pins,
        } => {
            let core = registry::enter_map(*map, *serial)?;
            let outcome = match pins {
                true => pin(&core, request, units.clone()),
                false => load(&core, request, units.clone()),
            };
            finish(&core, request, outcome)
        }
    }
}

/// Whether no future waits for a request any more, or its map is about to go.
fn given_up(core: &MapCore, request: &Request) -> bool {
    core.closing.load(Ordering::Relaxed) || request.is_abandoned()
}

/// Makes units resident, however long that takes.
fn load(core: &MapCore, request: &Request, units: Range<Unit>) -> Outcome {
    let mut at = units.start;
    while at < units.end && !given_up(core, request) {
        let end = (at + part_units(core)).min(units.end);
        ask(core, at..end, false).map_err(|(unit, why)| Failure::Unit(unit, why))?;
        at = end;
    }
    Ok(())
}

/// Pins units, however long that takes: all of them, or none.
fn pin(core: &MapCore, request: &Request, units: Range<Unit>) -> Outcome {
    // (The loop below finds out what cannot be read.)
    let _ = load(core, request, units.clone());
    for unit in Unit::each(units.clone()) {
        if pin_resident(core, unit..unit + 1) {
            continue;
        }
        if given_up(core, request) {
            // (Whatever is said: no future hears it.)
            unpin(core, units.start..unit);
            return Err(Failure::Unit(unit, Refusal::Budget));
        }
        let blocked = signal::Blocked::all();
        let _serving = core.pool.withheld.serving(blocked.former());
        if let Err(why) = serve(core, unit, Need::Pin) {
            unpin(core, units.start..unit);
            return Err(Failure::Unit(unit, why));
        }
    }
    Ok(())
}

#[cfg(all(test, not(loom), not(faultless_sim)))]
mod tests {
    use super::*;

    fn of(map: u32) -> Of {
        Of::Map(MapId::new(map), Serial::new(1))
    }

    fn request(map: u32) -> Arc<Request> {
        let what = What::Units {
            map: MapId::new(map),
            serial: Serial::new(1),
            units: Unit::new(0)..Unit::new(1),
            pins: false,
        };
        Request::new(what, Waker::noop().clone())
    }

    #[test]
    fn a_map_whose_device_hangs_leaves_threads_to_others() {
        assert_eq!(
            [1, 2, 16, 64, 1024].map(serving_of_a_map),
            [4, 4, 16, 24, 24]
        );
        let mut queue = Queue::default();
        (0..SERVING_MAX * TOGETHER).for_each(|_| queue.new.push(of(1), request(1)));
        let mut taken = 0;
        while let Some(Work::Together(..)) = queue.take() {
            taken += 1;
            // (The device holds all of them up.)
            queue
                .serving
                .iter_mut()
                .for_each(|since| *since = Nanos::default());
        }
        assert_eq!(taken, serving_of_a_map(process::processors()));
        queue.new.push(of(2), request(2));
        assert!(matches!(queue.take(), Some(Work::Together(_, map, _)) if map == of(2)));
    }
}
