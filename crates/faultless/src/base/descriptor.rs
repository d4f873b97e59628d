//! Descriptors that this crate owns.

#![allow(unsafe_code, reason = "closes a descriptor by number")]

use faultless_sys::file::{self, FileId};

/// A descriptor that a system call has just returned, and that no other code knows. Dropping it closes it.
///
/// A program that closes all its descriptors may close this one, and another of its threads may be given the number. The
/// number is closed only if it still names the file that it named at first.
#[derive(Debug)]
pub(crate) struct Owned {
    number: i32,
    names: Option<FileId>,
}

impl Owned {
    /// Takes ownership.
    pub(crate) fn new(number: i32) -> Self {
        Owned {
            number,
            names: what_it_names(number),
        }
    }

    pub(crate) fn number(&self) -> i32 {
        self.number
    }

    /// Gives the ownership up.
    pub(crate) fn into_number(self) -> i32 {
        let number = self.number;
        std::mem::forget(self);
        number
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.names.is_some() && what_it_names(self.number) == self.names {
            // SAFETY: owned, and known to no other code; the number still names what it named.
            unsafe { file::close(self.number) };
        }
    }
}

fn what_it_names(number: i32) -> Option<FileId> {
    file::status(number).ok().map(|st| st.id)
}
