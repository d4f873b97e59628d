//! The result of a run as one self-contained page: plots as SVG, figures beside them, light and dark.
//!
//! plotters draws with placeholder colours, one for each meaning; the page's style sheet gives them their real ones, by
//! the reader's preference.

use crate::cell::{QUANTILES, SAMPLE};
use crate::contender::Kind;
use crate::plan::{Report, Row, about_rounds};
use crate::scenario::Access;
use crate::spread::Range;
use faultless::ByteSize;
use faultless_sys::mem::PAGE;
use plotters::prelude::*;
use std::fmt::Write;
use std::time::Duration;

const WIDTH: u32 = 430;
const HEIGHT: u32 = 270;
/// Placeholders: text, lines of the grid, axes.
const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);

/// A contender's placeholder, and its colours in the light and in the dark.
fn colour(kind: Kind) -> (RGBColor, &'static str, &'static str) {
    match kind {
        Kind::Mmap => (RGBColor(3, 3, 3), "#c2410c", "#fb923c"),
        Kind::Pread => (RGBColor(4, 4, 4), "#6b7280", "#9ca3af"),
        Kind::UffdMonitor => (RGBColor(5, 5, 5), "#7c3aed", "#c4b5fd"),
        Kind::Floor => (RGBColor(14, 14, 14), "#831843", "#fbcfe8"),
        Kind::Populate => (RGBColor(15, 15, 15), "#57534e", "#d6d3d1"),
        Kind::Faultless => (RGBColor(6, 6, 6), "#0f766e", "#2dd4bf"),
        Kind::FaultlessLoad => (RGBColor(13, 13, 13), "#4338ca", "#a5b4fc"),
        Kind::FaultlessLive => (RGBColor(22, 22, 22), "#166534", "#86efac"),
        Kind::FaultlessMarked => (RGBColor(23, 23, 23), "#3f6212", "#d9f99d"),
        Kind::FaultlessBatch => (RGBColor(16, 16, 16), "#1d4ed8", "#93c5fd"),
        Kind::FaultlessHuge => (RGBColor(19, 19, 19), "#0891b2", "#67e8f9"),
        Kind::FaultlessAsync => (RGBColor(17, 17, 17), "#9333ea", "#d8b4fe"),
        Kind::Uring => (RGBColor(18, 18, 18), "#374151", "#e5e7eb"),
        Kind::Fio => (RGBColor(20, 20, 20), "#78716c", "#a8a29e"),
        Kind::FaultlessOver => (RGBColor(12, 12, 12), "#a16207", "#fde047"),
        Kind::Program => (RGBColor(7, 7, 7), "#b45309", "#fbbf24"),
        Kind::ProgramServed => (RGBColor(8, 8, 8), "#0369a1", "#38bdf8"),
        Kind::ProgramLive => (RGBColor(21, 21, 21), "#065f46", "#6ee7b7"),
        Kind::MmapObserved => (RGBColor(9, 9, 9), "#15803d", "#4ade80"),
        Kind::MmapTraced => (RGBColor(10, 10, 10), "#4d7c0f", "#a3e635"),
        Kind::MmapRecorded => (RGBColor(11, 11, 11), "#be185d", "#f472b6"),
    }
}

fn hex(c: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2)
}

const STYLE: &str = "
:root { --paper: #ffffff; --ink: #1f2937; --faint: #e5e7eb; --soft: #6b7280; --card: #f9fafb; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #111418; --ink: #e5e7eb; --faint: #2b313a; --soft: #9ca3af; --card: #171b21; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1380px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; } .soft { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; background: var(--card); border-radius: 8px;
  padding: 8px; max-width: 430px; } figure svg { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: var(--soft); padding: 0 4px 4px; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; vertical-align: top; }
td small { color: var(--soft); } th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 1px solid var(--faint); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; }
svg text { font-family: system-ui, sans-serif; }
";

