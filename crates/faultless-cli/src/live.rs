//! The live view of `faultless observe`.
use faultless_observe::Observer;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
pub(crate) fn run(
    observer: &mut Observer,
    until: Option<Instant>,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    while !stop.load(Ordering::Relaxed) && until.is_none_or(|u| Instant::now() < u) {
        observer.tick(Duration::from_millis(20))?;
    }
    Ok(())
}
