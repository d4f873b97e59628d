//! The page cache, and its reclaim: what is resident, what is being read, and what goes when room is needed.
//!
//! Pages are on two lists, as in `mm/vmscan.c`: a page begins on the inactive one; when it gets to its end it goes, unless it has been
//! touched: once, then it gets another round; twice, then it becomes active. The active list gives up its oldest pages while it is
//! the longer one. A page that is locked (being read, mapped, paged out) or waited for stays; a page that has been read and that nobody has
//! mapped yet has not been touched, and goes with the others: that is the page that is gone at the retry.

use crate::cpu::Tid;
use rustc_hash::FxHashMap;
use std::cell::RefCell;
use std::mem::take;

/// A page of a file, or of anonymous memory that has been swapped out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PageKey {
    pub(crate) object: u32,
    pub(crate) page: u64,
}

/// What the page cache says of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    Absent,
    /// Somebody reads it.
    Reading(u32),
    UpToDate(u32),
    /// Up to date, and locked: somebody maps it, or takes it out.
    Busy(u32),
}

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Page {
    key: PageKey,
    up_to_date: bool,
    /// Touches since it got on its list.
    touched: u8,
    /// It has been touched before its last round.
    referenced: bool,
    active: bool,
    /// The mapping whose page table it is in; further ones are in [`State::mappers`].
    mapper: u32,
    /// Somebody maps it, or takes it out.
    locked: bool,
    newer: u32,
    older: u32,
    waiters: Vec<Tid>,
    /// Threads that wait for it, or have waited and have not looked again: they hold references.
    pins: u32,
    /// Who reads it.
    reader: Tid,
    /// No other page has had it: a page-table entry that carries another stamp is of a page that has gone.
    stamp: u64,
}

impl Page {
    /// It is locked, or somebody has a reference to it.
    fn is_kept(&self) -> bool {
        !self.up_to_date || self.locked || self.pins > 0
    }
}

#[derive(Debug, Clone, Copy)]
struct List {
    newest: u32,
    oldest: u32,
    len: u64,
}

const EMPTY: List = List {
    newest: NONE,
    oldest: NONE,
    len: 0,
};

#[derive(Debug)]
struct State {
    pages: Vec<Page>,
    free: Vec<u32>,
    /// Mappings of pages that are in several page tables, but for the first.
    mappers: FxHashMap<u32, Vec<u32>>,
    by_key: FxHashMap<PageKey, u32>,
    /// Inactive, active.
    lists: [List; 2],
    /// Pages that are counted and are on no list: anonymous memory that is not swapped.
    others: u64,
    limit: u64,
    /// `memory.high`: who takes more is slowed down.
    high: u64,
    stamps: u64,
}

/// A page table that a page has to be taken out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Unmapped {
    /// The number of the mapping.
    pub(crate) vma: u32,
    pub(crate) page: u64,
    pub(crate) stamp: u64,
}

/// What reclaim has done.
#[derive(Debug, Default)]
pub(crate) struct Reclaimed {
    /// Pages that have gone.
    pub(crate) pages: u64,
    /// Pages that were looked at.
    pub(crate) scanned: u64,
    /// Page tables that they have to be taken out of.
    pub(crate) unmapped: Vec<Unmapped>,
}

/// The page cache of a machine, or of a control group.
#[derive(Debug)]
pub(crate) struct Cache {
    state: RefCell<State>,
}

impl State {
    fn unlink(&mut self, no: u32) {
        let (newer, older, active) = {
            let p = &self.pages[no as usize];
            (p.newer, p.older, p.active)
        };
        let list = &mut self.lists[usize::from(active)];
        list.len -= 1;
        if newer == NONE {
            list.newest = older;
        }
        if older == NONE {
            list.oldest = newer;
        }
        if newer != NONE {
            self.pages[newer as usize].older = older;
        }
        if older != NONE {
            self.pages[older as usize].newer = newer;
        }
    }

    fn link(&mut self, no: u32, active: bool) {
        let list = &mut self.lists[usize::from(active)];
        let newest = list.newest;
        list.newest = no;
        list.len += 1;
        if newest == NONE {
            list.oldest = no;
        } else {
            self.pages[newest as usize].newer = no;
        }
        let p = &mut self.pages[no as usize];
        (p.newer, p.older, p.active) = (NONE, newest, active);
    }

