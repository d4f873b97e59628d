//! The BPF programs in the kernel: loaded, attached, and asked for what they saw.
//!
//! Everything is on BTF tracepoints, so neither tracefs nor kprobes are needed, and everything goes away with the
//! [`Session`], however the process ends.

use crate::raw::{self, Raw};
use anyhow::{Context, bail};
use faultless_untrusted::input::kernel_text;
use faultless_untrusted::printable;
use libbpf_rs::btf::ReferencesType;
use libbpf_rs::btf::types::{FuncProto, Ptr, Typedef};
use libbpf_rs::{
    Btf, Iter, Link, MapCore, MapFlags, Object, ObjectBuilder, PrintLevel, RingBufferBuilder,
};
use std::cell::RefCell;
use std::io::Read;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// Records that are taken from the ring before they are worked on: bounds the memory for them.
const BATCH: usize = 8192;
/// What is asked of the map of sums at a time.
const TALLIES_AT_A_TIME: u32 = 1024;

/// The object file; aligned, since libbpf reads it in place.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);
static PROGRAMS: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/observe.bpf.o")));

/// Programs without which there is nothing to see; the others are left out where the kernel has no such tracepoint.
const NEEDED: [&str; 8] = [
    "page_fault_user",
    "mmap_start_locking",
    "mmap_acquire_returned",
    "path_start_locking",
    "path_acquire_returned",
    "mmap_released",
    "sched_switch",
    "sched_wakeup",
];

/// The events of mmap_lock, in the two forms that kernels have given them.
const WITHOUT_PATH: [&str; 2] = ["mmap_start_locking", "mmap_acquire_returned"];
const WITH_PATH: [&str; 2] = ["path_start_locking", "path_acquire_returned"];

/// How to watch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) every_fault: bool,
    pub(crate) follow_children: bool,
    pub(crate) wait_min: Duration,
    pub(crate) hold_min: Duration,
    pub(crate) fault_min: Duration,
}

pub(crate) struct Session {
    // While they exist, programs run.
    links: Vec<Link>,
    ring: libbpf_rs::RingBuffer<'static>,
    batch: Rc<RefCell<Vec<Raw>>>,
    going_on: Option<Link>,
    /// Tracepoints that this kernel lacks.
    pub(crate) missing: Vec<String>,
    object: Object,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("missing", &self.missing)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Loads and attaches the programs. Nothing is watched yet.
    pub(crate) fn start(settings: Settings) -> anyhow::Result<Session> {
        quiet();
        if !Path::new(BTF).exists() {
            bail!(
                "the kernel has no type information: {BTF} is not there; observe needs a kernel that was built with CONFIG_DEBUG_INFO_BTF=y, as distributions' kernels are"
            );
        }
        crate::privilege::check()?;
        check_namespace()?;
        let btf = Btf::from_vmlinux().with_context(|| format!("{BTF} cannot be read"))?;

        let mut builder = ObjectBuilder::default();
        builder.name("faultless")?;
        let mut open = builder
            .open_memory(&PROGRAMS.0)
            .context("the BPF programs cannot be opened")?;
        let mut missing = Vec::new();
        let modules = Modules::look(
            Path::new("/sys/kernel/btf/fuse").exists(),
            crate::privilege::is_admin(),
            |path| kernel_text(path).unwrap_or_default(),
        );
        let carries_a_path = arguments(&btf, "mmap_lock_start_locking") == Some(3);
        for mut program in open.progs_mut() {
            let name = program.name().to_string_lossy().into_owned();
            let section = program.section().to_string_lossy().into_owned();
            let Some(tracepoint) = section.strip_prefix("tp_btf/") else {
                continue;
            };
            let other_form = if carries_a_path {
                WITHOUT_PATH
            } else {
                WITH_PATH
            };
            // Reads of files are told one by one, or not at all.
            let in_vain = name == "block_rq_complete" && !settings.every_fault;
            if in_vain || other_form.contains(&name.as_str()) {
                program.set_autoload(false);
                continue;
            }
            if btf
                .type_by_name::<Typedef<'_>>(&format!("btf_trace_{tracepoint}"))
                .is_some()
            {
                continue;
            }
            if NEEDED.contains(&name.as_str()) {
                bail!(
                    "this kernel has no tracepoint {tracepoint}; observe needs Linux 5.18 or later with CONFIG_FTRACE"
                );
            }
            let of_fuse = tracepoint.starts_with("fuse_");
            if of_fuse && modules.have(tracepoint) {
                continue;
            }
            program.set_autoload(false);
            if !of_fuse || modules.fuse {
                missing.push(tracepoint.to_owned());
            }
        }
        let given = raw::Settings {
            wait_ns: nanos(settings.wait_min),
            hold_ns: nanos(settings.hold_min),
            fault_ns: nanos(settings.fault_min),
            every_fault: settings.every_fault.into(),
            follow_children: settings.follow_children.into(),
            pad: [0; 6],
        };
        for mut map in open.maps_mut() {
            if map.name().to_string_lossy().contains(".rodata.settings") {
                let value = map
                    .initial_value_mut()
                    .context("the settings have no place in the BPF programs")?;
                let given = given.as_bytes();
                value[..given.len()].copy_from_slice(given);
            }
        }
        let object = open.load().map_err(refused)?;

        let mut links = Vec::new();
        let mut going_on = None;
        for program in object.progs_mut() {
            let name = program.name().to_string_lossy().into_owned();
            let section = program.section().to_string_lossy().into_owned();
            if !program.autoload() {
                continue;
            }
            let link = program
                .attach()
                .with_context(|| format!("the BPF program {name} cannot be attached"))?;
            if section == "iter/task" {
                going_on = Some(link);
            } else {
                links.push(link);
            }
        }

        // For what has no room later.
        let tallies = map(&object, "tallies")?;
        let nothing = vec![0; tallies.value_size() as usize];
        for processor in 0..libbpf_rs::num_possible_cpus()? as u32 {
            let key = raw::TallyKey {
                tid: processor,
                ..raw::TallyKey::default()
            };
            tallies.update(key.as_bytes(), &nothing, MapFlags::ANY)?;
        }

        let batch = Rc::new(RefCell::new(Vec::new()));
        let ring = {
            let batch = Rc::clone(&batch);
            let map = map(&object, "ring")?;
            let mut builder = RingBufferBuilder::new();
            builder.add(&map, move |bytes: &[u8]| {
                if let Some((record, _)) = Raw::parse(bytes) {
                    batch.borrow_mut().push(record);
                }
                0
            })?;
            builder.build()?
        };
        Ok(Session {
            links,
            ring,
            batch,
            going_on,
            missing,
            object,
        })
    }

