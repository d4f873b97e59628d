//! `faultless doctor`.

use comfy_table::{Table, presets};
use faultless::live::{Support, support};
use faultless::{Backend, Pool};
use faultless_observe::doctor::{Finding, Standing, observer};
use faultless_untrusted::printable;

/// Say what Faultless and its observer can do on this machine, and what each missing thing costs.
///
/// Where the user may observe, it loads the observer's BPF programs for a moment.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn finding(what: &str, standing: Standing, found: String, costs: &str) -> Finding {
    Finding {
        what: what.to_owned(),
        standing,
        found,
        costs: costs.to_owned(),
    }
}

/// Whether `faultless run` can leave programs the kernel's own mappings.
fn live_mappings() -> Finding {
    const WHAT: &str = "live mappings";
    const COSTS: &str = "`faultless run` makes stand-ins, which need a lease on each file";
    match support() {
        Ok(Support::Free) => finding(WHAT, Standing::Good, "a miss takes no mmap_lock".into(), ""),
        Ok(Support::Locked) => finding(
            WHAT,
            Standing::Lacking,
            "a miss takes mmap_lock; from Linux 6.19 on it does not".into(),
            COSTS,
        ),
        Err(why) => finding(WHAT, Standing::Lacking, why.into(), COSTS),
    }
}

fn engine() -> Vec<Finding> {
    let mut all = Vec::new();
    all.push(
        match Pool::builder().memory(faultless::ByteSize::mib(4)).build() {
            Ok(pool) => match pool.backend() {
                Backend::Full => finding("engine", Standing::Good, "full".into(), ""),
                backend @ Backend::Partial(why) => finding(
                    "engine",
                    Standing::Lacking,
                    format!("partial: {why}"),
                    match backend.avoids_mmap_lock() {
                        true => "misses still avoid mmap_lock, but not as cheaply as they could",
                        false => "misses take mmap_lock, as those of the kernel's mmap do, and `faultless run` serves no program; Linux 6.9 and later do better",
                    },
                ),
                other => finding(
                    "engine",
                    Standing::Missing,
                    other.to_string(),
                    "maps are the kernel's mmap, and stall as it does",
                ),
            },
            Err(e) => finding(
                "engine",
                Standing::Missing,
                e.to_string(),
                "no map can be made",
            ),
        },
    );
    all.push(live_mappings());
    all.push(match crate::run::library() {
        Ok(path) => finding(
            "library for `faultless run`",
            Standing::Good,
            printable(&path).to_string(),
            "",
        ),
        Err(e) => finding(
            "library for `faultless run`",
            Standing::Missing,
            "not found".into(),
            &e.to_string(),
        ),
    });
    all
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut all = engine();
    all.extend(observer());
    if args.json {
        print!("{}", crate::output::json(&all)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    for f in &all {
        let mark = match f.standing {
            Standing::Good => "good",
            Standing::Lacking => "lacking",
            Standing::Missing => "MISSING",
        };
        table.add_row([mark, f.what.as_str(), f.found.as_str()]);
    }
    println!("{table}");
    for f in all.iter().filter(|f| f.standing != Standing::Good) {
        println!("\n{}: {}", f.what, f.costs);
    }
    if all.iter().all(|f| f.standing == Standing::Good) {
        println!("\nAll is well: `faultless run` and `faultless observe` can do all that they do.");
    }
    Ok(())
}
