//! The report as one self-contained page, light and dark.
//!
//! The timeline has a lane for each thread: what it spent its time on, from below upwards, in bins. Above the lanes lie the
//! worst convoys; pointing at one shows whom it kept waiting, and says who did what.

use crate::report::{BlameRow, ConvoyRow, Deed, LaneRow, Report, duration};
use crate::sums::{PARTS, Part};
use plotters::prelude::*;
use std::fmt::Write;

/// Lanes that are drawn; the most stalled threads.
const LANES: usize = 48;
/// Convoys that are drawn.
const CONVOYS: usize = 80;
/// Convoys that are told at length.
const TOLD: usize = 12;
/// Bins that are drawn; more are merged.
const BINS: usize = 320;
const ROWS: usize = 20;

const LEFT: f64 = 150.0;
const WIDTH: f64 = 1160.0;
const LANE: f64 = 16.0;
const GAP: f64 = 3.0;
const TOP: f64 = 44.0;
const CONVOY_BAND: f64 = 18.0;

/// A part's colours, in the light and in the dark.
fn colours(part: Part) -> (&'static str, &'static str) {
    match part {
        Part::Device => ("#2563eb", "#60a5fa"),
        Part::Page => ("#7dd3fc", "#0c6aa0"),
        Part::Lock => ("#a16207", "#ca8a04"),
        Part::Reclaim => ("#7c3aed", "#a78bfa"),
        Part::Cpu => ("#d1d5db", "#4b5563"),
        Part::Other => ("#9ca3af", "#6b7280"),
        Part::Writer => ("#ea580c", "#fb923c"),
        Part::Reader => ("#dc2626", "#f87171"),
        Part::HandOver => ("#fcd34d", "#a88b2a"),
        Part::Running => ("#16a34a", "#4ade80"),
    }
}

const STYLE: &str = "
:root { --paper: #ffffff; --ink: #1f2937; --faint: #e5e7eb; --soft: #6b7280; --card: #f9fafb; --convoy: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #111418; --ink: #e5e7eb; --faint: #2b313a; --soft: #9ca3af; --card: #171b21; --convoy: #f87171; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1340px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .2rem 0 .6rem; } .soft { color: var(--soft); } .verdict { font-size: 1.05rem; max-width: 75em; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .18rem 1rem .18rem 0; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid var(--faint); }
th.t, td.t { text-align: left; } td.w { white-space: normal; text-align: left; max-width: 46em; }
.scroll { overflow-x: auto; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.legend span.item { margin-right: 1.1em; white-space: nowrap; }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; margin: .5rem 0 .4rem; }
.bar div { min-width: 0; }
.share { display: inline-block; height: .7em; background: var(--convoy); border-radius: 2px; min-width: 1px; }
svg { display: block; max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg text.soft { fill: var(--soft); } svg .lane { fill: var(--card); } svg .grid { stroke: var(--faint); }
svg .convoy { fill: var(--convoy); opacity: .55; cursor: pointer; } svg .convoy:hover, svg .convoy.on { opacity: 1; }
svg .band { fill: var(--convoy); opacity: .13; pointer-events: none; }
svg .mark { fill: none; stroke: var(--ink); stroke-width: 1.5; pointer-events: none; }
svg .mark.holder { stroke: var(--convoy); stroke-width: 2.5; }
#told { background: var(--card); border-left: 4px solid var(--convoy); border-radius: 4px; padding: .5rem .9rem; margin: .5rem 0;
  min-height: 3em; }
details { margin: .35rem 0; } summary { cursor: pointer; } code { font-size: .88em; }
";

/// Shows what a convoy did when it is pointed at; a click keeps it.
const SCRIPT: &str = "
(() => {
  const svg = document.getElementById('timeline'); if (!svg) return;
  const told = document.getElementById('told'), marks = document.getElementById('marks');
  const say = told.textContent; let kept = null;
  const add = (kind, at) => { const e = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
    e.setAttribute('class', kind); for (const k in at) e.setAttribute(k, at[k]); marks.append(e); };
  const clear = () => { marks.replaceChildren(); for (const c of svg.querySelectorAll('.convoy.on')) c.classList.remove('on'); };
  const show = c => { clear(); if (!c) { told.textContent = say; return; }
    c.classList.add('on'); told.textContent = c.dataset.says;
    add('band', {x: c.getAttribute('x'), y: svg.dataset.top, width: c.getAttribute('width'), height: svg.dataset.high});
    for (const m of JSON.parse(c.dataset.marks)) {
      const lane = svg.querySelector(`[data-tid='${m[0]}']`); if (!lane) continue;
      add(m[3] ? 'mark holder' : 'mark', {x: m[1], y: lane.getAttribute('y'), width: Math.max(m[2], 1.5),
        height: lane.getAttribute('height')}); } };
  for (const c of svg.querySelectorAll('.convoy')) {
    c.addEventListener('mouseenter', () => { if (!kept) show(c); });
    c.addEventListener('mouseleave', () => { if (!kept) show(null); });
    c.addEventListener('focus', () => show(c));
    c.addEventListener('click', () => { kept = kept === c ? null : c; show(c); }); }
})();
";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// The page.
pub fn page(r: &Report) -> String {
    let mut style = STYLE.to_owned();
    let mut dark = String::new();
    for part in Part::ALL {
        let (light, night) = colours(part);
        let key = part.key();
        let _ = writeln!(style, ".p-{key} {{ background: {light}; fill: {light} }}");
        let _ = writeln!(dark, ".p-{key} {{ background: {night}; fill: {night} }}");
    }
    let _ = write!(style, "@media (prefers-color-scheme: dark) {{\n{dark}}}\n");
    let mut out = String::new();
    let processes: Vec<String> = r
        .observed
        .processes
        .iter()
        .take(6)
        .map(|p| format!("{} ({})", p.name, p.pid))
        .collect();
    let more = r.observed.processes_seen.saturating_sub(6);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>faultless observe</title>\n<style>{style}</style></head><body>\n\
         <h1>Who waits for which lock, behind whose I/O</h1>\n\
         <p class=\"soft\">{}{more}, observed for {}; Linux {}, {} processors.{}</p>\n\
         <p class=\"verdict\">{}</p>\n",
        escape(&processes.join(", ")),
        duration(r.observed.seconds * 1e3),
        escape(&r.observed.kernel),
        r.observed.processors,
        match r.observed.command.join(" ") {
            command if command.is_empty() => String::new(),
            command => format!(" Command: <code>{}</code>", escape(&command)),
        },
        escape(&r.verdict.text)
    );
    remedies(&mut out, r);
    shares(&mut out, r);
    timeline(&mut out, r);
    blame(&mut out, &r.blame);
    convoys(&mut out, r);
    faults(&mut out, r);
    doubts(&mut out, r);
    let _ = write!(out, "<script>{SCRIPT}</script>\n</body></html>\n");
    out
}

