//! What the user wants, on its way through the environment.

use glob::{MatchOptions, Pattern};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The environment variable that carries the [`Settings`], as JSON.
pub const VARIABLE: &str = "FAULTLESS_RUN";

/// How files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reads {
    /// Through the page cache if half of the mapping is there already, directly otherwise.
    #[default]
    Auto,
    /// Directly, where the file system can.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// What serves the mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// What suits the kernel and the mapping.
    #[default]
    Auto,
    /// The kernel's own mappings, with guard markers where pages are absent.
    Live,
    /// Maps of the engine's in their place.
    StandIn,
}

/// The settings of one `faultless run`, shared by the whole tree of processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// What serves the mappings.
    #[serde(default)]
    pub backend: Backend,
    /// Memory budget of the whole tree, in bytes.
    pub memory: u64,
    /// Whether the user has asked for that budget.
    #[serde(default)]
    pub budget: bool,
    /// Smallest mapping that is taken over, in bytes.
    pub min_size: u64,
    /// Files for whose bytes the user vouches: no lease is taken.
    #[serde(default)]
    pub trust: Vec<String>,
    /// If not empty: only these files.
    #[serde(default)]
    pub only: Vec<String>,
    /// Not these files.
    #[serde(default)]
    pub skip: Vec<String>,
    /// How files are read.
    #[serde(default)]
    pub reads: Reads,
    /// Each process says on stderr what it did, when it ends and on SIGUSR2.
    #[serde(default)]
    pub stats: bool,
    /// Each process appends its report, one line of JSON, to this file.
    #[serde(default)]
    pub stats_json: Option<PathBuf>,
    /// Its device and inode: another file of that name is not written to.
    #[serde(default)]
    pub stats_file: Option<(u64, u64)>,
    /// Nothing is taken over; the reports say what would have been.
    #[serde(default)]
    pub dry_run: bool,
    /// System calls that bypass the C library are served too.
    #[serde(default)]
    pub compat: bool,
    /// With `compat`: where the page lies whose calls the filter lets pass.
    #[serde(default)]
    pub gate: usize,
    /// Also mappings that promise no gain are taken over.
    #[serde(default)]
    pub eager: bool,
    /// No leases are taken: only files that `trust` names, and those that nobody can write, are taken over.
    #[serde(default)]
    pub no_lease: bool,
    /// What the seccomp filters of the command let through.
    #[serde(default)]
    pub sandbox: crate::Sandbox,
    /// Path of the library, as in `LD_PRELOAD`.
    #[serde(default)]
    pub library: PathBuf,
    /// System calls whose EFAULT can be counted, with the numbers of their tracepoints. Empty where this user may not.
    #[serde(default)]
    pub efault_tracepoints: Vec<(String, u64)>,
    /// The processes that share the budget.
    pub tree: crate::tree::Tree,
}

impl Settings {
    /// For the environment.
    ///
    /// # Errors
    ///
    /// A path is not Unicode.
    pub fn encode(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }

    /// From the environment.
    ///
    /// # Errors
    ///
    /// It is not what [`encode`](Self::encode) made.
    pub fn decode(text: &str) -> serde_json::Result<Settings> {
        serde_json::from_str(text)
    }
}

/// The first of some patterns that is none, and why.
pub fn first_bad<'a>(
    mut patterns: impl Iterator<Item = &'a String>,
) -> Option<(&'a String, glob::PatternError)> {
    patterns.find_map(|text| Some((text, Pattern::new(text).err()?)))
}

/// Whether a file's path matches one of some patterns. A pattern without a slash is about the file's name alone; `*`
/// stands for slashes, too.
pub fn matches(patterns: &[String], path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    patterns.iter().any(|text| {
        let Ok(pattern) = Pattern::new(text) else {
            return false;
        };
        let subject = if text.contains('/') {
            path
        } else {
            Path::new(name)
        };
        pattern.matches_path_with(subject, MatchOptions::new())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_about_names_or_whole_paths() {
        let yes = |pattern: &str, path: &str| matches(&[pattern.to_owned()], Path::new(path));
        assert!(yes("*", "/data/a/b.idx"));
        assert!(yes("*.idx", "/data/a/b.idx"));
        assert!(!yes("*.idx", "/data/a.idx/b.dat"));
        assert!(yes("/data/*", "/data/a/b.idx"), "* goes over slashes");
        assert!(yes("/data/**/*.idx", "/data/a/b.idx"));
        assert!(!yes("/other/*", "/data/a/b.idx"));
        assert!(!matches(&[], Path::new("/data/a")));
    }

    #[test]
    fn settings_survive_the_environment() {
        let settings = Settings {
            backend: Backend::Live,
            memory: 1 << 30,
            budget: true,
            min_size: 1 << 20,
            trust: vec!["*\"quoted\"".into()],
            only: vec![],
            skip: vec!["/a b/*".into()],
            reads: Reads::Buffered,
            stats: true,
            stats_json: Some("/tmp/a.json".into()),
            stats_file: Some((1, 2)),
            dry_run: false,
            compat: true,
            gate: 0x1000_0000_0000,
            efault_tracepoints: vec![("write".into(), 7)],
            eager: true,
            no_lease: true,
            sandbox: crate::Sandbox::default(),
            library: "l".into(),
            tree: crate::tree::Tree::none(),
        };
        assert_eq!(
            Settings::decode(&settings.encode().expect("plain paths")).expect("its own"),
            settings
        );
        assert!(Settings::decode("{}").is_err());
        let patterns = ["*".to_owned(), "a[".to_owned()];
        let (bad, _) = first_bad(patterns.iter()).expect("no pattern");
        assert_eq!(bad, "a[");
    }
}