    fn used(&self) -> u64 {
        self.by_key.len() as u64 + self.others
    }

    fn remove(&mut self, no: u32, unmapped: &mut Vec<Unmapped>) {
        self.unlink(no);
        let page = &mut self.pages[no as usize];
        let key = page.key;
        if page.mapper != NONE {
            let stamp = page.stamp;
            let of = |vma| Unmapped {
                vma,
                page: key.page,
                stamp,
            };
            unmapped.push(of(page.mapper));
            let more = self.mappers.remove(&no).unwrap_or_default();
            unmapped.extend(more.into_iter().map(of));
        }
        self.by_key.remove(&key);
        self.free.push(no);
    }
}

impl Cache {
    /// With room for so many pages.
    pub(crate) fn new(limit: u64, high: Option<u64>) -> Cache {
        Cache {
            state: RefCell::new(State {
                pages: Vec::new(),
                free: Vec::new(),
                mappers: FxHashMap::default(),
                by_key: FxHashMap::default(),
                lists: [EMPTY; 2],
                others: 0,
                limit,
                high: high.unwrap_or(u64::MAX),
                stamps: 0,
            }),
        }
    }

    pub(crate) fn find(&self, key: PageKey) -> Found {
        let s = self.state.borrow();
        match s.by_key.get(&key) {
            None => Found::Absent,
            Some(&no) => match &s.pages[no as usize] {
                p if !p.up_to_date => Found::Reading(no),
                p if p.locked => Found::Busy(no),
                _ => Found::UpToDate(no),
            },
        }
    }

    /// Who reads a page.
    pub(crate) fn reader(&self, no: u32) -> Tid {
        self.state.borrow().pages[no as usize].reader
    }

    /// Puts a page there, locked; it will be read.
    pub(crate) fn insert(&self, key: PageKey, reader: Tid) -> u32 {
        let s = &mut *self.state.borrow_mut();
        s.stamps += 1;
        let page = Page {
            stamp: s.stamps,
            pins: 0,
            key,
            up_to_date: false,
            touched: 0,
            referenced: false,
            active: false,
            mapper: NONE,
            locked: false,
            newer: NONE,
            older: NONE,
            waiters: Vec::new(),
            reader,
        };
        let no = match s.free.pop() {
            Some(no) => {
                s.pages[no as usize] = page;
                no
            }
            None => {
                s.pages.push(page);
                s.pages.len() as u32 - 1
            }
        };
        let before = s.by_key.insert(key, no);
        assert!(before.is_none(), "a page is in the cache twice");
        s.link(no, false);
        no
    }

    /// A page has been read. Who is to be woken.
    pub(crate) fn read(&self, no: u32) -> Vec<Tid> {
        let s = &mut *self.state.borrow_mut();
        let page = &mut s.pages[no as usize];
        assert!(!page.up_to_date, "a page is read twice");
        page.up_to_date = true;
        take(&mut page.waiters)
    }

    /// Whether somebody reads a page, or has locked it.
    pub(crate) fn is_locked(&self, no: u32) -> bool {
        let page = &self.state.borrow().pages[no as usize];
        !page.up_to_date || page.locked
    }

    /// Locks a page that is up to date.
    pub(crate) fn lock(&self, no: u32) {
        let page = &mut self.state.borrow_mut().pages[no as usize];
        assert!(page.up_to_date && !page.locked, "a page is locked twice");
        page.locked = true;
    }

    /// Unlocks it. Who is to be woken.
    pub(crate) fn unlock(&self, no: u32) -> Vec<Tid> {
        let page = &mut self.state.borrow_mut().pages[no as usize];
        assert!(page.locked, "a page is unlocked twice");
        page.locked = false;
        take(&mut page.waiters)
    }

    /// Takes a reference to a page: it stays until that is given back.
    pub(crate) fn pin(&self, no: u32) {
        self.state.borrow_mut().pages[no as usize].pins += 1;
    }

    /// Gives a reference back.
    pub(crate) fn unpin(&self, no: u32) {
        self.state.borrow_mut().pages[no as usize].pins -= 1;
    }

