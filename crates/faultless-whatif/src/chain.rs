//! Who waits for whom: the worst wait of a run, as a chain in words.

use crate::cpu::Tid;
use crate::kernel::{Kernel, On};
use faultless_trace::Nanos;
use serde::Serialize;

/// Links that are told.
const LINKS_MAX: usize = 6;

/// The longest wait for `mmap_lock`, with what it was behind.
#[derive(Debug, Clone, Serialize)]
pub struct Chain {
    /// How long the first one had waited when it was looked at, in milliseconds.
    pub waited_ms: f64,
    /// When, from the beginning of the run, in milliseconds.
    pub at_ms: f64,
    /// How many others waited for such a lock.
    pub others: u64,
    /// One link after the other.
    pub links: Vec<String>,
    #[serde(skip)]
    waited: Nanos,
}

impl std::fmt::Display for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.links.join("; "))
    }
}

/// Looks at the longest wait for `mmap_lock` or for ranges just now, and keeps it if there has been none like it.
pub(crate) fn sample(k: &Kernel) {
    if !k.stats.counts() {
        return;
    }
    let now = k.cpu.now();
    let waiting = k.waiting.borrow();
    let is_lock = |on: &On| matches!(on, On::MmapLock { .. } | On::Range { .. });
    let mut longest: Option<(Tid, Nanos)> = None;
    let mut others = 0;
    for (no, wait) in waiting.iter().enumerate() {
        let Some((on, since)) = wait else { continue };
        if !is_lock(on) {
            continue;
        }
        others += 1;
        let so_far = now - since;
        if longest.is_none_or(|l| so_far > l.1) {
            longest = Some((Tid(no as u32), so_far));
        }
    }
    let Some((first, waited)) = longest else {
        return;
    };
    if k.stats
        .chain
        .borrow()
        .as_ref()
        .is_some_and(|c| c.waited >= waited)
    {
        return;
    }
    drop(waiting);
    *k.stats.chain.borrow_mut() = Some(Chain {
        waited_ms: waited as f64 / 1e6,
        at_ms: now as f64 / 1e6,
        others: others - 1,
        links: links(k, first),
        waited,
    });
}

fn links(k: &Kernel, first: Tid) -> Vec<String> {
    let name = |t: Tid| format!("{} {} ({})", k.stats.group_of(t), t.0, k.does(t));
    let mut all = Vec::new();
    let mut seen = vec![first];
    let mut t = first;
    while all.len() < LINKS_MAX {
        let waiting = k.waiting.borrow()[t.index()].clone();
        let Some((on, since)) = waiting else {
            let how = if k.cpu.is_running(t) {
                "runs"
            } else {
                "waits for a processor"
            };
            all.push(format!("{} {how}", name(t)));
            break;
        };
        let ms = (k.cpu.now() - since) as f64 / 1e6;
        let (what, next) = match on {
            On::MmapLock { mm, write } => {
                let holders = mm.mmap_lock.holders();
                let next = holders.first().copied();
                let queued = mm.mmap_lock.queued_writer().filter(|&w| w != t && !write);
                let mut what = format!(
                    "the mmap_lock of {} for {}",
                    mm.name,
                    if write { "writing" } else { "reading" }
                );
                if let (Some(writer), Some(holder)) = (queued, next)
                    && !mm.mmap_lock.is_written()
                {
                    what.push_str(&format!(
                        ", behind {} that is queued to write behind {}",
                        name(writer),
                        name(holder)
                    ));
                } else if let Some(holder) = next {
                    what.push_str(&format!(", which {} holds", name(holder)));
                }
                (what, next)
            }
            On::Vma { vma } => {
                let inside = vma.readers();
                let what = format!(
                    "the lock of VMA {}, where {} faults are going on",
                    vma.no,
                    inside.len()
                );
                (what, inside.first().copied())
            }
            On::Page(_) => ("a page to be read from storage".to_owned(), None),
            On::Inode { vma, write } => {
                let holders = vma.inode.as_ref().map_or_else(Vec::new, |i| i.holders());
                let what = format!(
                    "the invalidate_lock of the file of VMA {} for {}",
                    vma.no,
                    if write { "writing" } else { "reading" }
                );
                (what, holders.first().copied())
            }
            On::Range { mm, .. } => {
                let holder = mm.ranges.in_the_way_of(t);
                let what = match holder {
                    Some(holder) => format!("a range that {} holds or waits for", name(holder)),
                    None => "a range".to_owned(),
                };
                (what, holder)
            }
            On::Monitor => ("a monitor thread of the userfaultfd".to_owned(), None),
            On::Work => ("something to do".to_owned(), None),
        };
        all.push(format!("{} has waited {ms:.1} ms for {what}", name(t)));
        match next {
            Some(next) if !seen.contains(&next) => {
                seen.push(next);
                t = next;
            }
            _ => break,
        }
    }
    all
}