    /// Watches a process, or what a process forks.
    pub(crate) fn watch(&self, pid: u32, how: u8) -> anyhow::Result<()> {
        Ok(map(&self.object, "targets")?.update(&pid.to_ne_bytes(), &[how], MapFlags::ANY)?)
    }

    pub(crate) fn unwatch(&self, pid: u32) {
        if let Ok(targets) = map(&self.object, "targets") {
            let _ = targets.delete(&pid.to_ne_bytes());
        }
    }

    /// Stops the programs, all at the same moment of CLOCK_MONOTONIC, which has come. What they have seen stays.
    pub(crate) fn end(&mut self, at: u64) {
        let over = map(&self.object, ".data.over");
        let set =
            over.map(|m| m.update(&0u32.to_ne_bytes(), &at.max(1).to_ne_bytes(), MapFlags::ANY));
        if !matches!(set, Ok(Ok(()))) {
            // Detaching takes many milliseconds, for it waits for other processors.
            self.links.clear();
        }
        // For those that run just now.
        std::thread::sleep(Duration::from_millis(1));
    }

    /// Waits until the ring is half full, or for a while, then takes a batch of records. An empty batch: there are none.
    pub(crate) fn records(&self, wait: Duration) -> Vec<Raw> {
        self.batch.borrow_mut().clear();
        if !wait.is_zero() {
            poll(self.ring.epoll_fd(), wait);
        }
        self.ring.consume_raw_n(BATCH);
        std::mem::take(&mut self.batch.borrow_mut())
    }

    /// Waits, holds and faults that have not ended.
    pub(crate) fn going_on(&self) -> Vec<Raw> {
        let mut bytes = Vec::new();
        if let Some(link) = &self.going_on
            && let Ok(mut iter) = Iter::new(link)
        {
            let _ = iter.read_to_end(&mut bytes);
        }
        let mut rest = &bytes[..];
        let mut all = Vec::new();
        while let Some((record, after)) = Raw::parse(rest) {
            all.push(record);
            rest = after;
        }
        all
    }

    /// The sums of faults, by thread and file.
    pub(crate) fn tallies(&self, mut each: impl FnMut(raw::TallyKey, raw::Tally)) {
        let Ok(map) = map(&self.object, "tallies") else {
            return;
        };
        let Ok(batches) = map.lookup_batch(TALLIES_AT_A_TIME, MapFlags::ANY, MapFlags::ANY) else {
            return;
        };
        for (key, value) in batches {
            if let (Ok(key), Ok(value)) = (
                raw::TallyKey::read_from_bytes(&key),
                raw::Tally::read_from_bytes(&value),
            ) {
                each(key, value);
            }
        }
    }

