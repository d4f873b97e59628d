//! The heap of the engine in somebody else's program, apart from the program's.
//!
//! The C library's allocator maps an arena for each thread that allocates or frees, and takes any hole that the program has just
//! unmapped. A program that unmaps such a range again, together with what lies around it, would take the arena away. So what the engine
//! allocates lies where [`mem::map_aside`] puts it. It is no more than some hundred kilobytes, but for tables of many mappings.
//!
//! No call waits for ever: neither in a signal handler that has interrupted the heap, nor in a copy of the process whose other threads
//! are gone.

#![allow(unsafe_code, reason = "an allocator")]

use dlmalloc::Dlmalloc;
use faultless_sys::{mem, raw};
use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

#[global_allocator]
static HEAP: Heap = Heap {
    holder: AtomicU32::new(0),
    freed: AtomicPtr::new(ptr::null_mut()),
    blocks: UnsafeCell::new(Dlmalloc::new_with_allocator(Pages)),
};

/// Blocks of so many bytes and more are mappings of their own.
const LARGE: usize = 1 << 20;

/// How often a thread looks whether the heap is free, before it does without.
const LOOKS: u32 = 1000;

struct Heap {
    /// The process whose thread has the heap; 0: no thread has it.
    holder: AtomicU32,
    /// Blocks that were freed while another thread had the heap.
    freed: AtomicPtr<Freed>,
    blocks: UnsafeCell<Dlmalloc<Pages>>,
}

// SAFETY: `blocks` is used by the thread alone that has set `holder`.
unsafe impl Sync for Heap {}

/// The header of a freed block in the list. (The smallest block has 24 bytes, so it fits.)
struct Freed {
    next: *mut Freed,
    size: usize,
}

/// Where the heap's segments lie: the first address, and the one behind the last.
static SEGMENTS: [[AtomicUsize; 2]; 40] = [const { [const { AtomicUsize::new(0) }; 2] }; 40];
static SEGMENT_COUNT: AtomicUsize = AtomicUsize::new(0);

fn is_in_a_segment(at: *mut u8) -> bool {
    let count = SEGMENT_COUNT.load(Ordering::Acquire);
    SEGMENTS[..count].iter().any(|[start, end]| {
        (start.load(Ordering::Relaxed)..end.load(Ordering::Relaxed)).contains(&(at as usize))
    })
}

/// Memory for the heap, each segment twice as long as the one before. Nothing of it is given back.
struct Pages;

// SAFETY: hands out mappings of its own, which nobody else knows and which stay.
unsafe impl dlmalloc::Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let nothing = (ptr::null_mut(), 0, 0);
        // (Only the thread that has the heap comes here.)
        let index = SEGMENT_COUNT.load(Ordering::Relaxed);
        let Some([start, end]) = SEGMENTS.get(index) else {
            return nothing;
        };
        let len = size
            .next_multiple_of(mem::PAGE)
            .max((256 << 10) << index.min(8));
        let Ok(at) = mem::map_anonymous(len) else {
            return nothing;
        };
        start.store(at, Ordering::Relaxed);
        end.store(at + len, Ordering::Relaxed);
        SEGMENT_COUNT.store(index + 1, Ordering::Release);
        (at as *mut u8, len, 0)
    }

    fn remap(&self, _at: *mut u8, _old: usize, _new: usize, _may_move: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, _at: *mut u8, _old: usize, _new: usize) -> bool {
        false
    }

    fn free(&self, _at: *mut u8, _size: usize) -> bool {
        false
    }

    fn can_release_part(&self, _flags: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        mem::PAGE
    }
}

impl Heap {
    /// Does something with the heap, unless another thread has it for long. A thread of a process that this one is a copy of has it for
    /// ever; so has the code that a signal handler has interrupted.
    fn with<R>(&self, act: impl FnOnce(&mut Dlmalloc<Pages>) -> R) -> Option<R> {
        let this = raw::getpid();
        let mut looks = 0;
        while let Err(holder) =
            self.holder
                .compare_exchange_weak(0, this, Ordering::Acquire, Ordering::Relaxed)
        {
            looks += 1;
            if looks == LOOKS || (holder != 0 && holder != this) {
                return None;
            }
            std::thread::yield_now();
        }
        // SAFETY: no other thread has the heap, and `act` comes back before this one gives it up.
        let blocks = unsafe { &mut *self.blocks.get() };
        let mut next = self.freed.swap(ptr::null_mut(), Ordering::Acquire);
        while !next.is_null() {
            let block = next;
            // SAFETY: written by `later`, in a block of ours that its owner has freed.
            unsafe {
                let Freed { next: other, size } = block.read();
                next = other;
                blocks.free(block.cast(), size, align_of::<Freed>());
            }
        }
        let result = act(blocks);
        self.holder.store(0, Ordering::Release);
        Some(result)
    }

    /// Leaves a freed block to the next thread that has the heap.
    ///
    /// # Safety
    ///
    /// The block is one of the heap's, of `size` bytes, and nobody uses it any more.
    unsafe fn later(&self, at: *mut u8, size: usize) {
        let block = at.cast::<Freed>();
        let mut next = self.freed.load(Ordering::Relaxed);
        loop {
            // SAFETY: the caller's promise; each block has room for it, and is aligned to 16 bytes.
            unsafe { block.write(Freed { next, size }) };
            match self.freed.compare_exchange_weak(
                next,
                block,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(other) => next = other,
            }
        }
    }
}

/// A block in a mapping of its own, whose length says nothing of other blocks: where the heap cannot be had, and for large ones.
fn map_block(layout: Layout) -> *mut u8 {
    match layout.align() <= mem::PAGE {
        true => mem::map_anonymous(layout.size()).map_or(ptr::null_mut(), |at| at as *mut u8),
        // (Nothing of the engine's is aligned to more than a cache line.)
        false => ptr::null_mut(),
    }
}

// SAFETY: blocks come from `Dlmalloc` or are mappings of their own, and go back to where they came from: the address tells.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= LARGE {
            return map_block(layout);
        }
        // SAFETY: a length that is not 0, and a power of two, as the caller promises.
        let ours = self.with(|blocks| unsafe { blocks.malloc(layout.size(), layout.align()) });
        match ours {
            Some(at) if !at.is_null() => at,
            // (Not the C library's: it would map an arena for this thread, 64 MiB of addresses in a hole of the program's.)
            _ => map_block(layout),
        }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if is_in_a_segment(at) {
            // SAFETY: allocated there, with this layout; the caller gives it up.
            let freed =
                self.with(|blocks| unsafe { blocks.free(at, layout.size(), layout.align()) });
            if freed.is_none() {
                // SAFETY: the same.
                unsafe { self.later(at, layout.size()) };
            }
        } else {
            // SAFETY: mapped by `alloc`, with this length; the caller gives it up.
            let _ = unsafe { mem::unmap(at as usize, layout.size()) };
        }
    }
}