fn remedies(out: &mut String, r: &Report) {
    if r.verdict.remedies.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h2>What would help</h2>\n<p class=\"soft\">With the share of the stalled time ({}) that each concerns; shares overlap.</p>\n<table>",
        duration(r.verdict.stalled_ms)
    );
    for remedy in &r.verdict.remedies {
        let _ = writeln!(
            out,
            "<tr><td>{:.1} %</td><td class=\"t\"><span class=\"share\" style=\"width:{:.0}px\"></span></td><td class=\"w\">{}</td></tr>",
            100.0 * remedy.share,
            (120.0 * remedy.share.min(1.0)).max(1.0),
            escape(&remedy.text)
        );
    }
    out.push_str("</table>\n");
}

fn legend(out: &mut String, parts: impl Iterator<Item = Part>, say: impl Fn(Part) -> String) {
    out.push_str("<p class=\"legend\">");
    for part in parts {
        let _ = write!(
            out,
            "<span class=\"item\"><span class=\"key p-{}\"></span>{}{}</span> ",
            part.key(),
            part.label(),
            say(part)
        );
    }
    out.push_str("</p>\n");
}

/// The two bars of where time goes.
fn shares(out: &mut String, r: &Report) {
    let sections = [
        (
            "Where the time in page faults goes",
            &r.faults.time_ms,
            r.faults.total_ms,
        ),
        (
            "Where the time of system calls that waited for mmap_lock goes",
            &r.calls.time_ms,
            r.calls.total_ms,
        ),
    ];
    for (title, by, total) in sections {
        if total <= 0.0 {
            continue;
        }
        let of = |p: Part| by.get(p.key()).copied().unwrap_or(0.0);
        let _ = write!(
            out,
            "<h2>{title}</h2>\n<p class=\"soft\">{} together</p>\n<div class=\"bar\">",
            duration(total)
        );
        for part in Part::ALL.into_iter().filter(|p| of(*p) > 0.0) {
            let _ = write!(
                out,
                "<div class=\"p-{}\" style=\"flex-grow:{:.4};flex-basis:0\" title=\"{}: {}\"></div>",
                part.key(),
                of(part),
                part.label(),
                duration(of(part))
            );
        }
        out.push_str("</div>\n");
        let shown = Part::ALL.into_iter().filter(|p| of(*p) > 0.001 * total);
        legend(out, shown, |p| format!(" {:.1} %", 100.0 * of(p) / total));
    }
}