    /// Forgets the sums of a thread that is gone.
    pub(crate) fn forget(&self, key: raw::TallyKey) {
        if let Ok(map) = map(&self.object, "tallies") {
            let _ = map.delete(key.as_bytes());
        }
    }

    /// The addresses of a kernel stack, innermost first.
    pub(crate) fn stack(&self, id: u32) -> Vec<u64> {
        let found = map(&self.object, "stacks")
            .ok()
            .and_then(|m| m.lookup(&id.to_ne_bytes(), MapFlags::ANY).ok().flatten());
        let bytes = found.unwrap_or_default();
        let words = bytes.chunks_exact(8);
        words
            .map(|w| u64::from_ne_bytes(w.try_into().expect("eight bytes")))
            .take_while(|&a| a != 0)
            .collect()
    }

    pub(crate) fn losses(&self) -> raw::Losses {
        self.object
            .maps()
            .find(|m| m.name().to_string_lossy().ends_with(".bss"))
            .and_then(|m| m.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).ok().flatten())
            .and_then(|bytes| Some(raw::Losses::read_from_prefix(&bytes).ok()?.0))
            .unwrap_or_default()
    }
}

/// Numbers of processes mean here what they mean to the kernel in the first namespace alone.
fn check_namespace() -> anyhow::Result<()> {
    const FIRST: &str = "pid:[4026531836]";
    let own = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    if own.as_os_str() != FIRST {
        bail!(
            "this is a process namespace of its own (a container): the kernel knows processes by other numbers; run observe on the host, or in a container with the host's process namespace (docker run --pid=host)"
        );
    }
    Ok(())
}

const BTF: &str = "/sys/kernel/btf/vmlinux";

fn map<'a>(object: &'a Object, name: &str) -> anyhow::Result<libbpf_rs::Map<'a>> {
    object
        .maps()
        .find(|m| m.name() == name)
        .with_context(|| format!("the BPF programs have no map {name}"))
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// FUSE, where it may be a module: its types are not among the kernel's own.
struct Modules {
    /// There is such a file system.
    fuse: bool,
    /// It is a module, and this process may read its types, which its tracepoints need.
    usable: bool,
    symbols: String,
}

impl Modules {
    /// `types`: the kernel shows the types of the module. `admin`: this process may read them. `text` reads a file of the kernel's.
    fn look(types: bool, admin: bool, text: impl Fn(&str) -> String) -> Self {
        let usable = types && admin;
        Modules {
            fuse: text("/proc/filesystems")
                .split_whitespace()
                .any(|t| t == "fuse"),
            usable,
            symbols: match usable {
                true => text("/proc/kallsyms"),
                false => String::new(),
            },
        }
    }

    /// Whether a tracepoint of the module's is there to be used.
    fn have(&self, tracepoint: &str) -> bool {
        // (In Linux 6.1 the module has no tracepoints.)
        let function = format!("__traceiter_{tracepoint}");
        let is_it = |line: &str| line.split_whitespace().nth(2) == Some(&function);
        self.usable && self.symbols.lines().any(is_it)
    }
}

/// How many arguments a tracepoint has.
fn arguments(btf: &Btf<'_>, tracepoint: &str) -> Option<usize> {
    let typedef = btf.type_by_name::<Typedef<'_>>(&format!("btf_trace_{tracepoint}"))?;
    let pointer: Ptr<'_> = typedef.referenced_type().try_into().ok()?;
    let function: FuncProto<'_> = pointer.referenced_type().try_into().ok()?;
    // The first is the tracepoint's own data.
    Some(function.iter().count() - 1)
}

/// Why a kernel that has all it takes refuses the programs.
fn refused(e: libbpf_rs::Error) -> anyhow::Error {
    let eperm = std::io::Error::from_raw_os_error(libc::EPERM).to_string();
    let why = match e.kind() {
        libbpf_rs::ErrorKind::PermissionDenied if e.to_string() == eperm => {
            "the kernel does not permit this user to load BPF programs; run observe as root, or give the command CAP_BPF and CAP_PERFMON (and look whether kernel lockdown is on)"
        }
        _ => {
            let said = lock(&SAID).take();
            let said = said.map_or(String::new(), |(_, said)| format!(" ({said})"));
            let refuses = format!(
                "the kernel refuses the BPF programs{said}: the programs may be too old for this kernel, or the kernel lacks CONFIG_MEMCG, or it is a PREEMPT_RT kernel, whose locks are others; FAULTLESS_BPF_LOG=1 shows all that libbpf says"
            );
            return anyhow::Error::new(e).context(refuses);
        }
    };
    anyhow::Error::new(e).context(why)
}

