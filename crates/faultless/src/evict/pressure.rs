//! How hard memory is pressed, by the kernel's own account of it (PSI).

use crate::base::ids::Nanos;

/// Of an interval between two looks, the part in which some thread waited for memory, from which on memory counts as short; and the
/// part below which it counts as sufficient again. In percent.
const SHORT: u64 = 10;
const SUFFICIENT: u64 = 1;
/// The shortest interval that says anything: one thread that waits once for a moment is a large part of a short one.
const INTERVAL: Nanos = Nanos::from_millis(250);
/// The whole of what is kept firm where memory suffices, and the least that remains of it.
const WHOLE: u64 = 64;
const LEAST: u64 = 8;

/// Follows the time for which threads of the control group have waited for memory.
#[derive(Debug)]
pub(super) struct Pressure {
    /// When the last look was, and the time in total then.
    last: Option<(Nanos, Nanos)>,
    /// In parts of [`WHOLE`].
    share: u64,
}

impl Default for Pressure {
    fn default() -> Self {
        Pressure {
            last: None,
            share: WHOLE,
        }
    }
}

impl Pressure {
    /// Takes a look at `now`. `stalled` is the time in total for which threads have waited for memory so far; `None` where the kernel
    /// does not say. Where threads wait, less is kept firm: half as much after each interval, down to an eighth.
    pub(super) fn look(&mut self, now: Nanos, stalled: Option<Nanos>) {
        let Some(stalled) = stalled else {
            *self = Pressure::default();
            return;
        };
        if let Some((then, before)) = self.last {
            let (waited, passed) = (stalled.since(before).get(), now.since(then).get());
            if passed < INTERVAL.get() {
                return;
            }
            if waited > passed / 100 * SHORT {
                self.share = (self.share / 2).max(LEAST);
            } else if waited <= passed / 100 * SUFFICIENT {
                self.share = (self.share + self.share / 2).min(WHOLE);
            }
        }
        self.last = Some((now, stalled));
    }

    /// What remains of so many bytes that would be kept firm if memory sufficed.
    pub(super) fn of(&self, bytes: u64) -> u64 {
        (u128::from(bytes) * u128::from(self.share) / u128::from(WHOLE)) as u64
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Looks each half second, with so many milliseconds of waiting before each. Returns what remains of 6,400 bytes.
    fn after(waits: &[u64]) -> u64 {
        let mut pressure = Pressure::default();
        let mut total = 7;
        pressure.look(Nanos::from_millis(0), Some(Nanos::from_millis(total)));
        for (i, wait) in waits.iter().enumerate() {
            total += wait;
            let now = Nanos::from_millis(500 * (i as u64 + 1));
            pressure.look(now, Some(Nanos::from_millis(total)));
        }
        pressure.of(6_400)
    }

    #[test]
    fn waiting_for_memory_makes_less_firm_and_none_makes_more() {
        assert_eq!(after(&[]), 6_400);
        assert_eq!(after(&[49, 3]), 6_400, "too little to tell");
        assert_eq!(after(&[51]), 3_200);
        assert_eq!(after(&[400; 9]), 800, "not below an eighth");
        assert_eq!(after(&[400, 400, 20]), 1_600, "as it was");
        assert_eq!(after(&[400, 400, 0]), 2_400);
        assert_eq!(after(&[400, 400, 0, 0, 0, 0, 0]), 6_400);
    }

    #[test]
    fn a_moment_is_no_pressure_however_often_it_is_looked_at() {
        let mut pressure = Pressure::default();
        for ms in (0..=1_000).step_by(10) {
            // A thread waited for 2 ms once.
            let stalled = if ms < 500 { 7 } else { 9 };
            pressure.look(Nanos::from_millis(ms), Some(Nanos::from_millis(stalled)));
            assert_eq!(pressure.of(6_400), 6_400, "after {ms} ms");
        }
    }

    #[test]
    fn without_an_account_memory_suffices() {
        let mut pressure = Pressure::default();
        for i in 0..4 {
            pressure.look(
                Nanos::from_millis(500 * i),
                Some(Nanos::from_millis(400 * i)),
            );
        }
        assert_eq!(pressure.of(6_400), 800);
        pressure.look(Nanos::from_secs(9), None);
        assert_eq!(pressure.of(6_400), 6_400);
        assert_eq!(pressure.of(u64::MAX), u64::MAX);
    }
}