/// The page.
///
/// # Errors
///
/// A plot cannot be drawn.
pub fn page(report: &Report) -> anyhow::Result<String> {
    let mut out = String::new();
    let mut style = STYLE.to_owned();
    let mut dark = String::new();
    let _ = write!(
        style,
        "svg [fill=\"{ink}\"] {{ fill: var(--ink) }} svg [stroke=\"{ink}\"] {{ stroke: var(--soft) }}\n\
         svg [stroke=\"{grid}\"] {{ stroke: var(--faint) }}\n",
        ink = hex(INK),
        grid = hex(GRID)
    );
    for kind in Kind::EVERY {
        let (placeholder, light, night) = colour(kind);
        let name = kind.name();
        let rules = |to: &mut String, colour: &str| {
            let _ = write!(
                to,
                "svg [stroke=\"{0}\"] {{ stroke: {colour} }} svg [fill=\"{0}\"] {{ fill: {colour} }}\n\
                 .key-{name} {{ background: {colour} }}\n",
                hex(placeholder)
            );
        };
        rules(&mut style, light);
        rules(&mut dark, night);
    }
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>faultless bench</title>\n<style>{style}\n@media (prefers-color-scheme: dark) {{\n{dark}}}\n</style></head><body>\n\
         <h1>faultless bench</h1>\n<p class=\"soft\">{}</p>\n",
        escape(&report.machine.line())
    );
    let kinds: Vec<Kind> = Kind::EVERY
        .into_iter()
        .filter(|k| report.rows.iter().any(|r| r.contender == *k))
        .collect();
    out.push_str("<p>");
    for kind in &kinds {
        let _ = write!(
            out,
            "<span class=\"key key-{0}\"></span>{0} &nbsp; ",
            kind.name()
        );
    }
    out.push_str("</p>\n");
    match report.wrong_bytes() {
        0 if kinds.contains(&Kind::Fio) => out.push_str("<p class=\"soft\">Every byte that was read was checked, but for those that fio read, which chooses the pages itself.</p>\n"),
        0 => out.push_str("<p class=\"soft\">Every byte that was read was checked.</p>\n"),
        n => _ = writeln!(out, "<p><strong>{n} bytes were wrong: these figures are worth nothing.</strong></p>"),
    }
    out.push_str("<p class=\"soft\">Figures are medians over the rounds; the contenders took turns. Where some rounds say faster and some slower, it says ≈ 1.</p>\n");
    if let Some(us) = report.storage_delay_us {
        let _ = writeln!(
            out,
            "<p>The data is not on that disk: a file system of the benchmark's own answers after {}.</p>",
            time(us as f64)
        );
    }
    for failed in &report.failed {
        let _ = writeln!(out, "<p><strong>Failed:</strong> {}</p>", escape(failed));
    }
    for left_out in &report.left_out {
        let _ = writeln!(out, "<p>Left out: {}</p>", escape(left_out));
    }
    let mut rest = &report.rows[..];
    while let Some(first) = rest.first() {
        let same = |r: &Row| r.scenario == first.scenario && r.threads == first.threads;
        let (group, others) = rest.split_at(rest.iter().take_while(|r| same(r)).count());
        section(&mut out, report, group)?;
        rest = others;
    }
    out.push_str("</body></html>\n");
    Ok(out)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn section(out: &mut String, report: &Report, rows: &[Row]) -> anyhow::Result<()> {
    let Some(first) = rows.first() else {
        return Ok(());
    };
    let scenario = first.scenario;
    let _ = write!(
        out,
        "<h2>{}, {} thread{}</h2>\n<p class=\"soft\">{}</p>\n",
        escape(scenario.name()),
        first.threads,
        if first.threads == 1 { "" } else { "s" },
        escape(&scenario.describe(
            ByteSize::new(report.size),
            report.storage_delay_us.map(Duration::from_micros)
        ))
    );
    let hot = scenario.access() == Access::Hot;
    let scan = scenario.access() == Access::Scan;
    table(out, rows, hot, scan);
    let _ = writeln!(out, "<p class=\"soft\">{}</p>", escape(&about_rounds(rows)));
    out.push_str("<div class=\"row\">\n");
    let over_time = throughput(rows, hot, scan)?;
    figure(
        out,
        &over_time,
        "Throughput over time, the rounds one behind the other (bursts beyond the scale are cut)",
    );
    if !scan {
        figure(
            out,
            &latency(rows, hot)?,
            "Latency: the share of reads that took at most so long",
        );
    }
    if rows.iter().any(|r| r.mmap_lock_per_miss.is_some()) && !hot {
        figure(
            out,
            &locks(rows)?,
            "mmap_lock acquisitions of reader threads per miss",
        );
    }
    out.push_str("</div>\n");
    Ok(())
}

