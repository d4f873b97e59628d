//! A comparison as one self-contained page: plots as SVG, tables, the verdict, the parameters; light and dark.

use crate::compare::{Comparison, throughput};
use crate::designs::{DESIGNS, TODAY};
use crate::run::{GroupOutcome, Outcome};
use crate::workload::OWN_GROUPS;
use plotters::prelude::*;
use std::fmt::Write;

const STYLE: &str = "
:root { --paper: #ffffff; --ink: #1f2937; --faint: #e5e7eb; --soft: #6b7280; --card: #f9fafb; --bar: #0f766e; --now: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #111418; --ink: #e5e7eb; --faint: #2b313a; --soft: #9ca3af; --card: #171b21; --bar: #2dd4bf; --now: #fb923c; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1300px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p { margin: .2rem 0 .6rem; max-width: 46rem; } .soft { color: var(--soft); }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .15rem .9rem .15rem 0; text-align: right; } th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 1px solid var(--faint); vertical-align: bottom; }
tr.now td { font-weight: 600; } .bar { display: inline-block; height: .7em; background: var(--bar); border-radius: 2px; }
tr.now .bar { background: var(--now); } .bar.other, tr.now .bar.other { background: var(--soft); } h3 { font-size: 1rem; margin: 1rem 0 0; }
.row { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; background: #fff; border-radius: 8px; padding: 6px;
  border: 1px solid var(--faint); } figcaption { font-size: .85rem; color: #6b7280; padding: 0 4px 4px; }
figure svg { display: block; max-width: 100%; height: auto; }
pre { background: var(--card); padding: .8rem; border-radius: 8px; overflow-x: auto; font-size: .85rem; }
";

/// Colours of designs, in their order; distinct on white.
const COLOURS: [RGBColor; 12] = [
    RGBColor(100, 116, 139),
    RGBColor(148, 163, 184),
    RGBColor(2, 132, 199),
    RGBColor(8, 145, 178),
    RGBColor(194, 65, 12),
    RGBColor(124, 58, 237),
    RGBColor(190, 24, 93),
    RGBColor(217, 70, 239),
    RGBColor(202, 138, 4),
    RGBColor(77, 124, 15),
    RGBColor(120, 53, 15),
    RGBColor(15, 118, 110),
];

/// A figure of an outcome.
type Figure = fn(&Outcome) -> f64;

/// The page.
///
/// # Errors
///
/// When a plot cannot be drawn.
pub fn page(c: &Comparison) -> Result<String, String> {
    let mut out = String::new();
    let name = escape(&c.workload.name);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>What if: {name}</title>\n<meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head>\n<body>\n<h1>What if: {name}</h1>\n<p class=\"soft\">{}; {} processors; {} s simulated; seed {}. A model, not a measurement.</p>\n<p>{}</p>\n",
        escape(&c.workload.about),
        c.workload.cores,
        c.workload.seconds,
        c.seed,
        escape(&c.verdict)
    );
    table(&mut out, c);
    if let Some(sweep) = &c.sweep {
        let _ = write!(
            out,
            "<h2>By {}</h2>\n<div class=\"row\">",
            escape(&sweep.knob.name())
        );
        let plots: [(&str, Figure); 2] = [
            ("rounds a second of the first group", throughput),
            ("99th percentile of its rounds, µs", crate::compare::tail),
        ];
        for (caption, of) in plots {
            let svg = plot(c, of).map_err(|e| format!("cannot draw: {e}"))?;
            let _ = write!(
                out,
                "<figure>{svg}<figcaption>{caption}</figcaption></figure>"
            );
        }
        out.push_str("</div>\n");
    }
    out.push_str("<h2>Who waits for whom, at worst</h2>\n<table><tr><th>design</th><th>waited</th><th style=\"text-align:left\">for</th></tr>");
    for o in &c.outcomes {
        let Some(worst) = &o.worst else { continue };
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{:.1} ms</td><td style=\"text-align:left\">{}</td></tr>",
            o.design,
            worst.waited_ms,
            escape(&worst.to_string())
        );
    }
    out.push_str("</table>\n<h2>The designs</h2>\n<table>");
    for d in DESIGNS {
        let _ = write!(
            out,
            "<tr><td>{}</td><td style=\"text-align:left\">{}</td><td style=\"text-align:left\">{}</td><td style=\"text-align:left\">{}</td></tr>",
            d.id,
            escape(d.what),
            escape(d.when),
            escape(d.source)
        );
    }
    let text = c.workload.to_text().map_err(|e| e.to_string())?;
    let _ = write!(
        out,
        "</table>\n<h2>The workload, with all parameters</h2>\n<pre>{}</pre>\n</body></html>\n",
        escape(&text)
    );
    Ok(out)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Whether a group is the workload's own; the others are there under some designs alone.
fn is_own(g: &&GroupOutcome) -> bool {
    !OWN_GROUPS.contains(&g.name.as_str())
}

/// Each group of threads, what the whole machine did, and the recording beside them, if it was one.
fn table(out: &mut String, c: &Comparison) {
    let all = || c.recorded.iter().chain(&c.outcomes);
    let first = c.outcomes.first().map_or(&[][..], |o| &o.groups);
    for (no, name) in first.iter().filter(is_own).map(|g| &g.name).enumerate() {
        let rate = |o: &Outcome| o.group(name).map_or(0.0, |g| g.per_second);
        let best = all().map(rate).fold(1e-9, f64::max);
        let today = c.outcomes.iter().find(|o| o.design == TODAY).map(rate);
        let _ = write!(
            out,
            "<h3>{}</h3>\n<table><tr><th>design</th><th>rounds/s</th><th>× today</th><th></th><th>p50, µs</th><th>p99</th><th>p99.9</th><th>max</th>\
             <th>faults: p50, µs</th><th>p99</th><th>p99.9</th><th>max</th>\
             <th>waits for mmap_lock to read</th><th>to write</th><th>for VMAs</th><th>for a processor</th></tr>\n",
            escape(name)
        );
        for o in all() {
            let Some(g) = o.group(name) else { continue };
            let class = if o.design == TODAY {
                " class=\"now\""
            } else {
                ""
            };
            let ratio = match today {
                Some(today) if today > 0.0 => format!("{:.2}", g.per_second / today),
                _ => "–".to_owned(),
            };
            let colour = if no == 0 { "bar" } else { "bar other" };
            let _ = write!(
                out,
                "<tr{class}><td>{}</td><td>{:.0}</td><td>{ratio}</td><td style=\"text-align:left\"><span class=\"{colour}\" style=\"width:{:.0}px\"></span></td>",
                escape(&o.design),
                g.per_second,
                120.0 * g.per_second / best
            );
            let (r, f) = (&g.round_us, &g.fault_us);
            for us in [r.p50, r.p99, r.p999, r.max, f.p50, f.p99, f.p999, f.max] {
                let _ = write!(out, "<td>{us:.0}</td>");
            }
            for key in [
                "mmap_lock_read",
                "mmap_lock_write",
                "vma_write",
                "processor",
            ] {
                let share = g.waited_ms_per_second.get(key).map_or_else(
                    || "–".to_owned(),
                    |ms| format!("{:.1} %", ms / 10.0 / f64::from(g.threads.max(1))),
                );
                let _ = write!(out, "<td>{share}</td>");
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</table>\n");
    }
    out.push_str(
        "<h3>The machine</h3>\n<table><tr><th>design</th><th>mmap_lock/s</th><th>pages read/s</th><th>read again</th><th>gone at the retry</th><th>processors busy</th></tr>\n",
    );
    for o in &c.outcomes {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{:.0}</td><td>{:.0}</td><td>{:.1} %</td><td>{:.1} %</td><td>{:.0} %</td></tr>",
            o.design,
            o.mmap_locks_per_second,
            o.reads_per_second,
            o.read_again_percent,
            o.gone_at_retry_percent,
            o.processors_percent
        );
    }
    out.push_str("</table>\n");
}

fn plot(c: &Comparison, of: Figure) -> Result<String, Box<dyn std::error::Error>> {
    let mut svg = String::new();
    let values: Vec<f64> = c.points.iter().map(|p| p.value as f64).collect();
    let all = c.points.iter().flat_map(|p| p.outcomes.iter().map(of));
    let top = all.clone().fold(1.0, f64::max) * 1.3;
    let low = all.filter(|v| *v > 0.0).fold(top, f64::min) / 1.3;
    let (from, to) = (
        values.iter().copied().fold(f64::MAX, f64::min).max(0.5),
        values.iter().copied().fold(1.0, f64::max),
    );
    {
        let root = SVGBackend::with_string(&mut svg, (520, 380)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(56)
            .build_cartesian_2d((from..to * 1.001).log_scale(), (low..top).log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(c.sweep.as_ref().map_or_else(String::new, |s| s.knob.name()))
            .x_label_formatter(&|v| format!("{v:.0}"))
            .y_label_formatter(&|v| format!("{v:.0}"))
            .draw()?;
        let designs: Vec<&str> = c.outcomes.iter().map(|o| o.design.as_str()).collect();
        for (no, design) in designs.iter().enumerate() {
            let known = DESIGNS.iter().position(|d| d.id == *design).unwrap_or(0);
            let colour = COLOURS[known];
            let points = c
                .points
                .iter()
                .filter_map(|p| Some((p.value as f64, of(p.outcomes.get(no)?).max(low))));
            let width = if *design == TODAY { 3 } else { 2 };
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(width)))?
                .label(*design)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 14, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(TRANSPARENT)
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}
