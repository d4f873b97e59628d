//! Files that have their name only when they are whole, and plain tables.

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// What becomes of a file that could not be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    IfWhole,
    /// A part is of use as well: it stays, with `.partial` at the end of its name.
    InPart,
}

/// A file that has its name only when it is complete.
pub(crate) struct Output {
    path: PathBuf,
    /// None: it is written in its place.
    partial: Option<PathBuf>,
    pub(crate) kept: Kept,
}

pub(crate) type File = std::io::BufWriter<std::fs::File>;

impl Output {
    pub(crate) fn create(path: &Path, kept: Kept) -> anyhow::Result<(Output, File)> {
        let cannot = || format!("cannot write {}", path.display());
        let buffered = |file| std::io::BufWriter::with_capacity(1 << 18, file);
        // A link's target is meant, not the link; and a device or a pipe is written as it is.
        let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if path.exists() && !path.is_file() {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(path)
                .with_context(cannot)?;
            let output = Output {
                path: path.clone(),
                partial: None,
                kept,
            };
            return Ok((output, buffered(file)));
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        // What somebody else may have put there is not followed.
        let _ = std::fs::remove_file(&partial);
        let file = std::fs::File::create_new(&partial).with_context(cannot)?;
        let output = Output {
            path: path.clone(),
            partial: Some(partial),
            kept,
        };
        Ok((output, buffered(file)))
    }

    /// Gives it its name, if it was written.
    pub(crate) fn finish(mut self, written: std::io::Result<File>) -> anyhow::Result<()> {
        let named = written
            .and_then(|mut file| file.flush())
            .and_then(|()| match &self.partial {
                Some(partial) => std::fs::rename(partial, &self.path),
                None => Ok(()),
            });
        if named.is_ok() {
            self.partial = None;
        }
        named.with_context(|| match (&self.partial, self.kept) {
            (Some(partial), Kept::InPart) => format!(
                "cannot write {}; what there is of it is in {}",
                self.path.display(),
                partial.display()
            ),
            _ => format!("cannot write {}", self.path.display()),
        })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let (Some(partial), Kept::IfWhole) = (&self.partial, self.kept) {
            let _ = std::fs::remove_file(partial);
        }
    }
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
