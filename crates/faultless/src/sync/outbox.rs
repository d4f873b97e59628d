//! Telling the program of what failed: from a signal handler, which may call none of the program's code, to a thread that may.

use crate::base::clock;
use crate::base::futex::{Futex, Wake};
use crate::base::ids::{FileAt, Nanos};
use crate::base::primitive::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::base::thread::block_signals;
use crate::sync::bell::Bell;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How long a thread whose load failed waits for the program to have been told.
const PATIENCE: Nanos = Nanos::from_secs(1);
/// How long it sleeps before it looks again.
const LOOK: Nanos = Nanos::from_millis(10);
/// How long the telling thread sleeps before it looks by itself.
const IDLE: Nanos = Nanos::from_secs(1);
/// Loads that can fail at the same time and all be told. Others leave a line on stderr.
const SLOTS: usize = 8;
/// Bytes of a name that are told: its last ones.
const NAME_MAX: usize = 256;
const WORDS: usize = NAME_MAX / size_of::<u64>();

/// A slot's states. The failing thread takes it from FREE over WRITING to POSTED. The telling thread takes it over TELLING to
/// TOLD, from where the failing thread frees it, or from LEFT, where the failing thread has gone on, to FREE.
const FREE: u32 = 0;
const WRITING: u32 = 1;
const POSTED: u32 = 2;
const TELLING: u32 = 3;
const TOLD: u32 = 4;
const LEFT: u32 = 5;

#[derive(Debug, Default)]
struct Slot {
    state: AtomicU32,
    changed: Futex,
    offset: AtomicU64,
    why: AtomicU32,
    len: AtomicU32,
    name: [AtomicU64; WORDS],
}

/// What failed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// The source's name, or the end of it.
    pub(crate) name: String,
    pub(crate) offset: FileAt,
    /// The reason, as a number.
    pub(crate) why: u32,
}

/// What is called with each.
pub(crate) type Tell = Box<dyn Fn(Failed) + Send + Sync>;

/// What failed in a pool, on its way to the program.
pub(crate) struct Outbox {
    tell: Tell,
    slots: [Slot; SLOTS],
    posted: Bell,
    stopping: AtomicBool,
}

impl Slot {
    fn moves(&self, from: u32, to: u32) -> bool {
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    fn write(&self, name: &[u8], offset: FileAt, why: u32) {
        // The end of a long name tells more than its beginning.
        let name = &name[name.len().saturating_sub(NAME_MAX)..];
        for (word, bytes) in self.name.iter().zip(name.chunks(size_of::<u64>())) {
            let mut whole = [0; size_of::<u64>()];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(whole), Ordering::Relaxed);
        }
        self.len.store(name.len() as u32, Ordering::Relaxed);
        self.offset.store(offset.get(), Ordering::Relaxed);
        self.why.store(why, Ordering::Relaxed);
    }

    fn read(&self) -> Failed {
        let words = self.name.iter().map(|w| w.load(Ordering::Relaxed));
        let mut name: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        name.truncate(self.len.load(Ordering::Relaxed) as usize);
        Failed {
            name: String::from_utf8_lossy(&name).into_owned(),
            offset: FileAt::new(self.offset.load(Ordering::Relaxed)),
            why: self.why.load(Ordering::Relaxed),
        }
    }
}

impl Outbox {
    pub(crate) fn new(tell: Tell) -> Self {
        Outbox {
            tell,
            slots: Default::default(),
            posted: Bell::default(),
            stopping: AtomicBool::new(false),
        }
    }

