//! Watches.
mod model;
mod names;
mod privilege;
mod raw;
#[cfg(have_bpf)]
mod session;
mod timeline;
mod translate;
