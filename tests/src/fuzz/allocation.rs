// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finding floods: hostile numbers that become memory.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, which ends the program if somebody wants more than
/// [`Self::MOST`] bytes at once. The limits of libFuzzer know only memory that is touched.
#[derive(Clone, Copy, Debug)]
pub struct Limited;

impl Limited {
    /// Largest allocation, in bytes.
    pub const MOST: usize = 256 << 20;

    fn check(size: usize) {
        // Panicking would allocate; whoever fuzzes sees the stack of the abort.
        if size > Self::MOST {
            std::process::abort();
        }
    }
}

// SAFETY: all work is done by the system's allocator with the arguments as they came; the
// checks in front of it return or end the program.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::check(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::check(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::check(size);
        // SAFETY: the caller's promises are the same.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(at, layout) }
    }
}