    /// Has a thread woken when the page is read.
    pub(crate) fn wait(&self, no: u32, t: Tid) {
        let s = &mut *self.state.borrow_mut();
        let waiters = &mut s.pages[no as usize].waiters;
        if !waiters.contains(&t) {
            waiters.push(t);
        }
    }

    /// A page gets into the page table of a mapping, and is touched or not. Its stamp.
    pub(crate) fn map(&self, no: u32, vma: u32, touched: bool) -> u64 {
        let s = &mut *self.state.borrow_mut();
        let page = &mut s.pages[no as usize];
        if page.mapper == NONE {
            page.mapper = vma;
        } else if page.mapper != vma {
            let more = s.mappers.entry(no).or_default();
            if !more.contains(&vma) {
                more.push(vma);
            }
        }
        page.touched = (page.touched + u8::from(touched)).min(2);
        page.stamp
    }

    /// A page is taken out of the page table of a mapping.
    pub(crate) fn unmap(&self, key: PageKey, stamp: u64, vma: u32) {
        let s = &mut *self.state.borrow_mut();
        let Some(&no) = s.by_key.get(&key) else {
            return;
        };
        let page = &mut s.pages[no as usize];
        if page.stamp != stamp {
            return;
        }
        if page.mapper != vma {
            if let Some(more) = s.mappers.get_mut(&no) {
                more.retain(|&m| m != vma);
            }
            return;
        }
        page.mapper = NONE;
        if let Some(more) = s.mappers.get_mut(&no) {
            page.mapper = more.pop().unwrap_or(NONE);
            if more.is_empty() {
                s.mappers.remove(&no);
            }
        }
    }

    /// Touches a page through a page-table entry; whether that is still of this page.
    pub(crate) fn touch_mapped(&self, key: PageKey, stamp: u64) -> bool {
        let s = &mut *self.state.borrow_mut();
        let Some(&no) = s.by_key.get(&key) else {
            return false;
        };
        let page = &mut s.pages[no as usize];
        if page.stamp != stamp {
            return false;
        }
        page.touched = page.touched.max(1);
        true
    }

    /// Has a page be there, up to date, or not be there; unless somebody reads it just now.
    pub(crate) fn set(&self, key: PageKey, there: bool, t: Tid) -> Vec<Unmapped> {
        match (self.find(key), there) {
            (Found::Absent, true) => {
                let no = self.insert(key, t);
                self.read(no);
            }
            (Found::UpToDate(_), false) => return self.drop_page(key),
            _ => {}
        }
        Vec::new()
    }

    /// Takes a page out that is not locked. The page tables that it has to be taken out of, too.
    pub(crate) fn drop_page(&self, key: PageKey) -> Vec<Unmapped> {
        let s = &mut *self.state.borrow_mut();
        let mut unmapped = Vec::new();
        if let Some(&no) = s.by_key.get(&key)
            && !s.pages[no as usize].is_kept()
        {
            s.remove(no, &mut unmapped);
        }
        unmapped
    }

    /// Pages that are not in the cache: anonymous ones.
    pub(crate) fn anonymous(&self) -> u64 {
        self.state.borrow().others
    }

    /// So many more of these, or fewer.
    pub(crate) fn count(&self, pages: i64) {
        let s = &mut *self.state.borrow_mut();
        s.others = s
            .others
            .checked_add_signed(pages)
            .expect("as many freed as taken");
    }

    /// Pages over `memory.high`, and that.
    pub(crate) fn over_high(&self) -> (u64, u64) {
        let s = self.state.borrow();
        (s.used().saturating_sub(s.high), s.high)
    }

    /// Pages over the limit, if so many more are taken.
    pub(crate) fn excess(&self, more: u64) -> u64 {
        let s = self.state.borrow();
        (s.used() + more).saturating_sub(s.limit)
    }

    /// Room for so many pages.
    pub(crate) fn limit(&self) -> u64 {
        self.state.borrow().limit
    }

    /// Whether there is a `memory.high`.
    pub(crate) fn has_high(&self) -> bool {
        self.state.borrow().high < u64::MAX
    }

