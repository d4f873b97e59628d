//! Standard output streams: they hand large buffers on to the kernel as they are.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::lend::{Given, range};
use crate::mappings::reaches;
use crate::real::real;
use crate::state::{STANDING, idle};
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! block_writes {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(buf: *const c_void, size: usize, count: usize, stream: *mut libc::FILE) -> usize {
            let real = real!($name as unsafe extern "C-unwind" fn(*const c_void, usize, usize, *mut libc::FILE) -> usize);
            if idle() {
                // SAFETY: the program's own arguments.
                return unsafe { real(buf, size, count, stream) };
            }
            let given = Given::new(buf, size.saturating_mul(count));
            // SAFETY: the program's own arguments, or another address of the same bytes.
            unsafe { real(given.at(), size, count, stream) }
        }
    )* };
}
block_writes! { fwrite fwrite_unlocked }

macro_rules! string_writes {
    ($($name:ident: $writer:ident;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(text: *const c_char, stream: *mut libc::FILE) -> c_int {
            let real = real!($name as unsafe extern "C-unwind" fn(*const c_char, *mut libc::FILE) -> c_int);
            if idle() || !reaches(&range(text.cast(), 1)) {
                // SAFETY: the program's own arguments.
                return unsafe { real(text, stream) };
            }
            // SAFETY: the program's own string, and its stream.
            unsafe {
                let len = libc::strlen(text);
                if $writer(text.cast(), 1, len, stream) == len { 1 } else { libc::EOF }
            }
        }
    )* };
}
string_writes! {
    fputs: fwrite;
    fputs_unlocked: fwrite_unlocked;
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn puts(text: *const c_char) -> c_int {
    let real = real!(puts as unsafe extern "C-unwind" fn(*const c_char) -> c_int);
    if !reaches(&range(text.cast(), 1)) {
        // SAFETY: the program's own argument.
        return unsafe { real(text) };
    }
    unsafe extern "C" {
        static mut stdout: *mut libc::FILE;
        fn flockfile(stream: *mut libc::FILE);
        fn funlockfile(stream: *mut libc::FILE);
    }
    // SAFETY: the program's own string; the C library's stream, locked so that line and newline stay together.
    unsafe {
        let stream = stdout;
        let len = libc::strlen(text);
        /// Also where the thread is cancelled.
        struct Unlock(*mut libc::FILE);
        impl Drop for Unlock {
            fn drop(&mut self) {
                // SAFETY: locked below by this thread.
                unsafe { funlockfile(self.0) };
            }
        }
        flockfile(stream);
        let _unlock = Unlock(stream);
        let whole = fwrite(text.cast(), 1, len, stream) == len
            && libc::fputc(c_int::from(b'\n'), stream) != libc::EOF;
        if whole {
            c_int::try_from(len + 1).unwrap_or(c_int::MAX)
        } else {
            libc::EOF
        }
    }
}

/// For the C part: whether anything is taken over, so that strings may have to be copied before they are printed.
#[unsafe(no_mangle)]
extern "C" fn faultless_preload_active() -> c_int {
    c_int::from(STANDING.load(Ordering::Relaxed) != 0 && prints_from_strings())
}

/// Whether this C library may hand a string that it prints to the kernel: from 2.37 on it copies them.
fn prints_from_strings() -> bool {
    static ANSWER: AtomicU64 = AtomicU64::new(0);
    match ANSWER.load(Ordering::Relaxed) {
        0 => {
            unsafe extern "C" {
                fn gnu_get_libc_version() -> *const c_char;
            }
            // SAFETY: a static, NUL-terminated string such as 2.36.
            let version = unsafe { std::ffi::CStr::from_ptr(gnu_get_libc_version()) };
            let minor = version
                .to_str()
                .ok()
                .and_then(|v| v.strip_prefix("2."))
                .and_then(|v| v.parse::<u32>().ok());
            let may = minor.is_some_and(|m| m < 37);
            ANSWER.store(1 + u64::from(may), Ordering::Relaxed);
            may
        }
        answer => answer == 2,
    }
}

/// The functions of the C part, under the C library's names. (Rust cannot define functions with a variable number of
/// arguments, and only what Rust defines is exported.)
macro_rules! variadic {
    ($($name:ident => $target:ident;)*) => { $(
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            unsafe extern "C" { fn $target(); }
            #[cfg(target_arch = "x86_64")]
            std::arch::naked_asm!("jmp {}", sym $target);
            #[cfg(target_arch = "aarch64")]
            std::arch::naked_asm!("b {}", sym $target);
        }
    )* };
}
variadic! {
    printf => faultless_printf;
    fprintf => faultless_fprintf;
    dprintf => faultless_dprintf;
    vprintf => faultless_vprintf;
    vfprintf => faultless_vfprintf;
    vdprintf => faultless_vdprintf;
    __printf_chk => faultless_printf_chk;
    __fprintf_chk => faultless_fprintf_chk;
    __dprintf_chk => faultless_dprintf_chk;
    __vprintf_chk => faultless_vprintf_chk;
    __vfprintf_chk => faultless_vfprintf_chk;
    __vdprintf_chk => faultless_vdprintf_chk;
    execl => faultless_execl;
    execlp => faultless_execlp;
    execle => faultless_execle;
}
