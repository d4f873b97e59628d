//! What keeps the bytes right while the world changes: leases, descriptors that the program closes, forks, and mappings that
//! the kernel takes back.

pub(crate) mod closing;
pub(crate) mod fork;
pub(crate) mod hand_back;
pub(crate) mod hooks;
pub(crate) mod keeper;
pub(crate) mod lease;
pub(crate) mod lend;
pub(crate) mod mmap;
pub(crate) mod moved;
pub(crate) mod opening;
pub(crate) mod page_cache;
