//! Storage: how long a read takes, by how many are under way, with its scatter.

use crate::cpu::{Alarm, Cpu};
use faultless_trace::Nanos;
use rand::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::VecDeque;

/// A device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Device {
    /// Median time of a read in microseconds, by reads that are under way: `[[1, 85.0], [16, 190.0]]`. Between two points
    /// it is interpolated; beyond the last it goes on as between the last two.
    pub latency_us: Vec<(u32, f64)>,
    /// How much reads scatter: the standard deviation of the logarithm of their time (0: not at all).
    pub scatter: f64,
    /// How much they scatter, as it was measured, by reads that are under way: `[[1, [[0.5, 1.0], [0.99, 4.0]]]]`: a share of the
    /// reads takes up to so many medians. Instead of `scatter`, if there is anything. Between two points it is interpolated.
    pub spread: Vec<(u32, Vec<(f64, f64)>)>,
    /// Reads under way at a time; others wait.
    pub depth: u32,
    /// Reads a second that it takes on at most; 0: as many as come.
    pub per_second: f64,
}

impl Default for Device {
    fn default() -> Device {
        Device {
            // The machine that the project's figures come from: 10 k reads a second at depth 1, 72 k at 16, 113 k at 64.
            latency_us: vec![(1, 85.0), (16, 210.0), (64, 550.0), (128, 1_100.0)],
            scatter: 0.25,
            spread: Vec::new(),
            depth: 256,
            per_second: 0.0,
        }
    }
}

impl Device {
    /// A device all of whose reads take the same time.
    pub fn fixed(us: f64) -> Device {
        Device {
            latency_us: vec![(1, us)],
            scatter: 0.0,
            ..Device::default()
        }
    }

    /// How many medians a read takes that is longer than such a share of all, with so many under way.
    fn spread_at(&self, under_way: u32, share: f64) -> f64 {
        let after = self.spread.partition_point(|p| p.0 < under_way);
        let here = |no: usize| {
            self.spread
                .get(no)
                .map(|p| (f64::from(p.0), medians(&p.1, share)))
        };
        match (after.checked_sub(1).and_then(here), here(after)) {
            (Some((from, low)), Some((to, high))) => {
                low + (high - low) * (f64::from(under_way) - from) / (to - from)
            }
            (Some((_, at)), None) | (None, Some((_, at))) => at,
            (None, None) => 1.0,
        }
    }

    /// The median with so many under way, in nanoseconds.
    fn median(&self, under_way: u32) -> f64 {
        let n = f64::from(under_way.max(1));
        let mut before: Option<(f64, f64)> = None;
        let mut slope = 0.0;
        for &(at, us) in &self.latency_us {
            let at = f64::from(at);
            if n <= at {
                return 1e3
                    * match before {
                        Some((from, low)) if at > from => {
                            low + (us - low) * (n - from) / (at - from)
                        }
                        _ => us,
                    };
            }
            slope = match before {
                Some((from, low)) if at > from => ((us - low) / (at - from)).max(0.0),
                _ => 0.0,
            };
            before = Some((at, us));
        }
        before.map_or(0.0, |(at, us)| 1e3 * (us + slope * (n - at)))
    }
}

/// Of points of a share and so many medians, the medians at a share.
fn medians(points: &[(f64, f64)], share: f64) -> f64 {
    let after = points.partition_point(|p| p.0 < share);
    match (
        after.checked_sub(1).map(|before| points[before]),
        points.get(after),
    ) {
        (Some((from, low)), Some(&(to, high))) if to > from => {
            (low.ln() + (high.ln() - low.ln()) * (share - from) / (to - from)).exp()
        }
        (_, Some(&(_, at))) | (Some((_, at)), None) => at,
        (None, None) => 1.0,
    }
}

#[derive(Debug)]
struct State {
    under_way: u32,
    waiting: VecDeque<(u32, Option<Nanos>)>,
    /// When the next read may begin.
    free_at: Nanos,
    random: Xoshiro256PlusPlus,
}

/// The device at work.
#[derive(Debug)]
pub(crate) struct Storage {
    device: Device,
    state: RefCell<State>,
}

impl Storage {
    pub(crate) fn new(device: Device, seed: u64) -> Storage {
        Storage {
            device,
            state: RefCell::new(State {
                under_way: 0,
                waiting: VecDeque::new(),
                free_at: 0,
                random: Xoshiro256PlusPlus::seed_from_u64(seed),
            }),
        }
    }

    /// Begins a read; an alarm says that it has ended. How long it takes is given, where it was recorded.
    pub(crate) fn read(&self, cpu: &Cpu, no: u32, given: Option<Nanos>) {
        let s = &mut *self.state.borrow_mut();
        if s.under_way >= self.device.depth {
            s.waiting.push_back((no, given));
            return;
        }
        self.begin(s, cpu, no, given);
    }

    /// A read has ended: there is room for another.
    pub(crate) fn ended(&self, cpu: &Cpu) {
        let s = &mut *self.state.borrow_mut();
        s.under_way -= 1;
        if let Some((no, given)) = s.waiting.pop_front() {
            self.begin(s, cpu, no, given);
        }
    }

    fn begin(&self, s: &mut State, cpu: &Cpu, no: u32, given: Option<Nanos>) {
        s.under_way += 1;
        let ns = given.unwrap_or_else(|| {
            let median = self.device.median(s.under_way);
            if !self.device.spread.is_empty() {
                return (median * self.device.spread_at(s.under_way, s.random.random())) as Nanos;
            }
            // Box and Muller: a normal number of two uniform ones.
            let (a, b): (f64, f64) = (s.random.random(), s.random.random());
            let normal = (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos();
            (median * (self.device.scatter * normal).exp()) as Nanos
        });
        let mut before = 0;
        if self.device.per_second > 0.0 {
            let now = cpu.now();
            s.free_at = s.free_at.max(now) + (1e9 / self.device.per_second) as Nanos;
            before = s.free_at - now;
        }
        // It is served while it waits for its turn.
        cpu.alarm(ns.max(before).max(1), Alarm::Read(no));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_interpolated_and_goes_on_beyond_the_last_point() {
        let device = Device {
            latency_us: vec![(1, 100.0), (11, 200.0), (21, 400.0)],
            spread: vec![
                (1, vec![(0.0, 0.5), (0.5, 1.0), (1.0, 4.0)]),
                (11, vec![(0.5, 1.0), (1.0, 8.0)]),
            ],
            ..Device::default()
        };
        for (under_way, us) in [
            (1, 100.0),
            (6, 150.0),
            (11, 200.0),
            (21, 400.0),
            (31, 600.0),
        ] {
            assert_eq!(device.median(under_way), 1e3 * us, "{under_way}");
        }
        for (under_way, share, medians) in [
            (1, 0.75, 2.0),
            (6, 1.0, 6.0),
            (11, 0.2, 1.0),
            (90, 1.0, 8.0),
        ] {
            let found = device.spread_at(under_way, share);
            assert!((found - medians).abs() < 1e-9, "{under_way}: {found}");
        }
        assert_eq!(Device::fixed(50.0).median(500), 50e3);
    }
}
