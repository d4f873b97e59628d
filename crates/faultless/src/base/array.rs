//! Arrays of words in memory of the engine's own: zero at first, and none until touched.

#![allow(
    unsafe_code,
    reason = "words live in mapped memory that is zero until first touched"
)]

#[cfg(not(loom))]
use crate::base::area::Area;
use crate::base::primitive::{AtomicU8, AtomicU32, AtomicU64};

/// What threads share by reference, and what is valid if all of its bytes are zero.
///
/// # Safety
///
/// Both must hold, and it must have nothing to drop.
pub(crate) unsafe trait Word: Sync + 'static {
    /// One that is zero.
    #[cfg(loom)]
    fn zero() -> Self;
    /// Sets it to zero, as a discard of its page does.
    #[cfg(loom)]
    fn clear(&self);
}

macro_rules! words {
    ($($word:ty),*) => {$(
        // SAFETY: an atomic integer.
        unsafe impl Word for $word {
            #[cfg(loom)]
            fn zero() -> Self {
                <$word>::new(0)
            }
            #[cfg(loom)]
            fn clear(&self) {
                self.store(0, crate::base::primitive::Ordering::SeqCst);
            }
        }
    )*};
}
words!(AtomicU8, AtomicU32, AtomicU64);

/// A fixed number of words.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct Array<W> {
    area: Area,
    len: usize,
    of: std::marker::PhantomData<W>,
}

#[cfg(not(loom))]
impl<W: Word> Array<W> {
    pub(crate) fn new(len: usize) -> std::io::Result<Self> {
        Ok(Array {
            area: Area::new(len * size_of::<W>())?,
            len,
            of: std::marker::PhantomData,
        })
    }

    /// The word at `index`. Panics if there is none.
    #[inline]
    pub(crate) fn at(&self, index: usize) -> &W {
        assert!(index < self.len);
        // SAFETY: in bounds; the memory is page-aligned, lives as long as self, and was zero, which is a valid word.
        unsafe { &*self.area.at::<W>(index) }
    }

    /// Bytes that it occupies once every word was touched: whole pages.
    pub(crate) fn bytes(&self) -> u64 {
        self.area.len() as u64
    }

    /// Gives the memory of a page of words back: they are zero again. Returns whether it is gone. Takes `mmap_lock` for reading.
    pub(crate) fn discard_page(&self, page: usize) -> bool {
        use faultless_sys::mem::PAGE;
        let start = self.area.start() + page * PAGE;
        assert!(page * PAGE < self.area.len());
        // SAFETY: a page of our own; zeros are valid words.
        unsafe { faultless_sys::mem::madvise(start, PAGE, libc::MADV_DONTNEED) }.is_ok()
    }
}

/// The same for the models, whose words are not plain memory.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Array<W>(Vec<W>);

#[cfg(loom)]
impl<W: Word> Array<W> {
    pub(crate) fn new(len: usize) -> std::io::Result<Self> {
        Ok(Array((0..len).map(|_| W::zero()).collect()))
    }

    pub(crate) fn at(&self, index: usize) -> &W {
        &self.0[index]
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.0.len() * size_of::<u64>()) as u64
    }

    /// (An array of a model is smaller than a page.)
    pub(crate) fn discard_page(&self, page: usize) -> bool {
        assert_eq!(page, 0);
        self.0.iter().for_each(W::clear);
        true
    }
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;
    use crate::base::primitive::Ordering;
    use faultless_sys::mem::PAGE;

    #[test]
    fn words_are_zero_until_stored_and_after_their_page_was_discarded() {
        let words = Array::<AtomicU32>::new(PAGE / 4 + 1).expect("memory");
        assert_eq!(words.bytes(), 2 * PAGE as u64);
        for i in [0, PAGE / 4 - 1, PAGE / 4] {
            assert_eq!(words.at(i).swap(7, Ordering::Relaxed), 0);
        }
        assert!(words.discard_page(0));
        let now: Vec<_> = [0, PAGE / 4 - 1, PAGE / 4]
            .map(|i| words.at(i).load(Ordering::Relaxed))
            .into();
        assert_eq!(now, [0, 0, 7]);
    }
}
