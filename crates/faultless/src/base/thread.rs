//! Threads of the engine, and the signals that they block.

use faultless_sys::signal;

#[cfg(not(faultless_sim))]
pub use crate::base::pthread::{Thread, spawn};
#[cfg(faultless_sim)]
pub use simulated::{Thread, spawn};

/// Threads of the simulated machine.
#[cfg(faultless_sim)]
mod simulated {
    use faultless_sys::simulated::machine;
    use std::ffi::CStr;
    use std::io;

    /// A running thread.
    #[derive(Debug)]
    pub struct Thread(u32);

    /// Starts a thread.
    ///
    /// # Errors
    ///
    /// The machine refuses another thread.
    pub fn spawn(name: &'static CStr, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
        machine().spawn(name, Box::new(body)).map(Thread)
    }

    impl Thread {
        pub(crate) fn is_this(&self) -> bool {
            machine().this_thread() == self.0
        }

        /// Waits until it has ended.
        pub fn join(self) {
            machine().join(self.0);
        }
    }
}

/// Blocks the signals that a service thread of the engine has no business with: all but the C library's own, without
/// which `setuid` would wait for the thread for ever, and the ones that report the thread's own faults.
pub(crate) fn block_signals() {
    let faults = [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
    ];
    let open = faults
        .iter()
        .fold(signal::set_of(32) | signal::set_of(33), |set, &s| {
            set | signal::set_of(s)
        });
    signal::set_mask(signal::ALL & !open);
}
