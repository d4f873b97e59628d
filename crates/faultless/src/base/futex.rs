//! A word that threads sleep on, until another thread changes it and wakes them.

use crate::base::ids::Nanos;
#[cfg(not(loom))]
use crate::base::primitive::real;
use crate::base::primitive::{AtomicU32, Ordering};

/// A word to sleep on. It is bumped to wake threads, so a thread that has read it before cannot miss that.
#[derive(Debug, Default)]
pub(crate) struct Futex {
    word: AtomicU32,
    /// The sleepers of the model, where time never runs out: a wake-up that is lost is a thread that sleeps for ever.
    #[cfg(loom)]
    sleepers: (loom::sync::Mutex<()>, loom::sync::Condvar),
}

/// How many sleepers to wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    One,
    All,
}

impl Futex {
    /// The word, to be passed to [`wait`](Self::wait).
    pub(crate) fn ticket(&self) -> u32 {
        self.word.load(Ordering::SeqCst)
    }

    /// Changes the word, and wakes threads that sleep on it.
    pub(crate) fn bump(&self, who: Wake) {
        self.word.fetch_add(1, Ordering::SeqCst);
        self.wake(who);
    }

    /// Sleeps while the word is `ticket`, for `time` at most. May return early.
    #[cfg(not(loom))]
    pub(crate) fn wait(&self, ticket: u32, time: Nanos) {
        faultless_sys::futex::wait(real(&self.word), ticket, time.get());
    }

    #[cfg(not(loom))]
    fn wake(&self, who: Wake) {
        let most = match who {
            Wake::One => 1,
            Wake::All => faultless_sys::futex::ALL,
        };
        faultless_sys::futex::wake(real(&self.word), most);
    }

    #[cfg(loom)]
    pub(crate) fn wait(&self, ticket: u32, _: Nanos) {
        // As the kernel does it: the look at the word and the falling asleep are one step to wakers.
        let asleep = self.sleepers.0.lock().unwrap();
        if self.word.load(Ordering::SeqCst) == ticket {
            drop(self.sleepers.1.wait(asleep).unwrap());
        }
    }

    #[cfg(loom)]
    fn wake(&self, who: Wake) {
        let _awake = self.sleepers.0.lock().unwrap();
        match who {
            Wake::One => self.sleepers.1.notify_one(),
            Wake::All => self.sleepers.1.notify_all(),
        }
    }
}
