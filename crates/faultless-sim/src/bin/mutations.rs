//! Proves that the simulator finds mistakes: each file of `mutations/` is a mistake, which is put into a copy of the tree. Fresh
//! seeds, or the models of loom, must then fail within the time that CI gives them.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

const USAGE: &str = "usage: mutations [--list] [NAME…]";
/// Seconds of fresh seeds that CI runs.
const SECONDS: &str = "120";
/// Parts of a file are kept apart by this line.
const SEPARATOR: &str = "\n===\n";

/// What must find a mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finder {
    Simulator,
    /// The models of the parts that hand over between threads, which know weak memory orders.
    Models,
    /// The unit tests beside the code.
    Tests,
}

/// A deliberate mistake.
#[derive(Debug)]
struct Mutation {
    name: String,
    path: PathBuf,
    finder: Finder,
    what: String,
    from: String,
    to: String,
}

impl Mutation {
    fn parse(name: &str, text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("mutation {name}: {why}");
        let mut parts = text.trim_end().split(SEPARATOR);
        let (Some(head), Some(from), Some(to), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong("it wants a head, a text and a text in its place"));
        };
        let mut lines = head.lines();
        let (Some(path), Some(finder)) = (lines.next(), lines.next()) else {
            return Err(wrong("the head wants a path and what finds it"));
        };
        let finder = match finder {
            "found by: the simulator" => Finder::Simulator,
            "found by: the models" => Finder::Models,
            "found by: the unit tests" => Finder::Tests,
            other => return Err(wrong(&format!("nothing is called {other:?}"))),
        };
        Ok(Mutation {
            name: name.into(),
            path: path.into(),
            finder,
            what: lines.collect::<Vec<_>>().join(" "),
            from: from.into(),
            to: to.into(),
        })
    }

    /// The file with the mistake in it.
    fn applied(&self, root: &Path) -> Result<String, String> {
        let path = root.join(&self.path);
        let text = std::fs::read_to_string(&path)
            .map_err(|e| format!("mutation {}: {}: {e}", self.name, path.display()))?;
        match text.matches(&self.from).count() {
            1 => Ok(text.replacen(&self.from, &self.to, 1)),
            n => Err(format!(
                "mutation {}: its text stands {n} times in {}, and once is wanted; adapt the mutation to the code",
                self.name,
                path.display()
            )),
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn mutations() -> Result<Vec<Mutation>, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("mutations");
    let fail = |e| format!("{}: {e}", folder.display());
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|e| e == "mutation") {
            let text = std::fs::read_to_string(&path).map_err(fail)?;
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            all.push(Mutation::parse(&name, &text)?);
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn succeeds(command: &mut Command) -> Result<bool, String> {
    let status = command.status();
    Ok(status.map_err(|e| format!("{command:?}: {e}"))?.success())
}

/// A copy of the tree, with what is built of it.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
}

impl Copy {
    fn make() -> Result<Self, String> {
        let target = root().join("target/mutations");
        let tree = target.join("tree");
        let _ = std::fs::remove_dir_all(&tree);
        std::fs::create_dir_all(&tree).map_err(|e| format!("{}: {e}", tree.display()))?;
        for part in ["Cargo.toml", "Cargo.lock", "crates"] {
            let copied = succeeds(
                Command::new("cp")
                    .arg("-a")
                    .arg(root().join(part))
                    .arg(&tree),
            )?;
            if !copied {
                return Err(format!("cannot copy {part} to {}", tree.display()));
            }
        }
        Ok(Copy { tree, target })
    }

    fn cargo(&self, flags: &str, target: &str) -> Command {
        let mut cargo = Command::new("cargo");
        cargo
            .current_dir(&self.tree)
            .env("RUSTFLAGS", flags)
            .env("CARGO_TARGET_DIR", self.target.join(target));
        cargo
    }

    /// Builds the tree as it is, and lets `finder` look. Whether it found something.
    fn finds(&self, finder: Finder, log: &Path) -> Result<bool, String> {
        let out = std::fs::File::create(log).map_err(|e| format!("{}: {e}", log.display()))?;
        let err = out.try_clone().map_err(|e| e.to_string())?;
        if finder != Finder::Simulator {
            let (flags, target, only) = match finder {
                Finder::Models => ("--cfg loom -C debug-assertions", "loom", "models"),
                _ => ("", "tests", "tests"),
            };
            let test = |last| {
                let mut cargo = self.cargo(flags, target);
                cargo.args([
                    "test",
                    "--quiet",
                    "--release",
                    "-p",
                    "faultless",
                    "--lib",
                    last,
                ]);
                cargo
            };
            let (mut build, mut tests) = (test("--no-run"), test(only));
            if !succeeds(&mut build)? {
                return Err("it does not compile".into());
            }
            return Ok(!succeeds(tests.stdout(out).stderr(err))?);
        }
        let mut build = self.cargo("--cfg faultless_sim -C debug-assertions", "sim");
        build.args(["build", "--quiet", "--release", "-p", "faultless-sim"]);
        if !succeeds(&mut build)? {
            return Err("it does not compile".into());
        }
        let mut sim = Command::new(self.target.join("sim/release/faultless-sim"));
        sim.args(["--seconds", SECONDS, "--no-corpus"]);
        Ok(!succeeds(sim.stdin(Stdio::null()).stdout(out).stderr(err))?)
    }
}

/// Puts one mistake in, looks, and takes it out. Says how it went; whether it was found.
fn prove(copy: &Copy, m: &Mutation) -> Result<bool, String> {
    let at = copy.tree.join(&m.path);
    let good = std::fs::read_to_string(&at).map_err(|e| format!("{}: {e}", at.display()))?;
    let bad = m.applied(&root())?;
    let write =
        |text: &str| std::fs::write(&at, text).map_err(|e| format!("{}: {e}", at.display()));
    write(&bad)?;
    let log = copy.target.join(format!("{}.log", m.name));
    let began = Instant::now();
    let found = copy.finds(m.finder, &log);
    write(&good)?;
    let found = found.map_err(|e| format!("mutation {}: {e}", m.name))?;
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let how = match m.finder {
        Finder::Simulator => text
            .lines()
            .find(|l| l.contains(" runs in "))
            .and_then(|l| l.split(':').next())
            .unwrap_or("no run ended")
            .to_string(),
        _ => format!("{:.0} s with the build", began.elapsed().as_secs_f64()),
    };
    println!(
        "{:<34} {:<9} {:?}, {how}",
        m.name,
        if found { "found" } else { "SURVIVED" },
        m.finder
    );
    Ok(found)
}

fn run() -> Result<ExitCode, String> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let all = mutations()?;
    if names == ["--list"] {
        for m in all {
            println!("{:<34} {}", m.name, m.what);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = names.iter().find(|n| !all.iter().any(|m| m.name == **n)) {
        eprintln!("mutations: there is no mutation {unknown:?}; --list names them\n{USAGE}");
        return Ok(ExitCode::from(2));
    }
    let chosen = || {
        all.iter()
            .filter(|m| names.is_empty() || names.contains(&m.name))
    };
    let copy = Copy::make()?;
    let mut survived = 0;
    for m in chosen() {
        survived += usize::from(!prove(&copy, m)?);
    }
    println!("{} mutations, {survived} survived", chosen().count());
    Ok(ExitCode::from(u8::from(survived > 0)))
}

fn main() -> ExitCode {
    run().unwrap_or_else(|why| {
        eprintln!("mutations: {why}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mutation_fits_the_code() {
        let all = mutations().expect("they can be read");
        assert!(all.len() >= 12, "{}", all.len());
        for m in &all {
            let bad = m.applied(&root()).unwrap_or_else(|why| panic!("{why}"));
            assert_ne!(m.from, m.to, "{}", m.name);
            assert!(!m.what.is_empty(), "{} does not say what it is", m.name);
            assert!(!bad.is_empty());
        }
    }
}