fn figure(out: &mut String, svg: &str, caption: &str) {
    let _ = writeln!(
        out,
        "<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    );
}

/// A figure, and beneath it the least and the most of its rounds.
fn figure_of_rounds(text: String, range: Option<Range>, show: impl Fn(f64) -> String) -> String {
    match range {
        Some(range) => format!("{text}<br><small>{}</small>", range.text(show)),
        None => text,
    }
}

fn table(out: &mut String, rows: &[Row], hot: bool, scan: bool) {
    let speed = match (hot, scan) {
        (true, _) => "loads/s",
        (_, true) => "MiB/s",
        _ => "reads/s",
    };
    let _ = writeln!(
        out,
        "<table><tr><th></th><th>{speed}</th><th>× mmap</th><th>p50</th><th>p99</th><th>p99.9</th><th>max</th>\
         <th>mmap_lock/miss</th><th>device reads/read</th><th>neighbour/s</th></tr>"
    );
    for r in rows {
        let name = match r.variant.as_str() {
            "" => r.contender.name().to_owned(),
            v => format!("{} ({v})", r.contender.name()),
        };
        let ratio = match &r.against_baseline {
            None => "–".to_owned(),
            // That is 1 by definition.
            Some(ratio) if r.contender.is_baseline() => format!("{:.2}", ratio.value),
            Some(ratio) => match ratio.spread() {
                Some(spread) => format!("{}<br><small>{spread}</small>", ratio.text()),
                None => ratio.text(),
            },
        };
        let locks = r
            .mmap_lock_per_miss
            .map_or_else(|| "–".to_owned(), |l| format!("{l:.4}"));
        let per_s = |x: f64| {
            if scan {
                format!("{:.0}", mib(x))
            } else {
                short(x)
            }
        };
        let spread = r.spread.as_ref();
        let speed = figure_of_rounds(per_s(r.reads_per_s), spread.map(|s| s.reads_per_s), per_s);
        let neighbour = match r.neighbour_per_s {
            None => "–".to_owned(),
            Some(n) => figure_of_rounds(short(n), spread.and_then(|s| s.neighbour_per_s), short),
        };
        let _ = writeln!(
            out,
            "<tr><td><span class=\"key key-{}\"></span>{}</td><td>{speed}</td><td>{ratio}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{locks}</td><td>{}</td><td>{neighbour}</td></tr>",
            r.contender.name(),
            escape(&name),
            figure_of_rounds(time(r.p50_us), spread.map(|s| s.p50_us), time),
            figure_of_rounds(time(r.p99_us), spread.map(|s| s.p99_us), time),
            figure_of_rounds(time(r.p999_us), spread.map(|s| s.p999_us), time),
            figure_of_rounds(time(r.max_us), spread.map(|s| s.max_us), time),
            figure_of_rounds(
                format!("{:.3}", r.device_reads_per_read),
                spread.map(|s| s.device_reads_per_read),
                |x| format!("{x:.3}")
            ),
        );
    }
    out.push_str("</table>\n");
}

fn mib(pages_per_s: f64) -> f64 {
    pages_per_s * PAGE as f64 / f64::from(1 << 20)
}

fn short(x: f64) -> String {
    match x {
        x if x >= 1e6 => format!("{:.1} M", x / 1e6),
        x if x >= 1e4 => format!("{:.1} k", x / 1e3),
        x => format!("{x:.0}"),
    }
}

fn time(us: f64) -> String {
    match us {
        us if us >= 999_500.0 => format!("{:.1} s", us / 1e6),
        us if us >= 999.5 => format!("{:.1} ms", us / 1e3),
        us if us >= 9.995 => format!("{us:.0} µs"),
        us if us >= 0.9995 => format!("{us:.1} µs"),
        us if us >= 0.0995 => format!("{:.0} ns", us * 1e3),
        us => format!("{:.1} ns", us * 1e3),
    }
}

type Drawn = anyhow::Result<String>;

/// An area in which a plot is drawn, as SVG.
fn draw(
    f: impl FnOnce(&DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> anyhow::Result<()>,
) -> Drawn {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        f(&area)?;
        area.present()
            .map_err(|e| anyhow::anyhow!("cannot draw: {e}"))?;
    }
    Ok(svg.replacen("<svg ", "<svg role=\"img\" ", 1))
}

macro_rules! drawn {
    ($e:expr) => {
        $e.map_err(|e| anyhow::anyhow!("cannot draw a plot: {e}"))?
    };
}

fn text() -> TextStyle<'static> {
    ("sans-serif", 12).into_font().color(&INK)
}