/// Merges bins so that no more than [`BINS`] are drawn.
fn merged(lane: &LaneRow, by: usize) -> Vec<[f32; PARTS]> {
    lane.bins
        .chunks(by)
        .map(|bins| {
            let mut sum = [0.0; PARTS];
            for bin in bins {
                for (s, b) in sum.iter_mut().zip(bin) {
                    *s += b / by as f32;
                }
            }
            sum
        })
        .collect()
}

fn timeline(out: &mut String, r: &Report) {
    let t = &r.timeline;
    let total_ms = r.observed.seconds * 1e3;
    if t.lanes.is_empty() || total_ms <= 0.0 {
        return;
    }
    let lanes = &t.lanes[..t.lanes.len().min(LANES)];
    let longest = lanes.iter().map(|l| l.bins.len()).max().unwrap_or(0);
    let by = longest.div_ceil(BINS).max(1);
    let x = |ms: f64| LEFT + (ms / total_ms).clamp(0.0, 1.0) * WIDTH;
    let height = TOP + lanes.len() as f64 * (LANE + GAP) + 8.0;
    let _ = write!(
        out,
        "<h2>Timeline</h2>\n<p class=\"soft\">A lane for each thread, the most stalled first{}; what it spent its time on in faults and waits, by share, from below. Empty: elsewhere. On top the worst convoys: point at one, click to keep it.</p>\n",
        match t.lanes.len() - lanes.len() {
            0 => String::new(),
            n => format!(" ({n} more are not drawn)"),
        }
    );
    let shown = Part::ALL
        .into_iter()
        .filter(|&p| lanes.iter().any(|l| l.parts_ms[p as usize] > 0.0));
    legend(out, shown, |_| String::new());
    let _ = write!(
        out,
        "<div id=\"told\">Point at a convoy to see whom it kept waiting, and why.</div>\n\
         <svg id=\"timeline\" viewBox=\"0 0 {:.0} {height:.0}\" width=\"{:.0}\" data-top=\"{TOP}\" data-high=\"{:.0}\">\n",
        LEFT + WIDTH + 10.0,
        LEFT + WIDTH + 10.0,
        height - TOP
    );
    // A scale with a handful of round steps.
    let step = [1.0, 2.0, 5.0]
        .iter()
        .flat_map(|m| (-1..7).map(move |e| m * 10f64.powi(e)))
        .filter(|s| total_ms / s <= 10.0)
        .fold(f64::INFINITY, f64::min);
    let mut at = 0.0;
    while step.is_finite() && at <= total_ms {
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"14\" y2=\"{height:.0}\"/><text class=\"soft\" x=\"{0:.1}\" y=\"10\" text-anchor=\"middle\">{1}</text>",
            x(at),
            if at == 0.0 {
                "0".to_owned()
            } else {
                duration(at)
            }
        );
        at += step;
    }
    let bin_ms = t.bin_ms * by as f64;
    for (no, lane) in lanes.iter().enumerate() {
        let y = TOP + no as f64 * (LANE + GAP);
        let name = escape(&lane.name);
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{name} {}</text><rect class=\"lane\" data-tid=\"{}\" x=\"{LEFT}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{LANE}\"><title>{name} ({}) of process {}: {}</title></rect>",
            LEFT - 6.0,
            y + LANE - 4.0,
            lane.tid,
            lane.tid,
            lane.tid,
            lane.pid,
            spent(lane)
        );
        let bins = merged(lane, by);
        let mut paths: [String; PARTS] = Default::default();
        for (i, bin) in bins.iter().enumerate() {
            let (from, to) = (x(i as f64 * bin_ms), x((i + 1) as f64 * bin_ms));
            let mut bottom = y + LANE;
            for (part, &share) in bin.iter().enumerate() {
                let high = f64::from(share.clamp(0.0, 1.0)) * LANE;
                if high < 0.2 {
                    continue;
                }
                let high = high.min(bottom - y);
                bottom -= high;
                let _ = write!(
                    paths[part],
                    "M{from:.1} {bottom:.1}h{:.1}v{high:.1}h{:.1}z",
                    to - from,
                    from - to
                );
            }
        }
        for (part, path) in Part::ALL.into_iter().zip(&paths) {
            if !path.is_empty() {
                let _ = writeln!(
                    out,
                    "<path class=\"p-{}\" pointer-events=\"none\" d=\"{path}\"/>",
                    part.key()
                );
            }
        }
    }
    for convoy in r.convoys.iter().take(CONVOYS) {
        let mark = |d: &Deed, holder: bool| {
            let from = x(d.at_ms);
            format!(
                "[{},{from:.1},{:.1},{}]",
                d.tid,
                x(d.at_ms + d.ms) - from,
                u8::from(holder)
            )
        };
        let marks: Vec<String> = convoy
            .victims
            .iter()
            .map(|v| mark(&v.deed, false))
            .chain([mark(&convoy.holder, true)])
            .collect();
        let from = x(convoy.at_ms);
        let says = escape(&convoy.sentence);
        let _ = writeln!(
            out,
            "<rect class=\"convoy\" tabindex=\"0\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{CONVOY_BAND}\" data-says=\"{says}\" data-marks=\"[{}]\"><title>{says}</title></rect>",
            TOP - CONVOY_BAND - 6.0,
            (x(convoy.at_ms + convoy.ms) - from).max(2.0),
            marks.join(",")
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">convoys</text><g id=\"marks\"></g></svg>",
        LEFT - 6.0,
        TOP - 11.0
    );
}

