//! The file.
//!
//! ```text
//! magic    8 bytes   "\x89FLTRACE"
//! version  u32       2
//! chunk    the header: one [`Header`]
//! chunk …  events
//! chunk    the end: how many events there were (a chunk of kind 2)
//!
//! chunk:   kind u32 (0 header, 1 events, 2 end) · items u32 · length u32 · CRC-32 of the payload u32 · payload
//! ```
//!
//! Integers are little-endian. A payload is [postcard](https://postcard.jamesmunns.com/wire-format): items one after the
//! other, integers as varints. The `at` of an event is written as the difference from the event before it in the same
//! chunk (wrapping; from 0 for the first), zigzag-coded, so that it takes two or three bytes; a major fault takes about 60.
//!
//! A reader needs the memory of a chunk, can begin before the writer has ended, and finds what was altered, cut off or
//! written by a later version. Files and stacks are named before they are used; a reader checks that as well.

use crate::event::{Event, Nanos};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};

/// The version of the format that this crate writes and reads.
pub const VERSION: u32 = 2;

const MAGIC: [u8; 8] = *b"\x89FLTRACE";
/// A chunk is written when its payload has reached this.
const CHUNK_BYTES: usize = 256 << 10;
/// No chunk that a writer makes is longer: one event beyond the size above.
const CHUNK_BYTES_MAX: u32 = 4 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Header = 0,
    Events = 1,
    End = 2,
}

/// Where a trace comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The program that wrote it, with its version.
    pub writer: String,
    /// The kernel's release, as `uname -r` has it.
    pub kernel: String,
    /// The machine's architecture, as `uname -m` has it: it gives system call numbers their meaning.
    pub machine: String,
    /// Processors online.
    pub processors: u32,
    /// Bytes in a page.
    pub page_size: u32,
    /// When the trace began, in nanoseconds since 1970.
    pub began_unix: u64,
    /// When the trace began, in nanoseconds of CLOCK_MONOTONIC.
    pub began_monotonic: u64,
    /// The processes that were asked for.
    pub targets: Vec<u32>,
    /// The command that was run, if one was.
    pub command: Vec<String>,
    /// Waits for mmap_lock shorter than this are in faults alone, not told as [`crate::Wait`]; nanoseconds.
    pub wait_min: Nanos,
    /// Holds shorter than this that nobody waited for are not told, unless they are for writing; nanoseconds.
    pub hold_min: Nanos,
    /// Tracepoints that the kernel lacked.
    pub missing: Vec<String>,
}

/// Why a trace cannot be read, or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// It is something else.
    #[error("this is not a Faultless trace: it does not begin with the letters of one")]
    NotATrace,
    /// Another version wrote it.
    #[error(
        "the trace has format version {found}, and this program reads version {VERSION}; use the faultless that wrote it"
    )]
    Version {
        /// The version of the file.
        found: u32,
    },
    /// It ends too early.
    #[error(
        "the trace is cut off after {events} events, in byte {offset}: its writer was stopped, or the copy is not whole"
    )]
    CutOff {
        /// Events that were read before.
        events: u64,
        /// Where it ends.
        offset: u64,
    },
    /// Its bytes are not those that were written.
    #[error("the trace is damaged in the chunk at byte {offset}: {what}")]
    Damaged {
        /// Where the chunk begins.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
}

/// Writes a trace.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    payload: Vec<u8>,
    items: u32,
    events: u64,
    bytes: u64,
    before: Nanos,
    /// A chunk was begun, and could not be written to its end.
    broken: bool,
}

impl<W: Write> Writer<W> {
    /// Begins a trace.
    ///
    /// # Errors
    ///
    /// When `out` cannot be written.
    pub fn new(mut out: W, header: &Header) -> Result<Self, Error> {
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        let mut writer = Writer {
            out,
            payload: postcard::to_stdvec(header).map_err(encoding)?,
            items: 1,
            events: 0,
            bytes: 0,
            before: 0,
            broken: false,
        };
        writer.flush_chunk(Kind::Header)?;
        Ok(writer)
    }