fn throughput(rows: &[Row], hot: bool, scan: bool) -> Drawn {
    let scale = |x: f64| if scan { mib(x) } else { x };
    // One line for each round, one behind the other.
    let round = |r: &Row| r.reads_over_time.iter().map(Vec::len).max().unwrap_or(0);
    let longest = rows.iter().map(round).max().unwrap_or(0);
    let series: Vec<(Kind, usize, Vec<f64>)> = rows
        .iter()
        .flat_map(|r| {
            r.reads_over_time.iter().enumerate().map(|(n, points)| {
                let points = points.iter().map(|&x| scale(x)).collect();
                (r.contender, n * (longest + 1), points)
            })
        })
        .collect();
    let points = series.iter().map(|(_, at, s)| at + s.len()).max();
    let seconds = points.unwrap_or(0) as f64 * SAMPLE.as_secs_f64();
    // A single burst must not flatten the rest.
    let mut all: Vec<f64> = series
        .iter()
        .flat_map(|(_, _, s)| s.iter().copied())
        .collect();
    all.sort_by(f64::total_cmp);
    let most = all.get(all.len() * 995 / 1000).copied().unwrap_or(1.0) * 1.1;
    let unit = match (hot, scan) {
        (true, _) => "loads/s",
        (_, true) => "MiB/s",
        _ => "reads/s",
    };
    draw(|area| {
        let mut chart = drawn!(
            ChartBuilder::on(area)
                .margin(6)
                .x_label_area_size(34)
                .y_label_area_size(58)
                .build_cartesian_2d(0.0..seconds.max(0.1), 0.0..most.max(1.0))
        );
        drawn!(
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(GRID)
                .axis_style(INK)
                .label_style(text())
                .x_desc("seconds")
                .y_desc(unit)
                .x_labels(6)
                .y_labels(6)
                .x_label_formatter(&|x| format!("{x:.1}"))
                .y_label_formatter(&|y| short(*y))
                .draw()
        );
        for (kind, at, points) in &series {
            let line = points
                .iter()
                .enumerate()
                .map(|(i, &y)| (((at + i) as f64 + 0.5) * SAMPLE.as_secs_f64(), y.min(most)));
            drawn!(chart.draw_series(LineSeries::new(line, colour(*kind).0.stroke_width(2))));
        }
        Ok(())
    })
}

