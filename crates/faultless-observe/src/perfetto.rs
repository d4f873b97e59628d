//! Events for the Perfetto UI (<https://ui.perfetto.dev>), and for chrome://tracing.
//!
//! The format is Chrome's [trace event format](https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU),
//! which both open: a JSON array of slices on the threads' tracks. A fault is a slice with its first attempt, its wait and
//! its retry inside; waits and holds of mmap_lock and reads from storage are slices of their own. It is written as events
//! come, so memory does not grow with it.

use crate::names;
use faultless_trace::{Doing, Event, FileNo, Nanos, StackNo};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Write;

/// A track for reads from storage, which belong to no thread.
const STORAGE: u32 = 0;

/// Writes events as they come.
#[derive(Debug)]
pub struct Perfetto<W: Write> {
    out: W,
    first: bool,
    files: HashMap<FileNo, String>,
    stacks: HashMap<StackNo, Vec<String>>,
}

fn us(ns: Nanos) -> Value {
    json!(ns as f64 / 1e3)
}

fn doing(doing: Doing) -> String {
    match doing {
        Doing::Fault => "page fault".to_owned(),
        Doing::Call(no) => names::call(no),
        Doing::CallFault(no) => format!("page fault in {}", names::call(no)),
        Doing::KernelThread => "kernel thread".to_owned(),
        Doing::Unknown => "unknown".to_owned(),
    }
}

impl<W: Write> Perfetto<W> {
    /// Begins the file.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn new(mut out: W) -> std::io::Result<Self> {
        out.write_all(b"[\n")?;
        let mut it = Perfetto {
            out,
            first: true,
            files: HashMap::new(),
            stacks: HashMap::new(),
        };
        it.put(&json!({"ph": "M", "name": "process_name", "pid": STORAGE, "tid": STORAGE, "args": {"name": "storage"}}))?;
        Ok(it)
    }

    fn put(&mut self, value: &Value) -> std::io::Result<()> {
        if !std::mem::replace(&mut self.first, false) {
            self.out.write_all(b",\n")?;
        }
        serde_json::to_writer(&mut self.out, value)?;
        Ok(())
    }

    fn slice(
        &mut self,
        (pid, tid): (u32, u32),
        name: &str,
        at: Nanos,
        took: Nanos,
        args: Value,
    ) -> std::io::Result<()> {
        self.put(&json!({
            "ph": "X", "cat": "faultless", "name": name, "pid": pid, "tid": tid, "ts": us(at), "dur": us(took), "args": args,
        }))
    }

    fn file(&self, file: Option<FileNo>) -> &str {
        file.and_then(|f| self.files.get(&f))
            .map_or("", String::as_str)
    }

    /// Adds an event.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn event(&mut self, event: &Event) -> std::io::Result<()> {
        match event {
            Event::Thread(e) => self.put(&json!({
                "ph": "M", "name": if e.tid == e.pid { "process_name" } else { "thread_name" }, "pid": e.pid, "tid": e.tid,
                "args": {"name": e.name},
            })),
            Event::File(e) => {
                self.files.insert(e.no, e.path.clone());
                Ok(())
            }
            Event::Stack(e) => {
                self.stacks.insert(e.no, e.functions.clone());
                Ok(())
            }
            Event::Fault(e) => {
                let args = json!({
                    "address": format!("{:#x}", e.address), "file": self.file(e.file), "page": e.page, "major": e.major,
                    "gone_at_retry": e.gone, "write": e.write,
                });
                let track = (e.pid, e.tid);
                let name = if e.major { "major fault" } else { "fault" };
                self.slice(track, name, e.at, e.took, args)?;
                self.slice(track, "first attempt", e.at, e.first, json!({}))?;
                if e.locked {
                    let retry_at = e.at + e.first + e.wait;
                    self.slice(track, "waits for mmap_lock", e.at + e.first, e.wait, json!({}))?;
                    self.slice(track, "under mmap_lock", retry_at, e.retry, json!({"asleep_us": us(e.retry_asleep)}))?;
                }
                Ok(())
            }
            Event::Wait(e) if !matches!(e.doing, Doing::Fault | Doing::CallFault(_)) => {
                let name = if e.write { "waits to write mmap_lock" } else { "waits to read mmap_lock" };
                let args = json!({"for": doing(e.doing), "of": e.target, "failed": e.failed});
                self.slice((e.pid, e.tid), name, e.at, e.took, args)
            }
            Event::Hold(e) if !matches!(e.doing, Doing::Fault | Doing::CallFault(_)) => {
                let name = if e.write { "writes under mmap_lock" } else { "reads under mmap_lock" };
                let stack = e.stack.and_then(|s| self.stacks.get(&s)).cloned().unwrap_or_default();
                let args = json!({
                    "for": doing(e.doing), "of": e.target, "reads": e.reads, "contended": e.contended,
                    "downgraded": e.downgraded, "longest_sleep_us": us(e.longest_sleep), "stack": stack,
                    "kept_by": e.kept_by.as_ref().map(|w| format!("{} ({})", w.name, w.tid)),
                });
                self.slice((e.pid, e.tid), name, e.at, e.took, args)
            }
            Event::Io(e) => {
                let args = json!({"file": self.file(Some(e.file)), "page": e.page, "bytes": e.bytes});
                let name = if e.fuse { "FUSE read" } else { "read" };
                // Requests overlap, so they are asynchronous slices.
                let id = format!("{}:{}:{}", e.file.0, e.page, e.at);
                for (phase, at) in [("b", e.at), ("e", e.at + e.took)] {
                    self.put(&json!({
                        "ph": phase, "cat": "storage", "name": name, "id": id, "pid": STORAGE, "tid": STORAGE, "ts": us(at),
                        "args": args,
                    }))?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Ends the file, and gives the output back.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn finish(mut self) -> std::io::Result<W> {
        self.out.write_all(b"\n]\n")?;
        self.out.flush()?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faultless_trace::{File, Io, Thread};

    #[test]
    fn what_is_written_is_a_json_array_of_slices() {
        let mut perfetto = Perfetto::new(Vec::new()).unwrap();
        for event in [
            Event::Thread(Thread {
                at: 0,
                tid: 5,
                pid: 5,
                name: "a \"quoted\" name".into(),
            }),
            Event::File(File {
                no: FileNo(0),
                device: 1,
                inode: 2,
                magic: 3,
                path: "/f".into(),
            }),
            Event::Io(Io {
                at: 1500,
                took: 2000,
                file: FileNo(0),
                page: 9,
                bytes: 4096,
                fuse: false,
            }),
        ] {
            perfetto.event(&event).unwrap();
        }
        let all: Vec<Value> = serde_json::from_slice(&perfetto.finish().unwrap()).unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!(all[1]["args"]["name"], "a \"quoted\" name");
        assert_eq!((&all[2]["ph"], &all[2]["ts"]), (&json!("b"), &json!(1.5)));
        assert_eq!((&all[3]["ph"], &all[3]["ts"]), (&json!("e"), &json!(3.5)));
        assert_eq!(all[3]["args"]["file"], "/f");
    }
}
