//! Names for numbers: kernel functions, file systems by device, system calls.

use faultless_untrusted::input::kernel_text;
use std::collections::HashMap;

/// The kernel's functions, by address.
#[derive(Debug, Default)]
pub(crate) struct Symbols {
    /// Where each function begins, and where its name ends in `names`; in order of addresses.
    starts: Vec<(u64, u32)>,
    names: String,
}

impl Symbols {
    /// Reads `/proc/kallsyms`. Empty where this user may not see addresses.
    pub(crate) fn of_this_kernel() -> Symbols {
        Self::parse(&std::fs::read_to_string("/proc/kallsyms").unwrap_or_default())
    }

    fn parse(text: &str) -> Symbols {
        let mut all: Vec<(u64, &str)> = text
            .lines()
            .filter_map(|line| {
                let mut parts = line.split_ascii_whitespace();
                let address = u64::from_str_radix(parts.next()?, 16).ok()?;
                let kind = parts.next()?;
                let name = parts.next()?;
                let is_function = matches!(kind, "t" | "T" | "w" | "W");
                (address != 0 && is_function).then_some((address, name))
            })
            .collect();
        all.sort_unstable();
        let mut symbols = Symbols::default();
        for (address, name) in all {
            symbols.names.push_str(name);
            symbols.starts.push((address, symbols.names.len() as u32));
        }
        symbols.starts.shrink_to_fit();
        symbols.names.shrink_to_fit();
        symbols
    }

    /// The function that an address lies in, without what a compiler adds to its name.
    pub(crate) fn function(&self, address: u64) -> String {
        let after = self.starts.partition_point(|&(start, _)| start <= address);
        let Some(no) = after.checked_sub(1) else {
            return format!("{address:#x}");
        };
        let from = no.checked_sub(1).map_or(0, |before| self.starts[before].1);
        let name = &self.names[from as usize..self.starts[no].1 as usize];
        name.split('.').next().unwrap_or(name).to_owned()
    }
}

/// Where file systems are mounted, by device.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    /// By device: mount point, and which directory of the file system is there.
    points: HashMap<(u32, u32), Vec<(String, String)>>,
}

impl Mounts {
    /// As a process sees them, or as this one does.
    pub(crate) fn of(pid: Option<u32>) -> Mounts {
        let own = || kernel_text("/proc/self/mountinfo");
        let text = match pid {
            Some(pid) => kernel_text(format!("/proc/{pid}/mountinfo")).or_else(|_| own()),
            None => own(),
        };
        Self::parse(&text.unwrap_or_default())
    }

    fn parse(text: &str) -> Mounts {
        let mut mounts = Mounts::default();
        for line in text.split('\n') {
            // (Other white space is a part of the names.)
            let mut parts = line.split(' ').skip(2);
            let (Some(device), Some(root), Some(point)) =
                (parts.next(), parts.next(), parts.next())
            else {
                continue;
            };
            let Some((major, minor)) = device.split_once(':') else {
                continue;
            };
            if let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) {
                let at = mounts.points.entry((major, minor)).or_default();
                at.push((unescape(root), unescape(point)));
            }
        }
        mounts
    }

    /// The path of a file, given its path from its file system's root; that path, where the mount is not known.
    pub(crate) fn path(&self, device: u32, from_root: &str) -> String {
        let known = self.points.get(&(device >> 20, device & 0xf_ffff));
        let mut best: Option<(&str, &str)> = None;
        for (root, point) in known.into_iter().flatten() {
            let inside = match root.as_str() {
                "/" => Some(from_root),
                root => from_root
                    .strip_prefix(root)
                    .filter(|rest| rest.is_empty() || rest.starts_with('/')),
            };
            if let Some(inside) = inside
                && best.is_none_or(|(b, _)| inside.len() < b.len())
            {
                best = Some((inside, point));
            }
        }
        match best {
            Some((inside, "/")) => inside.to_owned(),
            Some((inside, point)) => format!("{point}{inside}"),
            None => from_root.to_owned(),
        }
    }
}

