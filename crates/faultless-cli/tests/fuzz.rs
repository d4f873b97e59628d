//! Crafted input: whatever a file says, the answer is a result or a sentence, soon.
//!
//! CI runs each of these for a minute (`FAULTLESS_FUZZ_SECONDS`).

use faultless_trace::{
    CAUSES, Doing, Ended, Event, Fault, File, FileNo, Header, Hold, Io, LockId, Lost, Process,
    ProcessChange, Reader, Stack, StackNo, Stray, Thread, Wait, Writer,
};
use faultless_untrusted::fuzz::{Random, run};
use faultless_whatif::replay::Recording;
use faultless_whatif::workload::{BUILT_IN, Error, Workload};
use std::io::Write as _;

/// Traces with right checksums and any contents.
#[test]
fn traces_are_replayed_or_refused() {
    run("traces for whatif", &encoded(), |bytes, random| {
        let trace = trace_of(bytes, random);
        let Ok(recording) = Reader::new(&trace[..]).and_then(Recording::read) else {
            return;
        };
        let workload = Workload::of_recording("fuzz", recording);
        simulated(workload, random);
    });
}

#[test]
fn traces_are_reported_or_refused() {
    run("traces for observe", &encoded(), |bytes, random| {
        let trace = trace_of(bytes, random);
        let Ok(reader) = Reader::new(&trace[..]) else {
            return;
        };
        if let Ok(report) = faultless_observe::report_of(reader) {
            let _ = faultless_observe::html::page(&report);
            let _ = serde_json::to_string(&report);
        }
        let Ok(reader) = Reader::new(&trace[..]) else {
            return;
        };
        let mut perfetto =
            faultless_observe::perfetto::Perfetto::new(Vec::new()).expect("a vector");
        for event in reader.map_while(Result::ok) {
            perfetto.event(&event).expect("a vector");
        }
    });
}

/// Files whose checksums are wrong as well.
#[test]
fn damaged_traces_are_refused() {
    let seeds: Vec<_> = encoded()
        .iter()
        .map(|bytes| trace_of(bytes, &mut Random::new(1)))
        .collect();
    run("damaged traces", &seeds, |bytes, _| {
        if let Ok(reader) = Reader::new(bytes) {
            let _ = Recording::read(reader);
        }
    });
}

#[test]
fn workloads_are_simulated_or_refused() {
    let seeds: Vec<Vec<u8>> = BUILT_IN.iter().map(|b| b.1.as_bytes().to_vec()).collect();
    run("workloads", &seeds, |bytes, random| {
        let Ok(text) = std::str::from_utf8(bytes) else {
            return;
        };
        let mut workload = Workload::parse(text);
        if let Ok(workload) = &mut workload {
            // As long as a test may be.
            workload.seconds = workload.seconds.min(0.01);
            workload.warm_up = workload.warm_up.min(0.01);
        }
        simulated(workload, random);
    });
}

/// ELF headers, as a program is looked at before it is served.
#[test]
fn programs_are_served_or_refused() {
    let program = std::fs::read("/bin/sh").expect("there is a shell");
    let mut script = b"#!/usr/bin/env -S sh -c".to_vec();
    script.extend([b'\n'; 3]);
    let heads = [4096, 65_536].map(|n| program[..program.len().min(n)].to_vec());
    let seeds = [&heads[..], &[script]].concat();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = dir.path().join("program");
    run("programs", &seeds, |bytes, _| {
        use std::os::unix::fs::OpenOptionsExt as _;
        let made = std::fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o700)
            .open(&path)
            .and_then(|mut f| f.write_all(bytes));
        made.expect("a directory of our own");
        let _ = faultless_run::check_program(&path).map_err(|e| e.to_string());
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("no zero");
        let _ = faultless_run::inspect(&name);
    });
}

fn simulated(workload: Result<Workload, Error>, random: &mut Random) {
    let Ok(workload) = workload else { return };
    let designs = faultless_whatif::designs::DESIGNS;
    let design = designs[random.below(designs.len())].id;
    match faultless_whatif::run::simulate(&workload, design, 1) {
        Ok(_) | Err(Error::TooLong { .. } | Error::Wrong { .. }) => {}
        Err(e) => panic!("{design}: {e}"),
    }
}

