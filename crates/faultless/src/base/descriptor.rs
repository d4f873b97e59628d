//! Descriptors that this crate owns.

#![allow(unsafe_code, reason = "closes a descriptor by number")]

use faultless_sys::file;

/// A descriptor that a system call has just returned, and that no other code knows. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Owned(i32);

impl Owned {
    /// Takes ownership.
    pub(crate) fn new(number: i32) -> Self {
        Owned(number)
    }

    pub(crate) fn number(&self) -> i32 {
        self.0
    }

    /// Gives the ownership up.
    pub(crate) fn into_number(self) -> i32 {
        let number = self.0;
        std::mem::forget(self);
        number
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: owned, and known to no other code.
        unsafe { file::close(self.0) };
    }
}