/// Where a quantile lies on an axis on which each nine takes the same room.
fn nines(q: f64) -> f64 {
    -(1.0 - q).max(1e-5).log10()
}

fn latency(rows: &[Row], hot: bool) -> Drawn {
    let series: Vec<(Kind, Vec<(f64, f64)>)> = rows
        .iter()
        .map(|r| {
            let points = QUANTILES.iter().zip(&r.latency_us);
            let points = points.filter(|(q, us)| **q < 1.0 && **us > 0.0);
            (
                r.contender,
                points.map(|(&q, &us)| (nines(q), us)).collect(),
            )
        })
        .collect();
    let all = || series.iter().flat_map(|(_, s)| s.iter().map(|p| p.1));
    let least = all().fold(f64::INFINITY, f64::min);
    let most = all().fold(0.0, f64::max);
    let (least, most) = if most > 0.0 {
        (least * 0.8, most * 1.3)
    } else {
        (1.0, 10.0)
    };
    let label = |x: &f64| match (*x).round() as i32 {
        0 => "0 %".to_owned(),
        1 => "90 %".to_owned(),
        n => {
            format!("99.{}", "9".repeat((n - 2) as usize))
                .trim_end_matches('.')
                .to_owned()
                + " %"
        }
    };
    draw(|area| {
        let mut chart = drawn!(
            ChartBuilder::on(area)
                .margin(6)
                .margin_right(28)
                .x_label_area_size(34)
                .y_label_area_size(58)
                .build_cartesian_2d(0.0..4.0, (least..most).log_scale())
        );
        drawn!(
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(GRID)
                .axis_style(INK)
                .label_style(text())
                .x_desc("share of reads")
                .y_desc(if hot { "per load" } else { "per read" })
                .x_labels(5)
                .y_labels(6)
                .x_label_formatter(&label)
                .y_label_formatter(&|y| time(*y))
                .draw()
        );
        for (kind, points) in series {
            drawn!(chart.draw_series(LineSeries::new(points, colour(kind).0.stroke_width(2))));
        }
        Ok(())
    })
}