/// Events, one behind the other, as a trace has them.
fn encoded() -> Vec<Vec<u8>> {
    let all: Vec<Vec<u8>> = events()
        .iter()
        .map(|e| postcard::to_stdvec(e).expect("plain data"))
        .collect();
    vec![all.concat(), all[..4].concat(), all[4..].concat()]
}

/// A trace of the events that damaged bytes still are.
fn trace_of(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let header = Header {
        processors: [0, 1, 2, 64, u32::MAX][random.below(5)],
        page_size: [0, 4096, 1, u32::MAX][random.below(4)],
        targets: vec![10],
        ..Header::default()
    };
    let mut writer = Writer::new(Vec::new(), &header).expect("a vector");
    let mut rest = bytes;
    while !rest.is_empty() {
        match postcard::take_from_bytes::<Event>(rest) {
            Ok((event, left)) => {
                let _ = writer.write(&event);
                rest = left;
            }
            Err(_) => rest = &rest[1..],
        }
    }
    writer.finish().expect("a vector")
}

fn events() -> Vec<Event> {
    let hold = |at, tid, write, downgraded, doing| {
        Event::Hold(Hold {
            at,
            took: 200_000,
            lock: LockId(1),
            target: 10,
            tid,
            pid: 10,
            write,
            downgraded,
            contended: true,
            open: false,
            doing,
            address: 0x7fff_0000,
            length: 4096,
            file: None,
            page: 0,
            causes: [0, 0, 0, 1000, 5000, 0],
            longest_sleep: 10,
            stack: Some(StackNo(0)),
            reads: String::new(),
            kept_by: write.then(|| {
                Box::new(faultless_trace::Keeper {
                    tid,
                    pid: 10,
                    name: "agent".to_owned(),
                    doing,
                    reads: "10/smaps".to_owned(),
                })
            }),
        })
    };
    let fault = |at, tid, file, major| {
        Event::Fault(Fault {
            at,
            took: 500_000,
            tid,
            pid: 10,
            address: 0x7fff_0000_0000,
            ip: 0x5555_0000,
            file,
            page: 77,
            major,
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
    };
    let _: [u64; CAUSES] = [0; CAUSES];
    vec![
        Event::File(File {
            no: FileNo(0),
            device: 8 << 20,
            inode: 7,
            magic: 0xEF53,
            path: "/data/x".to_owned(),
        }),
        Event::Stack(Stack {
            no: StackNo(0),
            functions: vec!["filemap_fault".to_owned(), "down_read".to_owned()],
        }),
        Event::Thread(Thread {
            at: 0,
            pid: 10,
            tid: 11,
            name: "reader-1".to_owned(),
        }),
        Event::Process(Process {
            at: 0,
            pid: 10,
            change: ProcessChange::Executed,
        }),
        fault(1_000, 11, Some(FileNo(0)), true),
        Event::Wait(Wait {
            at: 1_100_000,
            took: 300_000,
            lock: LockId(1),
            target: 10,
            tid: 12,
            pid: 10,
            write: true,
            failed: false,
            open: false,
            doing: Doing::Call(11),
            address: 0x7fff_0000,
            length: 4096,
            file: None,
            page: 0,
            owner: Some(11),
            cpu: 100,
            granted: 50,
        }),
        hold(1_400_000, 12, true, false, Doing::Call(11)),
        hold(1_600_000, 12, false, true, Doing::Call(11)),
        hold(1_900_000, 12, true, false, Doing::Call(56)),
        fault(2_000_000, 11, None, false),
        Event::Io(Io {
            at: 2_000_100,
            took: 80_000,
            file: FileNo(0),
            page: 77,
            bytes: 4096,
            fuse: false,
        }),
        Event::Stray(Stray {
            at: 3_000_000,
            lock: LockId(1),
            target: 10,
            tid: 11,
            pid: 10,
            write: false,
            release: true,
        }),
        Event::Lost(Lost {
            at: 3_000_000,
            records: 1,
        }),
        Event::Ended(Ended { at: 4_000_000 }),
    ]
}