    /// Adds an event.
    ///
    /// # Errors
    ///
    /// When the output cannot be written; the trace is then cut off there.
    pub fn write(&mut self, event: &Event) -> Result<(), Error> {
        let mut event = event.clone();
        if let Some(at) = event.at_mut() {
            let now = *at;
            *at = zigzag(now.wrapping_sub(self.before) as i64);
            self.before = now;
        }
        let payload = std::mem::take(&mut self.payload);
        self.payload = postcard::to_extend(&event, payload).map_err(encoding)?;
        self.items += 1;
        self.events += 1;
        if self.payload.len() >= CHUNK_BYTES {
            self.flush_chunk(Kind::Events)?;
        }
        Ok(())
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Bytes that were handed to the output so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Hands what there is to the output, so that a reader of the file sees it.
    ///
    /// # Errors
    ///
    /// When the output cannot be written.
    pub fn flush(&mut self) -> Result<(), Error> {
        if self.items > 0 {
            self.flush_chunk(Kind::Events)?;
        }
        Ok(self.out.flush()?)
    }

    /// Ends the trace, and gives the output back.
    ///
    /// # Errors
    ///
    /// When the output cannot be written.
    pub fn finish(mut self) -> Result<W, Error> {
        self.flush()?;
        self.payload = postcard::to_stdvec(&self.events).map_err(encoding)?;
        self.items = 1;
        self.flush_chunk(Kind::End)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn flush_chunk(&mut self, kind: Kind) -> Result<(), Error> {
        if std::mem::replace(&mut self.broken, true) {
            // A part of a chunk is there already; another one behind it could not be read.
            return Err(std::io::Error::other("the trace could not be written before").into());
        }
        let length = u32::try_from(self.payload.len())
            .ok()
            .filter(|&n| n <= CHUNK_BYTES_MAX)
            .ok_or_else(|| std::io::Error::other("an event is larger than a chunk may be"))?;
        for word in [
            kind as u32,
            self.items,
            length,
            crc32fast::hash(&self.payload),
        ] {
            self.out.write_all(&word.to_le_bytes())?;
        }
        self.out.write_all(&self.payload)?;
        self.bytes += 16 + u64::from(length);
        self.payload.clear();
        self.items = 0;
        self.before = 0;
        self.broken = false;
        Ok(())
    }
}

fn encoding(e: postcard::Error) -> Error {
    Error::Io(std::io::Error::other(e))
}

fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

/// Reads a trace: an iterator of its events.
///
/// After an error it gives nothing more; what it gave before is sound.
#[derive(Debug)]
pub struct Reader<R: Read> {
    input: R,
    header: Header,
    offset: u64,
    chunk_at: u64,
    payload: Vec<u8>,
    used: usize,
    items_left: u32,
    before: Nanos,
    events: u64,
    files: HashSet<u32>,
    stacks: HashSet<u32>,
    done: bool,
}

impl<R: Read> Reader<R> {
    /// Begins to read.
    ///
    /// # Errors
    ///
    /// When this is no trace, one of another version, or its header is damaged.
    pub fn new(input: R) -> Result<Self, Error> {
        let mut reader = Reader {
            input,
            header: Header::default(),
            offset: 0,
            chunk_at: 0,
            payload: Vec::new(),
            used: 0,
            items_left: 0,
            before: 0,
            events: 0,
            files: HashSet::new(),
            stacks: HashSet::new(),
            done: false,
        };
        let mut magic = [0; 8];
        match reader.read_exactly(&mut magic) {
            Err(Error::CutOff { .. }) => return Err(Error::NotATrace),
            other => other?,
        }
        if magic != MAGIC {
            return Err(Error::NotATrace);
        }
        let found = reader.word()?;
        if found != VERSION {
            return Err(Error::Version { found });
        }
        if reader.next_chunk()? != Kind::Header as u32 {
            return Err(reader.damaged("it is not the header"));
        }
        if reader.items_left != 1 {
            return Err(reader.damaged("it is not one header"));
        }
        reader.header = postcard::from_bytes(&reader.payload)
            .map_err(|e| reader.damaged(&format!("it is no header ({e})")))?;
        reader.items_left = 0;
        reader.used = reader.payload.len();
        Ok(reader)
    }

    /// Where the trace comes from.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn read_exactly(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) => {
                    return Err(Error::CutOff {
                        events: self.events,
                        offset: self.offset + filled as u64,
                    });
                }
                Ok(n) => filled += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.offset += filled as u64;
        Ok(())
    }

