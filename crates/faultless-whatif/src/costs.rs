//! What things cost: each figure has a name, a unit and a source.
//!
//! `faultless whatif calibrate` measures them where it runs. The defaults are those of the machine that the project's figures come
//! from: a virtual machine with two processors, Linux 6.18.

use faultless_trace::Nanos;
use serde::{Deserialize, Serialize};

macro_rules! costs {
    ($($(#[doc = $doc:literal])* $name:ident: $default:literal, $source:literal;)*) => {
        /// Costs, in nanoseconds.
        #[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
        pub struct Costs {
            $($(#[doc = $doc])* pub $name: Nanos,)*
        }

        impl Default for Costs {
            fn default() -> Costs {
                Costs { $($name: $default,)* }
            }
        }

        impl Costs {
            /// Each cost: its name, its value in nanoseconds, what it is, and where its default comes from.
            pub fn explained(&self) -> Vec<(&'static str, Nanos, String, &'static str)> {
                vec![$((stringify!($name), self.$name, [$($doc),*].concat().trim().to_owned(), $source),)*]
            }

            /// A cost by its name, to be changed.
            pub fn named(&mut self, name: &str) -> Option<&mut Nanos> {
                let name = name.replace('-', "_");
                $(if name == stringify!($name) { return Some(&mut self.$name); })*
                None
            }
        }
    };
}

costs! {
    /// From one thread to another on a busy processor.
    context_switch: 1_500, "measured: two threads that hand a futex to and fro, pinned to one processor";
    /// From a wake-up to the first instruction on an idle processor (an interrupt, the exit from idle).
    wakeup: 6_000, "measured: the same on two processors, less the switch";
    /// What waking another thread costs the one who wakes.
    wake: 2_000, "measured: futex wake of a sleeping thread";
    /// What a thread may run before another one gets the processor.
    base_slice: 700_000, "kernel/sched/fair.c: a slice is that x (1 + log2 of the processors, at most 8)";
    /// How often the scheduler looks.
    tick: 4_000_000, "measured: how often the coarse clock moves (CONFIG_HZ=250)";
    /// Percent by which the same work takes longer or shorter, at most: caches, branches, interrupts.
    scatter: 30, "measured: touches of anonymous memory, one by one; without it threads that do the same fall into step";
    /// A cache line that another processor has written last: of a lock, a reference count.
    line: 60, "typical of one socket; 100 to 300 between sockets";
    /// Into the kernel and out of it, by a system call.
    syscall: 150, "measured: getppid";
    /// Into the kernel and out of it, by a fault.
    fault: 700, "measured: minor fault on a present page, less what the page costs";
    /// Looking a page of a file up in the page cache, and putting it into the page table.
    map_page: 600, "measured: fault on a page in the page cache, less `fault`";
    /// Each further page that a fault maps with it.
    map_around: 60, "typical of filemap_map_pages";
    /// A fresh page: taken, charged to the control group, put on a list, and into the page table or the page cache.
    alloc_page: 700, "measured: fault on anonymous memory, less `fault` and `zero_page`";
    /// Zeroing a page of 4 KiB.
    zero_page: 250, "measured: memset of a page that is not in a cache";
    /// Building and sending a request for a page: file system and block layer.
    submit_read: 4_500, "65 % (assumed) of what was measured: processor time of a major fault, less the rest of it; calibrate: io_submit";
    /// The interrupt that ends a read, on the processor of whoever waits.
    complete_read: 2_500, "35 % (assumed) of the same; calibrate: the same, less `submit_read`";
    /// The system call mmap, without locks.
    mmap: 1_300, "measured: mmap and munmap of one page";
    /// The system call munmap, without locks and pages.
    munmap: 1_500, "measured with mmap";
    /// Freeing a page at munmap.
    unmap_page: 120, "measured: munmap of 1 GiB that was touched, by page";
    /// Copying a page-table entry at fork, with the page's reference.
    fork_page: 45, "measured: fork with 1 GiB touched, by page";
    /// Copying a mapping at fork, without its pages.
    fork_vma: 600, "measured: fork with 16,000 mappings, less one without, by mapping; the child's end takes half as much";
    /// fork and the end of the child, without page tables.
    fork: 120_000, "measured: fork and wait of a small process";
    /// Taking a page-table entry of an inherited page apart, when the child ends.
    exit_page: 30, "measured: fork and wait with 1 GiB touched, less the fork, by page";
    /// Walking over a page for /proc/PID/smaps.
    smaps_page: 25, "measured: read of smaps_rollup, by page";
    /// Sending an interrupt to another processor, and waiting for its answer.
    ipi: 17_000, "measured: munmap of a page while another thread runs, less the same without";
    /// Each further processor of the same interrupt.
    ipi_more: 500, "typical: the requests are sent one after the other, the answers overlap";
    /// Answering it.
    ipi_handle: 1_500, "measured: what a thread that counts loses to each munmap of another one";
    /// Looking at a page-table entry, in calls that walk over memory without taking anything.
    walk_page: 3, "mm/pagewalk.c; typical";
    /// Punching a hole of a page into a file, without locks.
    punch: 8_000, "estimate: the journal of the file system";
    /// Taking a page off its list for reclaim, under the lock of the list.
    scan_page: 60, "estimate: isolate_lru_folios and back";
    /// Unmapping and dropping a page of the page cache, at reclaim.
    reclaim_page: 900, "estimate, from reads over a full control group";
    /// Delivering SIGBUS and returning from the handler.
    signal: 2_200, "65 % (assumed) of what was measured: a miss served from memory, less fault, read and copy; calibrate: a signal to oneself";
    /// Under the process's siglock, each of three times: force_sig, dequeue_signal, rt_sigreturn.
    siglock: 70, "estimate";
    /// Finding a place in a tree of locked ranges, under its spin lock.
    range_tree: 150, "estimate";
    /// mprotect of a mapping, without locks and pages.
    mprotect: 1_500, "measured: mprotect of a page";
    /// Changing the protection of a page that is mapped.
    mprotect_page: 15, "measured: mprotect of 64 MiB, by page";
    /// UFFDIO_COPY of a page.
    uffd_copy: 1_900, "measured: the ioctl alone";
    /// Each further page that the same call copies.
    uffd_copy_more: 1_300, "typical: 1.1 to 1.5 us in batches of 16";
    /// Reading an event of a userfaultfd, and waking the thread of it.
    uffd_event: 4_000, "measured: a fault that a monitor serves on the same processor, less faults, copy, read and switches";
    /// Work under the lock of a userfaultfd's wait queue, for each thread that waits in it.
    uffd_queue: 40, "estimate, from the fall of throughput between 1 and 256 threads on one descriptor";
    /// pread of a page with O_DIRECT, besides `submit_read` and `complete_read`.
    pread: 1_500, "measured: processor time of a direct read, less the rest";
    /// What the engine adds to a miss: its table, its buffers, its eviction.
    engine: 1_300, "35 % (assumed) of the same; calibrate: the same, less `signal`";
    /// What a reader does with a page that it has read.
    use_page: 900, "measured: checking every byte of a page";
}

impl Costs {
    /// Nothing costs anything: where orders and times alone matter.
    pub(crate) fn none() -> Costs {
        let mut costs = Costs::default();
        let names: Vec<&str> = costs.explained().iter().map(|c| c.0).collect();
        for name in names {
            *costs.named(name).expect("a cost of that name") = 0;
        }
        costs.scatter = 0;
        (costs.base_slice, costs.tick) = (700_000, 4_000_000);
        costs
    }

    /// What interrupting so many processors costs the sender.
    pub(crate) fn shootdown(&self, others: u32) -> Nanos {
        match others {
            0 => 0,
            n => self.ipi + u64::from(n - 1) * self.ipi_more,
        }
    }
}
