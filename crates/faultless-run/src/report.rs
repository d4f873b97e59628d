//! What a process says about itself when it ends.

use faultless_untrusted::input;
use faultless_untrusted::printable;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

/// One process's report: one line of JSON in the file of `--stats-json`. A process that executes another program, or is
/// asked by SIGUSR2, writes one for the time until then; the last of a `pid` and `program` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The process.
    pub pid: u32,
    /// Its program.
    #[serde(serialize_with = "lossy")]
    pub program: PathBuf,
    /// Why the report was written: `exit`, `exec`, or `asked`.
    pub reason: String,
    /// What serves misses; absent while nothing was taken over.
    pub backend: Option<String>,
    /// Nothing was taken over; the files are those that would have been.
    pub dry_run: bool,
    /// Sums over all that was taken over.
    pub totals: Totals,
    /// Files of which mappings were taken over.
    pub files: Vec<FileReport>,
    /// Mappings that were handed back to the kernel while the program used them, by reason.
    pub handed_back: Vec<HandedBack>,
    /// Mappings that were left to the kernel, by reason.
    pub left_alone: Vec<LeftAlone>,
    /// System calls that met an absent page in the kernel (EFAULT), by function.
    pub efaults: Vec<Efaults>,
    /// Whether calls that bypass the C library could be watched for EFAULT, which takes privilege.
    pub efaults_watched: bool,
}

/// Sums over all that a process took over.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Mappings that were taken over.
    pub mappings: u64,
    /// Their bytes.
    pub mapped_bytes: u64,
    /// Touches of absent pages.
    pub misses: u64,
    /// Pages that were read and installed.
    pub fills: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Pages given up to stay within the budget.
    pub evictions: u64,
    /// Fills that failed.
    pub errors: u64,
    /// How long fills took.
    pub fill_us: FillTimes,
    /// Budget of the process tree, in bytes.
    pub memory_tree_bytes: u64,
    /// This process's part of it now.
    pub memory_bytes: u64,
    /// What it uses of that.
    pub used_bytes: u64,
    /// The most that it used.
    pub peak_bytes: u64,
    /// Bytes that processes of the tree hold more than once: of each file, what they hold together less what the one that
    /// holds most of it does.
    pub duplicated_bytes: u64,
}

/// Quantiles of the time that a fill took, in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FillTimes {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// Mappings of one file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FileReport {
    /// The file, as it was called when it was first mapped.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// How the bytes stay the file's: by a `lease`, by the user's `trust`, or because the mapping is `live`, the kernel's own.
    pub coherence: String,
    /// What serves the mappings, the last one if they differ: `live` or `stand-in`.
    #[serde(default)]
    pub backend: String,
    /// Why it does.
    #[serde(default)]
    pub why: String,
    /// Mappings that were taken over.
    pub mappings: u64,
    /// Their bytes.
    pub mapped_bytes: u64,
    /// Touches of absent pages.
    pub misses: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes in memory now, of a stand-in.
    pub resident_bytes: u64,
    /// Pages of a live mapping that the kernel reclaimed, and whose markers were put back.
    #[serde(default)]
    pub put_back: u64,
}

/// Mappings handed back for one reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HandedBack {
    /// Why.
    pub reason: String,
    /// How many.
    pub mappings: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The longest time that readers of a part could be held up, in microseconds.
    pub longest_us: f64,
    /// One of the files.
    #[serde(serialize_with = "lossy")]
    pub example: PathBuf,
}

/// Mappings left to the kernel for one reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftAlone {
    /// Why.
    pub reason: String,
    /// How many.
    pub mappings: u64,
    /// Their bytes.
    pub bytes: u64,
    /// One of the files.
    #[serde(serialize_with = "lossy")]
    pub example: PathBuf,
}

/// System calls that met an absent page.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Efaults {
    /// The function, or the system call.
    pub call: String,
    /// How often.
    pub count: u64,
    /// Whether it was tried again with the page in place. If not, the program got EFAULT: `--compat` is for it.
    pub mended: bool,
}

