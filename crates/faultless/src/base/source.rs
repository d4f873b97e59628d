//! What pages are read from.

use crate::base::ids::FileAt;
use crate::base::text;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Bytes that can be read at any position: a file, a decompressor, a remote object, anything.
///
/// A plain file is read by the faulting thread itself. Any other source is ordinary code, which cannot run in a signal
/// handler, so the pool's fill threads call it while the faulting thread sleeps (on a futex, holding no lock).
///
/// A source may itself read maps of files. Maps of other users' sources must be in another pool: a pool's fill threads
/// must not wait for each other, and such a read is refused.
///
/// The same position must yield the same bytes for as long as the map lives: pages are read when they are first
/// touched, and again after they were evicted.
///
/// ```
/// use faultless::{ByteSize, Pool, Source};
///
/// /// A gibibyte of squares, without a file.
/// struct Squares;
///
/// impl Source for Squares {
///     fn len(&self) -> std::io::Result<u64> {
///         Ok(1 << 30)
///     }
///     fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
///         let n = (buf.len() as u64).min((1 << 30) - offset) as usize;
///         for (i, b) in buf[..n].iter_mut().enumerate() {
///             let x = (offset + i as u64) / 8;
///             *b = (x * x).to_le_bytes()[(offset as usize + i) % 8];
///         }
///         Ok(n)
///     }
/// }
///
/// let pool = Pool::builder().memory(ByteSize::mib(16)).build()?;
/// // SAFETY: squares do not change.
/// let map = unsafe { pool.map_trusted(Squares) }?;
/// assert_eq!(u64::from_le_bytes(map[8_000_000..8_000_008].try_into().unwrap()), 1_000_000u64.pow(2));
/// # Ok::<(), faultless::Error>(())
/// ```
#[allow(
    clippy::len_without_is_empty,
    reason = "the length is a question that can fail"
)]
pub trait Source: Send + Sync + 'static {
    /// Length in bytes. Asked once, when the map is made.
    fn len(&self) -> io::Result<u64>;

    /// Reads from `offset` into `buf`, and returns how many bytes were read; 0 only at the end. Short reads are
    /// continued, `Interrupted` is tried again. May be called by several threads at once.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Positions and lengths of reads are multiples of this many bytes (a power of two, 2 MiB at most; a block of a
    /// compressed stream, say). What is returned must be whole blocks too, but for the last. Fill units are at least this large. The last read may reach past the end.
    fn alignment(&self) -> usize {
        1
    }

    /// A name for messages.
    fn name(&self) -> String {
        "a source".to_owned()
    }

    /// The file behind the source, if it is nothing but a file: it is then read by the faulting thread, and `read_at`
    /// is not used.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Source for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, buf, offset)
    }

    fn name(&self) -> String {
        file_name(self.as_fd())
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl<S: Source + ?Sized> Source for Arc<S> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        (**self).read_at(buf, offset)
    }
    fn alignment(&self) -> usize {
        (**self).alignment()
    }
    fn name(&self) -> String {
        (**self).name()
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        (**self).file()
    }
}

/// The path by which a descriptor was opened, as far as the kernel knows it.
pub(crate) fn file_name(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    text::link(&format!("/proc/thread-self/fd/{}", fd.as_raw_fd())).map_or_else(
        |_| format!("descriptor {}", fd.as_raw_fd()),
        |p| faultless_untrusted::printable(&p).to_string(),
    )
}

/// Fills `buf` from `offset`, less only at the end. Short reads are continued at multiples of `align`. A panic of the
/// source is an error.
pub(crate) fn read_full(
    source: &dyn Source,
    align: usize,
    buf: &mut [u8],
    offset: FileAt,
) -> io::Result<usize> {
    let offset = offset.get();
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut got = 0;
        while got < buf.len() {
            // Continue at an aligned position: the odd rest is read again.
            let from = got - got % align;
            match source.read_at(&mut buf[from..], offset + from as u64) {
                Ok(0) => break,
                // The rest behind the last whole block, once more.
                Ok(n) if from + n <= got && source.len()? <= offset + got as u64 => break,
                Ok(n) if from + n <= got => {
                    // Not the end, and not a whole block either: what is missing must not be taken for zeros.
                    return Err(io::Error::other(
                        "read_at returned less than a block before the end, again and again",
                    ));
                }
                Ok(n) if from + n > buf.len() => {
                    return Err(io::Error::other(
                        "read_at returned more bytes than it was asked for",
                    ));
                }
                Ok(n) => got = from + n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(got)
    }))
    .unwrap_or_else(|_| Err(io::Error::other("the source panicked")))
}
