//! The engine's source has floors, and an arrow goes down only: a file names files of its own floor or of one below.
//! Inside a floor no files name each other in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// From the ground up.
const FLOORS: [&str; 9] = [
    "base",
    "sync",
    "space",
    "fault",
    "read",
    "evict",
    "coherence",
    "guards",
    "api",
];

type Graph = BTreeMap<String, BTreeSet<String>>;

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory of the crate") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The modules that a path such as `crate::space::page::{self, Word}` names: the longest parts of it that are files.
fn named(path: &str, files: &BTreeSet<String>) -> Vec<String> {
    let (stem, list) = path.split_once('{').unwrap_or((path, ""));
    let stem: Vec<&str> = stem.split("::").filter(|p| !p.is_empty()).collect();
    let longest = |parts: &[&str]| {
        let shorter = (1..=parts.len()).rev().map(|n| parts[..n].join("::"));
        shorter.into_iter().find(|m| files.contains(m))
    };
    let leaves: Vec<&str> = list.split([',', '}']).map(str::trim).collect();
    let all = leaves.iter().filter_map(|leaf| {
        let leaf = leaf.split("::").filter(|p| !p.is_empty());
        longest(&stem.iter().copied().chain(leaf).collect::<Vec<_>>())
    });
    all.collect()
}

/// Which files of the crate each file names.
fn graph() -> Graph {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&src, &mut paths);
    let module = |path: &Path| {
        let path = path
            .strip_prefix(&src)
            .expect("below src")
            .with_extension("");
        let path = path.to_string_lossy().replace('/', "::");
        path.strip_suffix("::mod")
            .map_or(path.clone(), str::to_owned)
    };
    let files: BTreeSet<String> = paths.iter().map(|p| module(p)).collect();
    let mut graph = Graph::new();
    for path in paths.iter().filter(|p| !p.ends_with("lib.rs")) {
        let text = fs::read_to_string(path).expect("a source file");
        let code: String = text
            .lines()
            .map(|l| l.split("//").next().unwrap_or(""))
            .collect();
        let me = module(path);
        let mut names = BTreeSet::new();
        for rest in code.split("crate::").skip(1) {
            let end = rest.find(|c: char| !(c.is_alphanumeric() || ":_{}, ".contains(c)));
            let end = end.unwrap_or(rest.len());
            let end = rest[..end].find('}').map_or(end, |close| close + 1);
            names.extend(named(&rest[..end], &files));
        }
        names.remove(&me);
        graph.insert(me, names);
    }
    graph
}

#[test]
fn no_arrow_goes_up() {
    let floor = |module: &str| {
        let first = module.split("::").next().expect("a name");
        let found = FLOORS.iter().position(|f| *f == first);
        found.unwrap_or_else(|| panic!("{module} stands on no floor"))
    };
    let graph = graph();
    assert!(
        graph.values().map(BTreeSet::len).sum::<usize>() > 100,
        "arrows are found at all"
    );
    let up = graph
        .iter()
        .flat_map(|(me, names)| names.iter().map(move |n| (me, n)));
    let up: Vec<_> = up.filter(|(me, n)| floor(n) > floor(me)).collect();
    assert!(up.is_empty(), "these name a floor above their own: {up:?}");
}

#[test]
fn no_files_name_each_other_in_a_circle() {
    let mut left = graph();
    // Take away what names nothing that is left, until nothing changes.
    while let Some(leaf) = left
        .iter()
        .find(|(_, names)| names.iter().all(|n| !left.contains_key(n)))
        .map(|(me, _)| me.clone())
    {
        left.remove(&leaf);
    }
    let circle: Vec<_> = left.keys().collect();
    assert!(circle.is_empty(), "a circle lies among: {circle:?}");
}
