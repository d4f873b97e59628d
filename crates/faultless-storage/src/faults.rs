//! What can go wrong with a read.

use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::time::Duration;

/// How long the storage takes to answer a read: a fixed time, a random one on top, and now and then a long one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Delay {
    /// At least so many microseconds.
    pub fixed_us: u64,
    /// Up to so many microseconds more, each time as likely as any other.
    pub spread_us: u64,
    /// The share of reads, from 0 to 1, that takes `tail_us` more.
    pub tail_share: f64,
    /// Microseconds.
    pub tail_us: u64,
}

impl Delay {
    /// Always the same.
    pub fn fixed(time: Duration) -> Self {
        Delay {
            fixed_us: time.as_micros() as u64,
            ..Delay::default()
        }
    }

    /// The delay of one read, from two random numbers between 0 and 1.
    pub(crate) fn draw(&self, spread: f64, tail: f64) -> Duration {
        let tail = if tail < self.tail_share {
            self.tail_us
        } else {
            0
        };
        Duration::from_micros(self.fixed_us + (self.spread_us as f64 * spread) as u64 + tail)
    }
}

/// What the storage does to reads from now on. By default nothing: they are answered at once, and right.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Faults {
    /// Before each answer.
    pub delay: Delay,
    /// Reads that touch these bytes of the file fail with EIO.
    pub broken: Vec<Range<u64>>,
    /// The first read that touches one of these ranges fails with EIO, at once; those after it do not.
    #[serde(default)]
    pub broken_once: Vec<Range<u64>>,
    /// Reads that touch these bytes are not answered before this list changes and no longer holds them.
    pub stuck: Vec<Range<u64>>,
    /// No read returns more bytes than this. For [`Storage::uncached`](crate::Storage::uncached): in the page cache, the
    /// kernel takes a short answer for the end of the file, and fills up with zeros.
    pub short: Option<u32>,
    /// The file has only so many bytes.
    pub truncated: Option<u64>,
}

/// Whether a read of `len` bytes from `offset` touches any of these ranges.
pub(crate) fn touches(ranges: &[Range<u64>], offset: u64, len: u64) -> bool {
    ranges
        .iter()
        .any(|r| r.start < offset + len && offset < r.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_touched_at_their_bytes_and_nowhere_else() {
        let ranges = vec![100..200, 900..901];
        assert!(touches(&ranges, 0, 101) && touches(&ranges, 199, 1) && touches(&ranges, 150, 10));
        assert!(!touches(&ranges, 0, 100) && !touches(&ranges, 200, 700) && !touches(&[], 0, 10));
    }

    #[test]
    fn delays_lie_where_they_were_ordered() {
        let d = Delay {
            fixed_us: 100,
            spread_us: 50,
            tail_share: 0.1,
            tail_us: 1000,
        };
        assert_eq!(d.draw(0.0, 0.5).as_micros(), 100);
        assert_eq!(d.draw(1.0, 0.5).as_micros(), 150);
        assert_eq!(d.draw(0.0, 0.05).as_micros(), 1100);
        assert_eq!(
            Delay::fixed(Duration::from_millis(5))
                .draw(0.7, 0.0)
                .as_millis(),
            5
        );
    }
}