/// A thread's time in words.
fn spent(lane: &LaneRow) -> String {
    let mut parts: Vec<(f64, Part)> = Part::ALL
        .into_iter()
        .map(|p| (lane.parts_ms[p as usize], p))
        .filter(|p| p.0 > 0.0)
        .collect();
    parts.sort_by(|a, b| b.0.total_cmp(&a.0));
    let all: Vec<String> = parts
        .iter()
        .map(|(ms, p)| format!("{} {}", p.label(), duration(*ms)))
        .collect();
    escape(&all.join(", "))
}

/// A table's head; columns whose name begins with `<` hold text.
fn head(out: &mut String, columns: &[&str]) {
    out.push_str("<div class=\"scroll\"><table><tr>");
    for column in columns {
        let _ = match column.strip_prefix('<') {
            Some(text) => write!(out, "<th class=\"t\">{text}</th>"),
            None => write!(out, "<th>{column}</th>"),
        };
    }
    out.push_str("</tr>\n");
}

fn blame(out: &mut String, rows: &[BlameRow]) {
    if rows.is_empty() {
        return;
    }
    out.push_str("<h2>Who kept others waiting for mmap_lock</h2>\n");
    head(
        out,
        &[
            "<Who",
            "<doing",
            "waited for",
            "share",
            "of that, faults",
            "holds",
            "held",
            "longest",
            "<the holder itself",
        ],
    );
    for b in rows.iter().take(ROWS) {
        let mut itself: Vec<(f64, String)> = b
            .holder_time_ms
            .iter()
            .filter(|(key, _)| **key != "asleep")
            .map(|(key, &ms)| {
                let part = Part::ALL.into_iter().find(|p| p.key() == *key);
                (ms, part.map_or(*key, Part::label).to_owned())
            })
            .chain(b.asleep_ms.iter().map(|(k, &ms)| (ms, k.clone())))
            .collect();
        let elsewhere: f64 = b.holder_time_ms.values().sum();
        itself.push(((b.held_ms - elsewhere).max(0.0), "running".to_owned()));
        itself.sort_by(|x, y| y.0.total_cmp(&x.0));
        let itself: Vec<String> = itself
            .iter()
            .filter(|(ms, _)| *ms >= 0.02 * b.held_ms && *ms > 0.0)
            .take(3)
            .map(|(ms, what)| format!("{what} {}", duration(*ms)))
            .collect();
        let _ = writeln!(
            out,
            "<tr><td class=\"t\">{} {}{}</td><td class=\"t\">{}</td><td>{}</td><td>{:.1} %</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"t\">{}</td></tr>",
            escape(&b.who),
            b.pid,
            if b.neighbour { " (neighbour)" } else { "" },
            escape(&b.what),
            duration(b.victim_ms),
            100.0 * b.share,
            duration(b.victim_fault_ms),
            b.holds,
            duration(b.held_ms),
            duration(b.longest_ms),
            escape(&itself.join(", "))
        );
    }
    out.push_str("</table></div>\n");
}

