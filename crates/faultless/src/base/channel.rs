//! A channel from many threads to one.
//!
//! As the standard library's, which gives each thread that waits a thread-local handle: memory of the C library's, for which that maps an
//! arena where the program may have unmapped something (see `faultless_sys::mem::map_aside`).

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct State<T> {
    values: VecDeque<T>,
    senders: usize,
    has_receiver: bool,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end that values are put into.
#[derive(Debug)]
pub(crate) struct Sender<T>(Arc<Shared<T>>);

/// The end that values come out of.
#[derive(Debug)]
pub(crate) struct Receiver<T>(Arc<Shared<T>>);

/// The other end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

/// A channel that takes any number of values.
pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            values: VecDeque::new(),
            senders: 1,
            has_receiver: true,
        }),
        changed: Condvar::new(),
    });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Sender<T> {
    /// Puts a value in.
    ///
    /// # Errors
    ///
    /// Nobody can take it out.
    pub(crate) fn send(&self, value: T) -> Result<(), Gone> {
        let mut state = self.0.state();
        if !state.has_receiver {
            return Err(Gone);
        }
        state.values.push_back(value);
        drop(state);
        self.0.changed.notify_one();
        Ok(())
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.state().senders += 1;
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.state().senders -= 1;
        self.0.changed.notify_one();
    }
}

impl<T> Receiver<T> {
    /// The next value, if there is one now.
    pub(crate) fn try_recv(&self) -> Option<T> {
        self.0.state().values.pop_front()
    }

    /// Waits for the next value.
    ///
    /// # Errors
    ///
    /// There is none, and nobody can put another in.
    pub(crate) fn recv(&self) -> Result<T, Gone> {
        let mut state = self.0.state();
        loop {
            if let Some(value) = state.values.pop_front() {
                return Ok(value);
            }
            if state.senders == 0 {
                return Err(Gone);
            }
            let woken = self.0.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.has_receiver = false;
        let left = std::mem::take(&mut state.values);
        drop(state);
        // (Without the lock: what they own may use the channel.)
        drop(left);
    }
}

impl<T> Iterator for Receiver<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.recv().ok()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn values_come_in_their_order_and_the_end_is_told() {
        let (tell, told) = channel();
        let other = tell.clone();
        let thread =
            std::thread::spawn(move || (0..1000).for_each(|i| other.send(i).expect("taken")));
        assert!((0..1000).all(|i| told.recv() == Ok(i)));
        thread.join().expect("no panic");
        drop(tell);
        assert_eq!(told.recv(), Err(Gone));
    }

    #[test]
    fn a_value_that_nobody_can_take_is_refused_and_what_was_left_is_dropped() {
        let (tell, told) = channel();
        let value = Arc::new(());
        tell.send(value.clone()).expect("taken");
        drop(told);
        assert_eq!(Arc::strong_count(&value), 1);
        assert_eq!(tell.send(value), Err(Gone));
    }
}