/// mountinfo writes spaces and the like as octal.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let code = (bytes[i] == b'\\')
            .then(|| bytes.get(i + 1..i + 4))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The name of a system call of x86-64.
pub(crate) fn call(number: u16) -> String {
    syscalls::x86_64::Sysno::new(number.into()).map_or_else(
        || format!("system call {number}"),
        |call| call.name().to_owned(),
    )
}

/// Whether a kernel stack is that of a thread which wants to change a VMA, and waits for the users of the VMA's own lock.
pub(crate) fn waits_for_vma(functions: &[String]) -> bool {
    const WRITERS: [&str; 5] = [
        "vma_start_write",
        "vma_mark_detached",
        "vma_enter_locked",
        "vma_start_exclude_readers",
        "vma_exclude_readers",
    ];
    let writes = |f: &String| WRITERS.iter().any(|w| f.contains(w));
    functions.iter().any(writes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_vma_is_told_by_its_stack() {
        let waits = |functions: &[&str]| {
            let functions: Vec<String> = functions.iter().map(|&f| f.to_owned()).collect();
            waits_for_vma(&functions)
        };
        // As Linux 6.18 and 7.3 have them.
        for inner in [
            "__vma_start_write",
            "__vma_enter_locked",
            "__vma_start_exclude_readers",
            "__vma_exclude_readers_for_detach",
            "vma_mark_detached",
        ] {
            assert!(waits(&[
                "__schedule",
                "schedule",
                inner,
                "do_vmi_align_munmap"
            ]));
        }
        assert!(!waits(&[
            "__schedule",
            "schedule",
            "io_schedule",
            "folio_wait_bit_common"
        ]));
        assert!(!waits(&[
            "__schedule",
            "rwsem_down_write_slowpath",
            "down_write",
            "dup_mmap"
        ]));
        assert!(!waits(&[]));
    }

    #[test]
    fn functions_are_found_by_any_address_in_them() {
        let symbols = Symbols::parse(
            "ffffffff81000000 T first\nffffffff81000100 t second.isra.0\nffffffff81000180 d data\n0000000000000000 T hidden\n",
        );
        assert_eq!(symbols.function(0xffff_ffff_8100_0000), "first");
        assert_eq!(symbols.function(0xffff_ffff_8100_00ff), "first");
        assert_eq!(symbols.function(0xffff_ffff_8100_0190), "second");
        assert_eq!(symbols.function(16), "0x10");
        assert_eq!(Symbols::default().function(16), "0x10");
    }

    #[test]
    fn paths_get_their_mount_point() {
        let mounts = Mounts::parse(
            "22 1 253:0 / / rw - ext4 /dev/vda rw\n\
             23 22 0:40 / /mnt/a\\040b rw - fuse x rw\n\
             24 22 8:1 /sub /data rw - ext4 /dev/sda1 rw\n",
        );
        assert_eq!(mounts.path(253 << 20, "/var/x"), "/var/x");
        assert_eq!(mounts.path(40, "/f"), "/mnt/a b/f");
        assert_eq!(mounts.path((8 << 20) | 1, "/sub/f"), "/data/f");
        assert_eq!(mounts.path((8 << 20) | 1, "/subway/f"), "/subway/f");
        assert_eq!(mounts.path(7, "/f"), "/f");
    }

    #[test]
    fn calls_have_names() {
        assert_eq!(call(11), "munmap");
        assert_eq!(call(9999), "system call 9999");
    }

    #[test]
    fn no_text_of_mounts_is_too_much() {
        let text = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
            37 35 0:5 / /a\\040b rw - tmpfs none rw\n";
        faultless_untrusted::fuzz::run("mountinfo", &[text.into()], |bytes, _| {
            let mounts = Mounts::parse(&String::from_utf8_lossy(bytes));
            let _ = mounts.path(98 << 20, "/mnt1/x");
            let _ = mounts.path(5, "/x");
        });
    }
}