fn convoys(out: &mut String, r: &Report) {
    if r.convoys.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h2>The worst of {} convoys</h2>\n<p class=\"soft\">Waits of a millisecond and more, by the hold that they were due to.</p>\n",
        r.convoys_seen
    );
    for c in r.convoys.iter().take(TOLD) {
        told(out, c);
    }
}

fn told(out: &mut String, c: &ConvoyRow) {
    let _ = writeln!(
        out,
        "<details><summary>at {}: {}</summary>",
        duration(c.at_ms),
        escape(&c.sentence)
    );
    head(
        out,
        &[
            "<Thread",
            "<waited in",
            "<for",
            "from",
            "waited",
            "first attempt",
            "of that, I/O",
            "<at the retry",
        ],
    );
    for v in c.victims.iter().take(ROWS) {
        let or_dash = |ms: Option<f64>| ms.map_or_else(|| "–".to_owned(), duration);
        let _ = writeln!(
            out,
            "<tr><td class=\"t\">{} {}</td><td class=\"t\">{}</td><td class=\"t\">{}</td><td>{}</td><td>{}{}</td><td>{}</td><td>{}</td><td class=\"t\">{}</td></tr>",
            escape(&v.deed.thread),
            v.deed.tid,
            escape(&v.deed.what),
            escape(&v.deed.detail),
            duration(v.deed.at_ms),
            duration(v.deed.ms),
            if v.goes_on { " and still" } else { "" },
            or_dash(v.first_attempt_ms),
            or_dash(v.io_ms),
            match v.gone_at_retry {
                Some(true) => "page gone, read again",
                Some(false) => "page there",
                None => "–",
            }
        );
    }
    out.push_str("</table></div>\n");
    if !c.holder_stack.is_empty() {
        let _ = writeln!(
            out,
            "<p class=\"soft\">The holder slept in <code>{}</code></p>",
            escape(&c.holder_stack.join(" ← "))
        );
    }
    out.push_str("</details>\n");
}

fn faults(out: &mut String, r: &Report) {
    if r.faults.stalled > 0 {
        let q = &r.faults.latency_us;
        let _ = write!(
            out,
            "<h2>How long page faults take</h2>\n<p class=\"soft\">{} faults that slept or took mmap_lock, {} of them major. p50 {}, p90 {}, p99 {}, p99.9 {}, longest {}.</p>\n{}",
            r.faults.stalled,
            r.faults.major,
            duration(q.p50 / 1e3),
            duration(q.p90 / 1e3),
            duration(q.p99 / 1e3),
            duration(q.p999 / 1e3),
            duration(q.max / 1e3),
            distribution(&r.faults.histogram).unwrap_or_default()
        );
    }
    if !r.groups.is_empty() {
        out.push_str("<h2>Threads</h2>\n");
        head(
            out,
            &[
                "<Threads",
                "<process",
                "number",
                "major faults",
                "time",
                "for mmap_lock",
                "in reads",
                "without a processor",
                "calls for mmap_lock",
                "p50",
                "p99",
                "longest",
            ],
        );
        for g in r.groups.iter().take(ROWS) {
            let _ = writeln!(
                out,
                "<tr><td class=\"t\">{}</td><td class=\"t\">{} {}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(&g.name),
                escape(&g.process),
                g.pid,
                g.threads,
                g.major,
                duration(g.total_ms),
                duration(g.lock_wait_ms),
                duration(g.device_ms),
                duration(g.runnable_ms),
                duration(g.call_wait_ms),
                duration(g.latency_us.p50 / 1e3),
                duration(g.latency_us.p99 / 1e3),
                duration(g.latency_us.max / 1e3)
            );
        }
        out.push_str("</table></div>\n");
    }
    if !r.files.is_empty() {
        out.push_str("<h2>Files</h2>\n");
        head(
            out,
            &[
                "<File",
                "major faults",
                "gone at the retry",
                "time",
                "for mmap_lock",
                "in reads",
                "p50",
                "p99",
                "longest",
            ],
        );
        for f in r.files.iter().take(ROWS) {
            let _ = writeln!(
                out,
                "<tr><td class=\"t\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(&f.path),
                f.major,
                f.gone_at_retry,
                duration(f.total_ms),
                duration(f.lock_wait_ms),
                duration(f.device_ms),
                duration(f.latency_us.p50 / 1e3),
                duration(f.latency_us.p99 / 1e3),
                duration(f.latency_us.max / 1e3)
            );
        }
        out.push_str("</table></div>\n");
    }
}

