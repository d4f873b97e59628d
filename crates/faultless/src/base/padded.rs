//! Words that share no cache line with others.

/// A value by itself. (Processors of today fetch lines of 64 bytes in pairs.)
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

impl<T> std::ops::Deref for Padded<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}
