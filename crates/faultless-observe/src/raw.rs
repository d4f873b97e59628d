//! The records of the BPF programs, as they lie in memory: `bpf/records.h`, in Rust.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(crate) const CAUSES: usize = 6;
pub(crate) const BUCKETS: usize = 96;
pub(crate) const PATH_PARTS: usize = 10;
pub(crate) const PART_LEN: usize = 64;

macro_rules! record {
    ($(#[$doc:meta])* $name:ident is $size:literal bytes { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

record!(Header is 16 bytes { kind: u8, doing: u8, syscall: u16, tid: u32, pid: u32, target: u32 });

record!(
    #[derive(PartialEq, Eq, Hash, Default)]
    FileId is 16 bytes { ino: u64, dev: u32, pad: u32 }
);

impl FileId {
    pub(crate) fn is_none(self) -> bool {
        self.ino == 0 && self.dev == 0
    }
}

record!(File is 680 bytes {
    header: Header, file: FileId, parts: u32, magic: u32, part: [[u8; PART_LEN]; PATH_PARTS],
});

record!(Task is 48 bytes { header: Header, at: u64, what: u32, parent: u32, comm: [u8; 16] });

record!(Fault is 160 bytes {
    header: Header, at: u64, address: u64, ip: u64, file: FileId, page: u64, flags: u32, stack: i32,
    took: u64, first: u64, wait: u64, retry: u64, retry_asleep: u64, causes: [u64; CAUSES],
});

record!(Wait is 104 bytes {
    header: Header, mm: u64, at: u64, until: u64, address: u64, length: u64, file: FileId, page: u64,
    flags: u32, owner: u32, cpu: u64, granted: u64,
});

record!(Waker is 80 bytes {
    tid: u32, pid: u32, syscall: u16, doing: u8, pad: u8, comm: [u8; 16], name: [u8; 24], parent: [u8; 24],
    more_pad: u32,
});

record!(Hold is 272 bytes {
    header: Header, mm: u64, at: u64, until: u64, address: u64, length: u64, file: FileId, page: u64,
    flags: u32, stack: i32, longest: u64, causes: [u64; CAUSES], name: [u8; 24], parent: [u8; 24],
    waker: Waker,
});

record!(Stray is 40 bytes { header: Header, mm: u64, at: u64, what: u32, flags: u32 });

record!(Io is 64 bytes {
    header: Header, at: u64, until: u64, file: FileId, page: u64, bytes: u32, flags: u32,
});

record!(#[derive(Default)] TallyKey is 24 bytes { tid: u32, pid: u32, file: FileId });

record!(Tally is 512 bytes {
    faults: u64, major: u64, gone: u64, total: u64, longest: u64, first: u64, wait: u64, retry: u64, retry_asleep: u64,
    causes: [u64; CAUSES], stack: i32, pad: u32, buckets: [u32; BUCKETS],
});

record!(Settings is 32 bytes {
    wait_ns: u64, hold_ns: u64, fault_ns: u64, every_fault: u8, follow_children: u8, pad: [u8; 6],
});

record!(
    #[derive(Default, PartialEq, Eq)]
    Losses is 48 bytes { ring: u64, tallies: u64, threads: u64, targets: u64, names: u64, slots: u64 }
);

pub(crate) mod fault {
    pub(crate) const MAJOR: u32 = 1;
    pub(crate) const GONE: u32 = 2;
    pub(crate) const LOCKED: u32 = 4;
    pub(crate) const WRITE: u32 = 8;
    pub(crate) const KERNEL: u32 = 16;
    pub(crate) const OPEN: u32 = 32;
}

pub(crate) mod lock {
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const FAILED: u32 = 2;
    pub(crate) const CONTENDED: u32 = 4;
    pub(crate) const DOWNGRADED: u32 = 8;
    pub(crate) const OPEN: u32 = 32;
}

pub(crate) mod task {
    pub(crate) const FORK: u32 = 1;
    pub(crate) const EXEC: u32 = 2;
    pub(crate) const EXIT: u32 = 3;
    pub(crate) const SEEN: u32 = 4;
}

pub(crate) const STRAY_RELEASE: u32 = 1;
pub(crate) const IO_FUSE: u32 = 1;
pub(crate) const TARGET_WATCHED: u8 = 1;
pub(crate) const TARGET_CHILDREN: u8 = 2;

/// One record.
#[derive(Debug, Clone)]
pub(crate) enum Raw {
    File(Box<File>),
    Task(Task),
    Fault(Fault),
    Wait(Wait),
    Hold(Hold),
    Stray(Stray),
    Io(Io),
}

impl Raw {
    /// The record at the beginning of some bytes, and what follows it.
    pub(crate) fn parse(bytes: &[u8]) -> Option<(Raw, &[u8])> {
        fn of<T: FromBytes>(bytes: &[u8]) -> Option<(T, &[u8])> {
            T::read_from_prefix(bytes).ok()
        }
        Some(match *bytes.first()? {
            1 => of(bytes).map(|(r, rest)| (Raw::File(Box::new(r)), rest))?,
            2 => of(bytes).map(|(r, rest)| (Raw::Task(r), rest))?,
            3 => of(bytes).map(|(r, rest)| (Raw::Fault(r), rest))?,
            4 => of(bytes).map(|(r, rest)| (Raw::Wait(r), rest))?,
            5 => of(bytes).map(|(r, rest)| (Raw::Hold(r), rest))?,
            6 => of(bytes).map(|(r, rest)| (Raw::Stray(r), rest))?,
            7 => of(bytes).map(|(r, rest)| (Raw::Io(r), rest))?,
            _ => return None,
        })
    }
}

/// The text before the first NUL.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