    fn word(&mut self) -> Result<u32, Error> {
        let mut bytes = [0; 4];
        self.read_exactly(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Damaged {
            offset: self.chunk_at,
            what: what.to_owned(),
        }
    }

    /// Reads and checks a chunk; its kind.
    fn next_chunk(&mut self) -> Result<u32, Error> {
        self.chunk_at = self.offset;
        let kind = self.word()?;
        let items = self.word()?;
        let length = self.word()?;
        let sum = self.word()?;
        if length > CHUNK_BYTES_MAX || items > length {
            return Err(self.damaged(&format!(
                "it claims {items} items in {length} bytes, which no writer makes"
            )));
        }
        let mut payload = std::mem::take(&mut self.payload);
        payload.resize(length as usize, 0);
        let read = self.read_exactly(&mut payload);
        self.payload = payload;
        read?;
        if crc32fast::hash(&self.payload) != sum {
            return Err(self.damaged("its checksum is wrong"));
        }
        self.used = 0;
        self.items_left = items;
        self.before = 0;
        Ok(kind)
    }

    fn next_event(&mut self) -> Result<Option<Event>, Error> {
        while self.items_left == 0 {
            if self.used != self.payload.len() {
                return Err(self.damaged("it is longer than its items"));
            }
            match self.next_chunk()? {
                k if k == Kind::Events as u32 => {}
                k if k == Kind::End as u32 => {
                    if self.items_left != 1 {
                        return Err(self.damaged("it is not one end"));
                    }
                    let told: u64 = postcard::from_bytes(&self.payload)
                        .map_err(|e| self.damaged(&format!("it is no end ({e})")))?;
                    if told != self.events {
                        return Err(self.damaged(&format!(
                            "it speaks of {told} events, and there were {}",
                            self.events
                        )));
                    }
                    return Ok(None);
                }
                kind => return Err(self.damaged(&format!("its kind {kind} is not known"))),
            }
        }
        let (mut event, rest): (Event, &[u8]) =
            postcard::take_from_bytes(&self.payload[self.used..])
                .map_err(|e| self.damaged(&format!("an event cannot be decoded ({e})")))?;
        self.used = self.payload.len() - rest.len();
        self.items_left -= 1;
        if let Some(at) = event.at_mut() {
            *at = self.before.wrapping_add(unzigzag(*at) as u64);
            self.before = *at;
        }
        if !event.is_possible() {
            return Err(self.damaged("an event's times cannot be"));
        }
        match &event {
            Event::File(file) => {
                self.files.insert(file.no.0);
            }
            Event::Stack(stack) => {
                self.stacks.insert(stack.no.0);
            }
            _ => {}
        }
        if let Some(file) = event.file().filter(|f| !self.files.contains(&f.0)) {
            return Err(self.damaged(&format!("file {} was not named before", file.0)));
        }
        if let Some(stack) = event.stack().filter(|s| !self.stacks.contains(&s.0)) {
            return Err(self.damaged(&format!("stack {} was not given before", stack.0)));
        }
        self.events += 1;
        Ok(Some(event))
    }
}

impl<R: Read> Iterator for Reader<R> {
    type Item = Result<Event, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.next_event().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::*;
    use proptest::prelude::*;

    fn file(no: u32) -> Event {
        Event::File(File {
            no: FileNo(no),
            device: 1 << 20,
            inode: u64::from(no) + 7,
            magic: 0xEF53,
            path: format!("/data/{no}"),
        })
    }

