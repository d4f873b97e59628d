//! Files that are written, and plain tables.

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use faultless_untrusted::output::{Kept, Output, Readers, Writer};
use faultless_untrusted::printable;
use std::path::Path;

/// Begins a file that has its name only when it is complete.
pub(crate) fn create(path: &Path, readers: Readers) -> anyhow::Result<(Output, Writer)> {
    Output::create(path, readers, Kept::IfWhole)
        .with_context(|| format!("cannot write {}", printable(path)))
}

/// A value as JSON for standard output, with the end of a line.
pub(crate) fn json(value: &impl serde::Serialize) -> serde_json::Result<String> {
    let mut text = faultless_untrusted::json(&serde_json::to_string_pretty(value)?);
    text.push('\n');
    Ok(text)
}

// ---- Tables ----

pub(crate) fn table(header: &[&str]) -> Table {
    let mut t = Table::new();
    t.load_preset(presets::NOTHING);
    t.set_header(header.iter().copied());
    t
}

/// All columns but the first so many are numbers.
pub(crate) fn right_align(t: &mut Table, from: usize) {
    for column in t.column_iter_mut().skip(from) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

pub(crate) fn percent(part: f64, whole: f64) -> String {
    if whole <= 0.0 {
        return "–".to_owned();
    }
    format!("{:.1} %", 100.0 * part / whole)
}
