//! Amounts of memory as a type of their own, so that no bare number is taken for another unit.

use std::fmt;
use std::str::FromStr;

/// An amount of memory or of file, in bytes.
///
/// ```
/// use faultless::ByteSize;
/// assert_eq!(ByteSize::mib(64).get(), 64 * 1024 * 1024);
/// assert_eq!("1.5G".parse::<ByteSize>().unwrap(), ByteSize::mib(1536));
/// assert_eq!(ByteSize::kib(4).to_string(), "4 KiB");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

impl ByteSize {
    /// `n` bytes.
    pub const fn new(n: u64) -> Self {
        ByteSize(n)
    }
    /// `n` times 1,024 bytes.
    pub const fn kib(n: u64) -> Self {
        ByteSize(n.saturating_mul(1 << 10))
    }
    /// `n` times 1,024² bytes.
    pub const fn mib(n: u64) -> Self {
        ByteSize(n.saturating_mul(1 << 20))
    }
    /// `n` times 1,024³ bytes.
    pub const fn gib(n: u64) -> Self {
        ByteSize(n.saturating_mul(1 << 30))
    }
    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 4] = [
            ("TiB", 1 << 40),
            ("GiB", 1 << 30),
            ("MiB", 1 << 20),
            ("KiB", 1 << 10),
        ];
        for (name, size) in UNITS {
            if self.0 >= size {
                return if self.0.is_multiple_of(size) {
                    write!(f, "{} {name}", self.0 / size)
                } else {
                    write!(f, "{:.1} {name}", self.0 as f64 / size as f64)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// A text that is no amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" is not a size: write a number of bytes, or one with K, M, G or T behind it (powers of 1,024), such as 512M or 1.5G"
)]
pub struct ParseByteSizeError {
    text: String,
}

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, ParseByteSizeError> {
        let wrong = || ParseByteSizeError {
            text: text.to_owned(),
        };
        let t = text.trim().to_ascii_uppercase();
        let t = t
            .strip_suffix("IB")
            .or_else(|| t.strip_suffix('B'))
            .unwrap_or(&t)
            .trim_end();
        let (number, shift) = match t.char_indices().next_back() {
            Some((i, 'K')) => (&t[..i], 10),
            Some((i, 'M')) => (&t[..i], 20),
            Some((i, 'G')) => (&t[..i], 30),
            Some((i, 'T')) => (&t[..i], 40),
            _ => (t, 0),
        };
        let number = number.trim_end();
        if let Ok(whole) = number.parse::<u64>() {
            return whole
                .checked_mul(1 << shift)
                .map(ByteSize)
                .ok_or_else(wrong);
        }
        let digits = number.bytes().all(|b| b.is_ascii_digit() || b == b'.') && !number.is_empty();
        match number.parse::<f64>() {
            Ok(x) if digits && shift > 0 && x * ((1u64 << shift) as f64) < u64::MAX as f64 => {
                Ok(ByteSize((x * (1u64 << shift) as f64) as u64))
            }
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("4 KiB", 4096),
            ("64MB", 64 << 20),
            ("1.5g", 3 << 29),
            ("2T", 2 << 40),
            ("12 B", 12),
        ] {
            assert_eq!(
                text.parse::<ByteSize>().map(ByteSize::get),
                Ok(bytes),
                "{text}"
            );
        }
        for text in [
            "",
            "x",
            "-1",
            "1.5",
            "4Q",
            "99999999999T",
            "nan",
            "1e3",
            "inf G",
            "K",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }
}
