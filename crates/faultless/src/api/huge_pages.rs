//! Whether this kernel lets a map have huge pages.

use crate::base::error::Error;
use crate::base::text;
use faultless_sys::uffd;

/// Whether transparent huge pages are given to those who ask; and those of 2 MiB, where they have a file of their own.
const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const OF_2_MIB: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";

/// Fails if it does not, and says why.
pub(crate) fn check() -> Result<(), Error> {
    let refused = |remedy| {
        Err(Error::InvalidOption {
            what: "huge pages",
            value: "on".to_owned(),
            remedy,
        })
    };
    if !uffd::features().is_ok_and(|all| all & uffd::FEATURE_MOVE != 0) {
        return refused("the kernel lacks UFFDIO_MOVE; use Linux 6.8 or later, or leave them off");
    }
    if text::read(OF_2_MIB).is_ok_and(|modes| modes.contains("[never]")) {
        return refused(
            "the kernel gives none of 2 MiB; write inherit to /sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled, or leave them off",
        );
    }
    match text::read(THP) {
        Ok(modes) if modes.contains("[always]") || modes.contains("[madvise]") => Ok(()),
        _ => refused(
            "the kernel gives none; write madvise to /sys/kernel/mm/transparent_hugepage/enabled, or leave them off",
        ),
    }
}
