//! What was published of designs, beside what the model says.

use super::{say, with_progress};
use crate::output::{right_align, table};
use faultless_whatif::published::{Prediction, Within, predict};
use std::fmt::Write as _;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only what was published of these workloads.
    #[arg(value_name = "WORKLOAD")]
    only: Vec<String>,
    /// Also predict with each cost halved and doubled. (A quarter of an hour for all; a minute for app-start.)
    #[arg(long)]
    sensitivity: bool,
    /// What chance begins with.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, serde::Serialize)]
struct Published {
    schema: &'static str,
    seed: u64,
    predictions: Vec<Prediction>,
}

/// Costs that are told of each prediction.
const COSTS_TOLD: usize = 4;

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let known = faultless_whatif::published::workloads();
    if let Some(wrong) = args.only.iter().find(|o| !known.contains(&o.as_str())) {
        crate::bench::usage_error(&format!(
            "nothing was published of {wrong}; there are {}",
            known.join(", ")
        ));
    }
    let predictions = with_progress(|show| predict(&args.only, args.sensitivity, args.seed, show))?;
    if args.json {
        let all = Published {
            schema: "faultless.whatif-published/1",
            seed: args.seed,
            predictions,
        };
        return say(&crate::output::json(&all)?);
    }
    say(&tables(&predictions))
}

fn value(v: f64, unit: &str) -> String {
    match unit {
        "×" if v >= 100.0 => format!("{v:.0} ×"),
        "×" => format!("{v:.2} ×"),
        _ => format!("{v:.1} {unit}"),
    }
}

fn published(p: &Prediction) -> String {
    let [least, most] = p.published.map(|v| value(v, p.unit));
    match p.published {
        [a, b] if a == b => least,
        [_, b] if b.is_infinite() => format!("over {least}"),
        _ => format!("{least} to {most}"),
    }
}

fn tables(all: &[Prediction]) -> String {
    let mut t = table(&[
        "Workload",
        "figure",
        "published",
        "the model",
        "wanted",
        "holds",
    ]);
    for p in all {
        t.add_row([
            p.workload.to_owned(),
            p.figure.to_owned(),
            published(p),
            value(p.predicted, p.unit),
            match p.within {
                Within::Factor(f) => format!("within a factor of {f}"),
                Within::Points(n) => format!("within {n} points"),
                Within::Range => "in the range".to_owned(),
            },
            if p.holds { "yes" } else { "no" }.to_owned(),
        ]);
    }
    right_align(&mut t, 2);
    let mut text = format!("{t}\n");
    for p in all.iter().filter(|p| !p.holds && !p.why_not.is_empty()) {
        let _ = writeln!(text, "\n{}, {}: {}.", p.workload, p.figure, p.why_not);
    }
    text.push_str("\nPublished by:\n");
    for p in all {
        let _ = writeln!(text, "  {}: {}", p.workload, p.source);
    }
    if all.iter().any(|p| !p.sensitivity.is_empty()) {
        let mut t = table(&[
            "Workload",
            "figure",
            "the model",
            "cost",
            "halved",
            "doubled",
        ]);
        for p in all {
            for s in p.sensitivity.iter().take(COSTS_TOLD) {
                t.add_row([
                    p.workload.to_owned(),
                    p.figure.to_owned(),
                    value(p.predicted, p.unit),
                    s.cost.replace('_', "-"),
                    value(s.halved, p.unit),
                    value(s.doubled, p.unit),
                ]);
            }
        }
        right_align(&mut t, 2);
        let _ = writeln!(
            text,
            "\nThe costs that move each prediction most (device: the time of a read):\n{t}"
        );
    }
    text
}
