//! The SIGBUS handler: ours are the faults on absent pages of our regions; every other goes where it went before.

#![allow(unsafe_code, reason = "a signal handler: reads siginfo")]

use crate::base::clock;
use crate::base::ids::{Addr, Nanos, RegionAt};
use crate::base::primitive::{AtomicU64, Ordering};
use crate::fault::chain::{Chain, interrupted};
use crate::fault::refusal::Refusal;
use crate::fault::report;
use crate::fault::run::Need;
use crate::fault::serve::serve;
use crate::space::last_looks::LastLooks;
use crate::space::map_core::MapCore;
use crate::space::{identity, registry};
use faultless_sys::mem::PAGE;
use faultless_sys::raw;

/// SIGBUS.
pub(crate) static SIGBUS: Chain = Chain::new(libc::SIGBUS, on_sigbus);

/// Some map was handed back to the kernel: a SIGBUS that was raised just before may find no map.
/// How often that happened: a second time at the same address is another matter.
static HANDED_BACK: AtomicU64 = AtomicU64::new(0);
/// Who has looked once at such an address.
static LATE_LOOKS: LastLooks = LastLooks::new();

/// How often that was said.
pub(crate) fn hand_backs() -> u64 {
    HANDED_BACK.load(Ordering::SeqCst)
}

/// Says that a map is about to go whose addresses stay in use.
pub(crate) fn expect_latecomers() {
    HANDED_BACK.fetch_add(1, Ordering::SeqCst);
}

/// Runs with every signal blocked. Touches no errno, no heap, no lock, no thread-local.
extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for the time of the handler.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Only "no such page" can be ours: a hardware memory error (BUS_MCEERR_*) or a signal sent by somebody never is.
    if code == libc::BUS_ADRERR {
        if let Some(core) = registry::find(addr) {
            let at = Addr::new(addr);
            // SAFETY: the context is the kernel's.
            let serving = core.pool.withheld.serving(unsafe { interrupted(context) });
            let served = serve(&core, core.unit_of(at), Need::Load(at));
            drop(serving);
            let Err(why) = served else {
                return;
            };
            // The lease is gone before the kernel's mapping is in place: it will be soon.
            if why == Refusal::LeaseBroken && core.being_handed_back() {
                drop(core);
                clock::nap(HAND_BACK_NAP);
                return;
            }
            // Where a map stands in for the kernel's, a program that handles its own faults expects no word of ours.
            if core.stands_for.is_none() || SIGBUS.former().handler == libc::SIG_DFL {
                report_at(&core, addr, why);
            }
        } else if identity::may_have_moved() {
            clock::nap(HAND_BACK_NAP);
            return;
        } else if came_late(addr) {
            // The map was handed back to the kernel between the fault and this look: the kernel serves the load when it
            // runs again. If not, this thread will be here at once with the same address.
            return;
        } else if let Some(core) = registry::find_parents(addr) {
            report_at(&core, addr, Refusal::Forked);
        }
    }
    // SAFETY: the three arguments are the kernel's own.
    unsafe { SIGBUS.pass_on(info, context, code) };
}

/// How long a miss waits for the kernel's mapping before it looks again.
const HAND_BACK_NAP: Nanos = Nanos::from_millis(1);

/// Whether a fault at an address that is no map's may be one that was raised before the map there was handed back.
fn came_late(addr: usize) -> bool {
    let count = HANDED_BACK.load(Ordering::SeqCst);
    count > 0 && !LATE_LOOKS.again(raw::gettid(), Addr::new(addr), count)
}

fn report_at(core: &MapCore, addr: usize, why: Refusal) {
    let page = (Addr::new(addr) - core.start) as u64 & !(PAGE as u64 - 1);
    let offset = core.source_at(RegionAt::new(page));
    // (In a forked child there is no thread that could tell.)
    let told = match &core.pool.outbox {
        Some(outbox) if why != Refusal::Forked => {
            outbox.post(core.name.as_bytes(), offset, why.encode())
        }
        _ => false,
    };
    if !told {
        report::print(core, offset, why);
    }
}
