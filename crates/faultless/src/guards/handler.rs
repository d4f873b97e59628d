//! The SIGSEGV handler: ours are the touches of markers in live mappings; every other fault goes where it went before.

#![allow(unsafe_code, reason = "a signal handler: reads siginfo")]

use crate::base::ids::Addr;
use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::process;
use crate::fault::chain::Chain;
use crate::guards::serve::serve;
use crate::guards::table;
use crate::space::last_looks::LastLooks;
use faultless_sys::mem::{self, PAGE};
use faultless_sys::raw;

/// SIGSEGV.
pub(crate) static SIGSEGV: Chain = Chain::new(libc::SIGSEGV, on_sigsegv).open_in_handlers();

/// How often a live mapping has ended whose addresses may stay in use: a touch of a marker that was removed then may find no mapping.
static ENDED: AtomicU64 = AtomicU64::new(0);
/// Which threads have looked once at such an address, or at one whose marker was removed.
static LOOKS: LastLooks = LastLooks::new();

/// Says that a live mapping is about to end.
pub(crate) fn expect_latecomers() {
    ENDED.fetch_add(1, Ordering::SeqCst);
}

/// `si_code` of a touch of an address without a mapping (`SEGV_MAPERR`). The kernel treats a marker as such an address.
const NO_MAPPING: i32 = 1;

/// Runs with every signal blocked. Touches no errno, no heap, no lock, no thread-local.
extern "C" fn on_sigsegv(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for the time of the handler.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == NO_MAPPING && is_ours(addr) {
        return;
    }
    // SAFETY: the arguments are the kernel's own.
    unsafe { SIGSEGV.pass_on(info, context, code) };
}

/// Serves a touch of a marker. `false` if there is none to serve.
fn is_ours(addr: usize) -> bool {
    let ended = ENDED.load(Ordering::SeqCst);
    let Some(live) = table::find(addr) else {
        // The mapping ended between the touch and this look: the kernel serves the load when it runs again. If not, this thread will
        // be here immediately with the same address.
        return ended > 0 && !LOOKS.again(raw::gettid(), Addr::new(addr), ended << 1);
    };
    if process::forked() {
        // A copy of the process that no fork handler has prepared. The kernel serves it.
        live.map_anew();
        live.open(live.range());
    } else {
        serve(&live, addr);
    }
    // The program may have unmapped the page by a call that nobody saw: then the load comes back, and it is the program's fault.
    let page = Addr::new(addr & !(PAGE - 1));
    let misses = live.serial << 1 | 1;
    !LOOKS.again(raw::gettid(), page, misses) || mem::mapped(addr)
}