/// What libbpf complained about since programs were last loaded: the line that says most, and how much that is.
static SAID: Mutex<Option<(u8, String)>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// libbpf writes much to stderr. It may do so only where the user sets FAULTLESS_BPF_LOG; otherwise its best complaint is kept.
fn quiet() {
    if std::env::var_os("FAULTLESS_BPF_LOG").is_some() {
        return;
    }
    lock(&SAID).take();
    let keep = |_: PrintLevel, text: String| {
        let mut said = lock(&SAID);
        if let Some(better) = complaint(&text)
            && said.as_ref().is_none_or(|(says, _)| *says < better.0)
        {
            *said = Some(better);
        }
    };
    libbpf_rs::set_print(Some((PrintLevel::Warn, keep)));
}

/// The line that names the cause, and how well it does.
fn complaint(text: &str) -> Option<(u8, String)> {
    let lines = || text.lines().map(str::trim);
    let with = |part: &'static str| lines().find(|line| line.contains(part));
    // The kernel's reason is the last line of its listing, before the count of what it has looked at.
    let reason = || {
        let end = lines().position(|line| line.starts_with("processed "))?;
        let is_listing = |line: &str| {
            let number = line
                .split_once(':')
                .is_some_and(|(n, _)| n.parse::<u32>().is_ok());
            number || line.is_empty() || line.starts_with(';') || line.starts_with("from ")
        };
        let last = lines().take(end).last()?;
        (!is_listing(last) && !last.contains("BEGIN PROG LOAD LOG")).then_some(last)
    };
    let (says, line) = with("failed to resolve CO-RE relocation")
        .map(|line| (2, line))
        .or_else(|| reason().map(|line| (1, line)))
        .or_else(|| with("failed to").map(|line| (0, line)))
        .filter(|(_, line)| !line.contains("failed to load object"))?;
    let line = line.trim_start_matches("libbpf: ");
    Some((says, printable(line).to_string()))
}

#[allow(unsafe_code, reason = "poll(2)")]
fn poll(fd: i32, wait: Duration) {
    let mut it = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let wait = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one structure, which outlives the call.
    unsafe { libc::poll(&mut it, 1, wait) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_libbpf_says_the_line_that_names_the_cause_is_kept() {
        let listing = |reason| {
            format!(
                "libbpf: prog 'x': -- BEGIN PROG LOAD LOG --\n0: R1=ctx() R10=fp0\n{reason}\nprocessed 9 insns (limit 1000000)\n-- END PROG LOAD LOG --\n"
            )
        };
        let relocation = "failed to resolve CO-RE relocation <byte_off> [116] struct dentry.d_u.d_alias (0:2:0 @ offset 16)";
        let says = |text: &str| complaint(text);
        assert_eq!(says(&listing(relocation)), Some((2, relocation.to_owned())));
        let reason = "R2 invalid mem access 'scalar'";
        assert_eq!(says(&listing(reason)), Some((1, reason.to_owned())));
        assert_eq!(says(&listing("213: (95) exit")), None);
        assert_eq!(says("-- BEGIN PROG LOAD LOG --\nprocessed 0 insns\n"), None);
        let missing = "libbpf: prog 'fuse_request_send': failed to find kernel BTF type ID of 'fuse_request_send': -ESRCH\n";
        assert!(
            says(missing).is_some_and(|(says, text)| says == 0 && text.starts_with("prog 'fuse"))
        );
        assert_eq!(
            says("libbpf: prog 'x': BPF program load failed: -EINVAL\n"),
            None
        );
        assert_eq!(says("libbpf: failed to load object 'faultless'\n"), None);
        let foreign = says("libbpf: failed to \u{1b}[2J\n").expect("a complaint");
        assert!(!foreign.1.contains('\u{1b}'), "{foreign:?}");
    }

    #[test]
    fn fuse_as_a_module_is_used_by_root_and_missing_for_others() {
        let text = |tracepoint: bool| {
            move |path: &str| match path {
                "/proc/filesystems" => "nodev\tproc\nnodev\tfuse\n".to_owned(),
                _ if tracepoint => "0 t __traceiter_fuse_request_send\t[fuse]\n".to_owned(),
                _ => "0 t fuse_request_end\t[fuse]\n".to_owned(),
            }
        };
        let name = "fuse_request_send";
        let root = Modules::look(true, true, text(true));
        assert!(root.have(name) && root.fuse && !root.have("fuse_request"));
        let user = Modules::look(true, false, text(true));
        assert!(!user.have(name) && user.fuse);
        let old = Modules::look(true, true, text(false));
        assert!(!old.have(name) && old.fuse, "Linux 6.1");
        let none = Modules::look(false, true, |_| "nodev\tproc\n".to_owned());
        assert!(!none.have(name) && !none.fuse);
    }
}