    /// Has the program told that a load failed, and waits until it was. `false` if it could not be told. May be called in a signal
    /// handler.
    pub(crate) fn post(&self, name: &[u8], offset: FileAt, why: u32) -> bool {
        let Some(slot) = self.slots.iter().find(|s| s.moves(FREE, WRITING)) else {
            return false;
        };
        slot.write(name, offset, why);
        slot.state.store(POSTED, Ordering::Release);
        self.posted.ring();
        let since = clock::now();
        loop {
            let ticket = slot.changed.ticket();
            if slot.moves(TOLD, FREE) {
                return true;
            }
            if clock::now().since(since) > PATIENCE {
                // The program's own code takes long, or it is what failed.
                if slot.moves(POSTED, FREE) {
                    return false;
                }
                // (It may be told yet. Told twice is better than not at all.)
                if slot.moves(TELLING, LEFT) {
                    return false;
                }
            }
            slot.changed.wait(ticket, LOOK);
        }
    }

    /// The telling thread's life.
    pub(crate) fn run(&self) {
        block_signals();
        let posted = || self.slots.iter().find(|s| s.moves(POSTED, TELLING));
        while !self.stopping.load(Ordering::Acquire) {
            let Some(slot) = posted() else {
                self.posted.sleep(IDLE, || {
                    let mut states = self.slots.iter().map(|s| s.state.load(Ordering::Acquire));
                    !self.stopping.load(Ordering::Acquire) && states.all(|s| s != POSTED)
                });
                continue;
            };
            let failed = slot.read();
            // Code that panics has been told.
            let _ = catch_unwind(AssertUnwindSafe(|| (self.tell)(failed)));
            if slot.moves(TELLING, TOLD) {
                slot.changed.bump(Wake::All);
            } else {
                slot.state.store(FREE, Ordering::Release);
            }
        }
    }

    /// Ends the telling thread.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.posted.ring_all();
    }
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex, mpsc};

    fn run(outbox: &Arc<Outbox>) -> std::thread::JoinHandle<()> {
        let outbox = outbox.clone();
        std::thread::spawn(move || outbox.run())
    }

    #[test]
    fn each_failure_is_told_once_before_its_thread_goes_on() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let note = told.clone();
        let outbox = Arc::new(Outbox::new(Box::new(move |failed| {
            note.lock().expect("sound").push(failed);
        })));
        let teller = run(&outbox);
        let long = "n".repeat(400) + "end";
        std::thread::scope(|s| {
            for why in 0..32 {
                let (outbox, told, long) = (&outbox, &told, &long);
                s.spawn(move || {
                    // There are eight slots; a thread that finds none tries again.
                    while !outbox.post(long.as_bytes(), FileAt::new(4096), why) {
                        std::thread::yield_now();
                    }
                    let told = told.lock().expect("sound");
                    assert_eq!(told.iter().filter(|f| f.why == why).count(), 1);
                });
            }
        });
        outbox.stop();
        teller.join().expect("it ends");
        let told = told.lock().expect("sound");
        assert_eq!(told.len(), 32);
        for failed in told.iter() {
            assert_eq!(failed.name.len(), NAME_MAX);
            assert!(failed.name.ends_with("nend"));
            assert_eq!(failed.offset, FileAt::new(4096));
        }
    }

    #[test]
    fn code_that_never_returns_or_panics_holds_nobody_up_for_ever() {
        let (enter, entered) = mpsc::channel();
        let (leave, left) = mpsc::channel::<()>();
        let left = Mutex::new(left);
        let outbox = Arc::new(Outbox::new(Box::new(move |_| {
            let _ = enter.send(());
            let _ = left.lock().expect("sound").recv();
            panic!("after all");
        })));
        let teller = run(&outbox);
        // Its code has not returned: whether it told cannot be known.
        assert!(!outbox.post(b"first", FileAt::new(0), 1));
        entered.recv().expect("it was called");
        // The only teller is busy.
        assert!(!outbox.post(b"second", FileAt::new(0), 2));
        drop(leave);
        assert!(
            outbox.post(b"third", FileAt::new(0), 3),
            "a panic is survived"
        );
        outbox.stop();
        teller.join().expect("it ends");
        assert!(outbox.slots.iter().all(|s| s.moves(FREE, WRITING)));
    }
}