/// Placeholder colours, for which the style sheet has the real ones.
const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);
const BARS: RGBColor = RGBColor(3, 3, 3);

fn distribution(histogram: &[(f64, f64, u64)]) -> Option<String> {
    let (first, last) = (histogram.first()?, histogram.last()?);
    let most = histogram.iter().map(|b| b.2).max()?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (760, 220)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(60)
            .build_cartesian_2d(
                (first.0.max(1.0)..last.1).log_scale(),
                0..most + most / 20 + 1,
            )
            .ok()?;
        chart
            .configure_mesh()
            .axis_style(GRID)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 11).into_font().color(&INK))
            .x_label_formatter(&|us| duration(us / 1e3))
            .draw()
            .ok()?;
        chart
            .draw_series(
                histogram.iter().filter(|b| b.2 > 0).map(|&(from, to, n)| {
                    Rectangle::new([(from.max(1.0), 0), (to, n)], BARS.filled())
                }),
            )
            .ok()?;
        area.present().ok()?;
    }
    Some(
        svg.replace("#010101", "var(--ink)")
            .replace("#020202", "var(--faint)")
            .replace("#030303", "var(--convoy)"),
    )
}

fn doubts(out: &mut String, r: &Report) {
    let d = &r.doubts;
    out.push_str("<h2>How far to trust this</h2>\n<ul>\n");
    let _ = writeln!(
        out,
        "<li>{}</li>",
        match d.lost {
            0 => "No record was lost.".to_owned(),
            n => format!("<strong>{n} records were lost</strong>: sums of waits are too small."),
        }
    );
    let _ = writeln!(
        out,
        "<li>When {} waits began, the lock itself named its writer; for {} of them this report has another one.</li>",
        d.checked, d.out_of_step
    );
    let _ = writeln!(
        out,
        "<li>For {} of {} of waits no holder was seen.</li>",
        duration(d.unexplained_ms),
        duration(d.waited_ms)
    );
    if d.strays > 0 {
        let _ = writeln!(
            out,
            "<li>{} acquisitions or releases had no counterpart: the lock was held when the observation began, or was let go by another task.</li>",
            d.strays
        );
    }
    for missing in &r.observed.missing {
        let _ = writeln!(
            out,
            "<li>The tracepoint <code>{}</code> was not used, since the kernel lacks it, or (with FUSE as a module) CAP_SYS_ADMIN was lacking; what it tells is missing.</li>",
            escape(missing)
        );
    }
    if r.observed.other_mounts {
        let _ = writeln!(out, "<li>{}</li>", crate::OTHER_MOUNTS);
    }
    let _ = writeln!(
        out,
        "<li>{}</li>\n<li>The observer itself used {:.2} s of processor time, without what its programs take in the kernel.</li>\n</ul>",
        escape(r.bounds),
        r.observed.own_cpu_seconds
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_is_called_is_not_markup() {
        let mut model = crate::model::Model::new(1_000_000);
        let name = "<script>\"&".to_owned();
        model.event(&faultless_trace::Event::Thread(faultless_trace::Thread {
            at: 0,
            tid: 7,
            pid: 7,
            name,
        }));
        model.event(&faultless_trace::Event::Process(faultless_trace::Process {
            at: 0,
            pid: 7,
            change: faultless_trace::ProcessChange::Watched,
        }));
        let sums = crate::sums::FaultSums {
            faults: 1,
            total: 5_000_000,
            wait: 4_000_000,
            ..Default::default()
        };
        model.add_faults(7, 7, None, &sums, 9_000_000);
        let observed = crate::Observed {
            processes: vec![crate::ProcessRow {
                pid: 7,
                name: "<b>".into(),
            }],
            seconds: 0.01,
            ..Default::default()
        };
        let page = page(&crate::report::report(&model, observed, None));
        assert!(page.contains("&lt;script&gt;&quot;&amp;"));
        assert!(!page.contains("<script>\"") && !page.contains("<b>"));
        assert_eq!(page.matches("</svg>").count(), page.matches("<svg").count());
    }
}