/// A path as text: what is no UTF-8 in it becomes U+FFFD.
fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// Reads the reports in a file of `--stats-json`.
///
/// # Errors
///
/// The file cannot be read, or a line of it is no report.
pub fn read_reports(path: &Path) -> io::Result<Vec<Report>> {
    /// Bytes that a file of reports has at most: those of some hundred thousand processes.
    const MOST: u64 = 256 << 20;
    input::text(path, MOST)?
        .lines()
        .map(|line| serde_json::from_str(line).map_err(io::Error::other))
        .collect()
}

/// A number of bytes, with a unit that suits.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = if unit == 0 || value >= 100.0 { 0 } else { 1 };
        write!(f, "{value:.digits$} {}", UNITS[unit])
    }
}

impl Report {
    /// One line of JSON, without the newline.
    pub fn to_json(&self) -> String {
        faultless_untrusted::json(&serde_json::to_string(self).unwrap_or_default())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = printable(self.program.file_name().unwrap_or_default());
        writeln!(f, "faultless: {name}, process {}", self.pid)?;
        let t = &self.totals;
        let verb = if self.dry_run {
            "would be taken over"
        } else {
            "taken over"
        };
        writeln!(
            f,
            "  {verb}: {} mappings, {}",
            t.mappings,
            Size(t.mapped_bytes)
        )?;
        if !self.dry_run && t.mappings > 0 {
            write!(f, "  {} misses", t.misses)?;
            if t.memory_bytes == 0 {
                // All of them are live: the memory is the kernel's page cache.
                writeln!(f)?;
            } else {
                writeln!(
                    f,
                    ", {} read, {} evictions, {} errors; a fill took {:.0} µs (median), {:.0} µs (p99), {:.0} µs (longest)",
                    Size(t.read_bytes),
                    t.evictions,
                    t.errors,
                    t.fill_us.p50,
                    t.fill_us.p99,
                    t.fill_us.max
                )?;
                writeln!(
                    f,
                    "  memory: {} used, {} at most, of {} for this process and {} for all; held twice in the tree: {}",
                    Size(t.used_bytes),
                    Size(t.peak_bytes),
                    Size(t.memory_bytes),
                    Size(t.memory_tree_bytes),
                    Size(t.duplicated_bytes)
                )?;
            }
            if let Some(backend) = &self.backend {
                writeln!(f, "  backend: {backend}")?;
            }
        }
        for file in &self.files {
            writeln!(
                f,
                "    {} ({}): {} mappings, {}, {} misses",
                printable(&file.path),
                file.coherence,
                file.mappings,
                Size(file.mapped_bytes),
                file.misses
            )?;
            if !file.why.is_empty() {
                writeln!(
                    f,
                    "      {}: {}",
                    printable(&file.backend),
                    printable(&file.why)
                )?;
            }
        }
        for h in &self.handed_back {
            writeln!(
                f,
                "  handed back to the kernel: {} mappings, {}: {} (such as {}; longest hold-up {:.0} µs)",
                h.mappings,
                Size(h.bytes),
                printable(&h.reason),
                printable(&h.example),
                h.longest_us
            )?;
        }
        for l in &self.left_alone {
            writeln!(
                f,
                "  left to the kernel: {} mappings, {}: {} (such as {})",
                l.mappings,
                Size(l.bytes),
                printable(&l.reason),
                printable(&l.example)
            )?;
        }
        let mut mended = String::new();
        for e in &self.efaults {
            if e.mended {
                let _ = write!(mended, " {} ({})", printable(&e.call), e.count);
            } else {
                writeln!(
                    f,
                    "  {} returned EFAULT to the program {} times: it entered the kernel without the C library; try --compat",
                    printable(&e.call),
                    e.count
                )?;
            }
        }
        if !self.efaults_watched && !self.dry_run && t.mappings > 0 {
            writeln!(
                f,
                "  calls that bypass the C library were not watched for EFAULT: run as root, or with CAP_PERFMON"
            )?;
        }
        if !mended.is_empty() {
            writeln!(
                f,
                "  system calls that were given absent pages, and mended:{mended}"
            )?;
        }
        Ok(())
    }
}
