//! What files of the kernel's say, as text.

use std::io;

/// Reads a file of `/proc` or `/sys`.
#[cfg(not(faultless_sim))]
pub(crate) fn read(path: &str) -> io::Result<String> {
    faultless_untrusted::input::kernel_text(path)
}

/// What the simulated kernel's file says.
#[cfg(faultless_sim)]
pub(crate) fn read(path: &str) -> io::Result<String> {
    let text = faultless_sys::simulated::machine().text(path);
    text.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Where a link of `/proc` leads to.
#[cfg(not(faultless_sim))]
pub(crate) fn link(path: &str) -> io::Result<std::path::PathBuf> {
    std::fs::read_link(path)
}

/// Names of simulated files are not simulated.
#[cfg(faultless_sim)]
pub(crate) fn link(_: &str) -> io::Result<std::path::PathBuf> {
    Err(io::ErrorKind::NotFound.into())
}