    fn fault(at: Nanos, no: Option<u32>) -> Event {
        Event::Fault(Fault {
            at,
            took: 500_000,
            tid: 12,
            pid: 10,
            address: 0x7fff_0000_0000,
            ip: 0x5555_0000,
            file: no.map(FileNo),
            page: 77,
            major: true,
            gone: false,
            locked: true,
            write: false,
            kernel: false,
            open: false,
            first: 400_000,
            wait: 90_000,
            retry: 10_000,
            retry_asleep: 0,
            causes: [300_000, 0, 0, 0, 20_000, 0],
            stack: None,
        })
    }

    fn written(events: &[Event]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), &Header::default()).expect("a vector");
        for event in events {
            writer.write(event).expect("a vector");
        }
        writer.finish().expect("a vector")
    }

    fn read(bytes: &[u8]) -> Result<Vec<Event>, Error> {
        Reader::new(bytes)?.collect()
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(times in proptest::collection::vec(0u64..1 << 55, 0..300)) {
            let mut events = vec![file(0)];
            events.extend(times.iter().map(|&at| fault(at, Some(0))));
            prop_assert_eq!(read(&written(&events)).unwrap(), events);
        }

        #[test]
        fn a_changed_byte_is_found(at in 0usize.., flip in 1u8..) {
            let events = vec![file(0), fault(5, Some(0)), fault(9, None)];
            let mut bytes = written(&events);
            let at = at % bytes.len();
            bytes[at] ^= flip;
            prop_assert!(read(&bytes).is_err(), "byte {} of {}", at, bytes.len());
        }

    }

    #[test]
    fn every_bit_of_a_small_trace_matters() {
        let bytes = written(&[file(0), fault(5, Some(0)), fault(9, None)]);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert!(read(&changed).is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_trace_that_is_cut_off_gives_what_was_whole(keep in 0usize..) {
            let events: Vec<Event> = (0..20_000).map(|at| fault(at, None)).collect();
            let bytes = written(&events);
            let keep = keep % bytes.len();
            let Ok(reader) = Reader::new(&bytes[..keep]) else { return Ok(()) };
            let got: Vec<_> = reader.collect();
            let cut = matches!(got.last(), Some(Err(Error::CutOff { .. })));
            prop_assert!(cut);
            for (i, event) in got[..got.len() - 1].iter().enumerate() {
                prop_assert_eq!(event.as_ref().unwrap(), &events[i]);
            }
        }
    }

    #[test]
    fn a_fault_takes_about_sixty_bytes() {
        let events: Vec<Event> = (0..10_000).map(|i| fault(i * 14_000, None)).collect();
        let each = written(&events).len() / events.len();
        assert!((30..70).contains(&each), "{each} bytes");
    }

    #[test]
    fn a_file_must_be_named_before_it_is_used() {
        let e = read(&written(&[fault(1, Some(3))])).unwrap_err();
        assert!(e.to_string().contains("file 3 was not named"), "{e}");
    }

    #[test]
    fn other_files_and_versions_are_told() {
        assert!(matches!(read(b""), Err(Error::NotATrace)));
        assert!(matches!(
            read(b"PNG, or so it seems"),
            Err(Error::NotATrace)
        ));
        let mut bytes = written(&[]);
        bytes[8] = 9;
        assert!(matches!(read(&bytes), Err(Error::Version { found: 9 })));
    }

    #[test]
    fn a_reader_can_begin_before_the_writer_has_ended() {
        let mut writer = Writer::new(Vec::new(), &Header::default()).unwrap();
        writer.write(&fault(1, None)).unwrap();
        writer.flush().unwrap();
        let so_far = writer.out.clone();
        let mut reader = Reader::new(&so_far[..]).unwrap();
        assert_eq!(reader.next().unwrap().unwrap(), fault(1, None));
        assert!(matches!(
            reader.next(),
            Some(Err(Error::CutOff { events: 1, .. }))
        ));
        assert!(reader.next().is_none());
    }
}
