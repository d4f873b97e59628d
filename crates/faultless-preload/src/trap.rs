//! `--compat`.
pub(crate) fn at_start() {}