fn locks(rows: &[Row]) -> Drawn {
    let bars: Vec<(Kind, f64)> = rows
        .iter()
        .filter_map(|r| Some((r.contender, r.mmap_lock_per_miss?)))
        .collect();
    let most = bars.iter().map(|b| b.1).fold(1.0, f64::max) * 1.15;
    draw(|area| {
        let count = bars.len() as f64;
        let mut chart = drawn!(
            ChartBuilder::on(area)
                .margin(6)
                .x_label_area_size(34)
                .y_label_area_size(46)
                .build_cartesian_2d(0.0..count, 0.0..most)
        );
        drawn!(
            chart
                .configure_mesh()
                .disable_x_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(GRID)
                .axis_style(INK)
                .label_style(text())
                .x_labels(0)
                .y_labels(5)
                .y_label_formatter(&|y| format!("{y:.1}"))
                .draw()
        );
        for (i, &(kind, value)) in bars.iter().enumerate() {
            let x = i as f64;
            let bar = Rectangle::new([(x + 0.2, 0.0), (x + 0.8, value)], colour(kind).0.filled());
            let figure = Text::new(
                format!("{value:.4}"),
                (x + 0.28, value + most * 0.07),
                text(),
            );
            drawn!(chart.draw_series(std::iter::once(bar)));
            drawn!(chart.draw_series(std::iter::once(figure)));
            let name = Text::new(kind.name(), (x + 0.2, -most * 0.02), text());
            drawn!(chart.draw_series(std::iter::once(name)));
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use crate::plan::Spread;
    use crate::scenario::Scenario;
    use crate::spread::Ratio;

    fn row(scenario: Scenario, contender: Kind) -> Row {
        let range = |min, max| Range { min, max };
        Row {
            onlooker_cpu_s: None,
            onlooker_resident_bytes: None,
            onlooker_lost: None,
            scenario,
            contender,
            variant: String::new(),
            threads: 16,
            memory: 2 << 30,
            rounds: 3,
            first_in_rounds: 1,
            reads_per_s_by_round: vec![(0, 1190.0), (1, 1250.0), (2, 1310.0)],
            against_baseline: Some(Ratio {
                value: 1.05,
                range: range(0.97, 1.11),
                rounds: 3,
            }),
            counted_misses: Some(1016),
            cpu_us_per_miss: 100.0,
            spread: Some(Spread {
                reads_per_s: range(1190.0, 1310.0),
                p50_us: range(90.0, 110.0),
                p99_us: range(900.0, 1100.0),
                p999_us: range(4000.0, 6000.0),
                max_us: range(7000.0, 9000.0),
                cpu_s: range(0.1, 0.2),
                cpu_us_per_miss: range(90.0, 110.0),
                device_reads_per_read: range(1.0, 1.0),
                neighbour_per_s: None,
                neighbour_p99_us: None,
                onlooker_cpu_s: None,
            }),
            seconds: 0.8,
            reads: 1000,
            reads_per_s: 1250.0,
            p50_us: 100.0,
            p99_us: 1000.0,
            p999_us: 5000.0,
            max_us: 9000.0,
            neighbour_per_s: None,
            neighbour_p99_us: None,
            misses: 1000,
            mmap_lock_per_miss: Some(1.0),
            mmap_lock_per_miss_process: Some(1.0),
            device_bytes: 4096 * 1000,
            cpu_s: 0.1,
            device_reads_per_read: 1.0,
            latency_us: QUANTILES.iter().map(|q| 50.0 + q * 500.0).collect(),
            reads_over_time: vec![vec![1200.0, 1300.0], vec![1250.0; 40]],
            over_budget_bytes: None,
            resident_max_bytes: 0,
            wrong_bytes: 0,
        }
    }

    #[test]
    fn a_page_has_every_setting_and_needs_nothing_from_elsewhere() {
        let report = Report {
            machine: Machine::look(std::path::Path::new("/")),
            rows: Scenario::ALL
                .into_iter()
                .flat_map(|s| Kind::EVERY.map(|k| row(s, k)))
                .collect(),
            size: 4 << 30,
            storage_delay_us: None,
            left_out: vec!["nothing <but> this".to_owned()],
            failed: Vec::new(),
        };
        let page = page(&report).expect("drawn");
        for s in Scenario::ALL {
            assert!(page.contains(s.name()), "{}", s.name());
        }
        assert_eq!(
            page.matches("<figure>").count(),
            Scenario::ALL.len() * 3 - 2 - 1
        );
        // Every table has the spread, and says where it tells no difference.
        assert!(page.contains("<small>1190–1310</small>"));
        assert!(page.contains("≈ 1<br><small>0.97–1.11</small>"));
        let said = page.matches("Medians of 3 rounds of 0.8 s").count();
        assert_eq!(said, Scenario::ALL.len());
        let smaps = Scenario::Smaps.describe(ByteSize::gib(4), None);
        assert!(page.contains(&escape(&smaps)));
        assert!(page.contains("nothing &lt;but&gt; this"));
        for outside in ["src=", "href=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        // Every colour is one that the style sheet knows.
        let known: Vec<String> = [INK, GRID]
            .into_iter()
            .chain(Kind::EVERY.map(|k| colour(k).0))
            .map(hex)
            .collect();
        for used in page.split("stroke=\"#").skip(1) {
            let used = format!("#{}", &used[..6]);
            assert!(known.contains(&used), "{used}");
        }
    }

    #[test]
    fn nines_are_equally_far_apart() {
        assert!((nines(0.9) - 1.0).abs() < 1e-9 && (nines(0.999) - 3.0).abs() < 1e-9);
        assert!(nines(0.0).abs() < 1e-9);
    }
}