    /// Pages that can still be taken.
    pub(crate) fn room(&self) -> u64 {
        let s = self.state.borrow();
        s.limit.saturating_sub(s.used())
    }

    /// Gives pages up, the oldest first.
    pub(crate) fn reclaim(&self, wanted: u64) -> Reclaimed {
        let s = &mut *self.state.borrow_mut();
        let mut did = Reclaimed::default();
        // Each page is looked at twice at most.
        let looks = 2 * (s.lists[0].len + s.lists[1].len);
        while did.pages < wanted && did.scanned < looks {
            did.scanned += 1;
            if s.lists[1].len > s.lists[0].len {
                let no = s.lists[1].oldest;
                s.unlink(no);
                let page = &mut s.pages[no as usize];
                (page.touched, page.referenced) = (0, false);
                s.link(no, false);
            }
            let no = s.lists[0].oldest;
            if no == NONE {
                break;
            }
            let page = &s.pages[no as usize];
            if page.is_kept() || page.touched > 0 {
                let active = page.touched > 1 || (page.touched > 0 && page.referenced);
                s.unlink(no);
                let page = &mut s.pages[no as usize];
                page.referenced = page.touched > 0;
                page.touched = 0;
                s.link(no, active);
                continue;
            }
            s.remove(no, &mut did.unmapped);
            did.pages += 1;
        }
        did
    }

    /// Every page is on a list or free, and none is referred to by nobody.
    pub(crate) fn check(&self) {
        let s = self.state.borrow();
        let listed = s.lists[0].len + s.lists[1].len;
        assert_eq!(listed, s.by_key.len() as u64, "a page is on no list");
        assert_eq!(
            listed + s.free.len() as u64,
            s.pages.len() as u64,
            "a page is lost"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(page: u64) -> PageKey {
        PageKey { object: 0, page }
    }

    fn read(cache: &Cache, page: u64) -> u32 {
        let no = cache.insert(key(page), Tid(0));
        cache.read(no);
        no
    }

    #[test]
    fn what_nobody_has_touched_goes_first_and_what_is_read_stays() {
        let cache = Cache::new(4, None);
        let locked = cache.insert(key(0), Tid(0));
        let touched = read(&cache, 1);
        cache.map(touched, 5, true);
        cache.map(touched, 6, false);
        cache.map(touched, 7, false);
        read(&cache, 2);
        assert_eq!(cache.excess(2), 1);
        let did = cache.reclaim(1);
        assert_eq!((did.pages, did.unmapped), (1, vec![]));
        assert_eq!(cache.find(key(2)), Found::Absent);
        assert_eq!(cache.find(key(0)), Found::Reading(locked));
        assert_eq!(cache.find(key(1)), Found::UpToDate(touched));
        let stamp = cache.map(touched, 5, false);
        cache.unmap(key(1), stamp, 5);
        // It has had its round; the page tables that it is still in are told.
        let mut did = cache.reclaim(1);
        did.unmapped.sort_unstable();
        let vmas: Vec<u32> = did.unmapped.iter().map(|u| u.vma).collect();
        assert_eq!((did.pages, vmas), (1, vec![6, 7]));
        assert_eq!(cache.find(key(1)), Found::Absent);
        assert_eq!(cache.reclaim(1).pages, 0);
        cache.check();
    }

    #[test]
    fn what_is_touched_often_outlives_a_scan() {
        let cache = Cache::new(64, None);
        let hot = read(&cache, 1_000_000);
        let stamp = cache.map(hot, 1, true);
        for page in 0..10_000 {
            if cache.excess(1) > 0 {
                cache.reclaim(8);
            }
            read(&cache, page);
            if page % 16 == 0 {
                assert!(cache.touch_mapped(key(1_000_000), stamp), "gone at {page}");
            }
        }
        cache.check();
    }

    #[test]
    fn a_page_table_entry_of_a_page_that_went_is_of_no_use_when_it_is_back() {
        let cache = Cache::new(8, None);
        let no = read(&cache, 7);
        let stamp = cache.map(no, 1, true);
        cache.reclaim(1);
        cache.reclaim(1);
        assert_eq!(cache.find(key(7)), Found::Absent);
        read(&cache, 7);
        assert!(!cache.touch_mapped(key(7), stamp));
    }
}
