//! The live view of `faultless observe`.
//!
//! A frame is a report of the whole time, a report of what came since some seconds ago, and what goes on just now. Keys
//! sort, freeze, and open a convoy; frozen, the observation goes on and the picture stands still.

use faultless_observe::{ConvoyRow, Group, Observer, Report, duration};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Table, TableState, Wrap};
use ratatui::{DefaultTerminal, Frame};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the picture changes.
const FRAME: Duration = Duration::from_millis(500);
/// What "the last seconds" are.
const RECENT: Duration = Duration::from_secs(10);
/// How long a key may wait.
const TICK: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Time,
    Lock,
    Device,
    Major,
}

impl Sort {
    fn next(self) -> Sort {
        match self {
            Sort::Time => Sort::Lock,
            Sort::Lock => Sort::Device,
            Sort::Device => Sort::Major,
            Sort::Major => Sort::Time,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Sort::Time => "time",
            Sort::Lock => "mmap_lock",
            Sort::Device => "device",
            Sort::Major => "major faults",
        }
    }

    fn key(self, g: &Group) -> f64 {
        match self {
            Sort::Time => g.total_ms + g.call_wait_ms,
            Sort::Lock => g.lock_wait_ms + g.call_wait_ms,
            Sort::Device => g.device_ms,
            Sort::Major => g.major as f64,
        }
    }
}

struct View {
    sort: Sort,
    frozen: bool,
    /// The convoy that is chosen, and whether it is open.
    chosen: TableState,
    open: bool,
    /// The whole time, and sums at the end of each frame of the last seconds.
    report: Report,
    before: VecDeque<(Instant, Sums)>,
    now: Sums,
    going_on: Vec<String>,
    plain: bool,
}

/// What rates are made of.
#[derive(Debug, Clone, Default)]
struct Sums {
    major: u64,
    gone: u64,
    parts: Vec<(&'static str, f64)>,
}

impl Sums {
    fn of(r: &Report) -> Sums {
        Sums {
            major: r.faults.major,
            gone: r.faults.gone_at_retry,
            parts: r.faults.time_ms.iter().map(|(k, v)| (*k, *v)).collect(),
        }
    }
}

/// Shows the view until a key, a signal, a time, or the processes end it.
pub(crate) fn run(
    observer: &mut Observer,
    until: Option<Instant>,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, observer, until, stop);
    ratatui::restore();
    result
}

fn show(
    terminal: &mut DefaultTerminal,
    observer: &mut Observer,
    until: Option<Instant>,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let report = observer.report(Some(RECENT));
    let mut view = View {
        sort: Sort::Time,
        frozen: false,
        chosen: TableState::default(),
        open: false,
        now: Sums::of(&report),
        before: VecDeque::from([(Instant::now(), Sums::of(&report))]),
        report,
        going_on: Vec::new(),
        plain: std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()),
    };
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed)
        && observer.is_anyone_there()
        && until.is_none_or(|u| Instant::now() < u)
    {
        observer.tick(TICK);
        let mut changed = false;
        while event::poll(Duration::ZERO)? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    changed = true;
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    if key.code == KeyCode::Char('c') && control {
                        return Ok(());
                    }
                    if view.key(key.code) {
                        return Ok(());
                    }
                }
                Event::Resize(..) => changed = true,
                _ => {}
            }
        }
        if Instant::now() >= next {
            next = Instant::now() + FRAME;
            if !view.frozen {
                view.refresh(observer);
            }
            changed = true;
        }
        if changed {
            terminal.draw(|frame| view.draw(frame))?;
        }
    }
    Ok(())
}

impl View {
    /// Whether the view ends.
    fn key(&mut self, code: KeyCode) -> bool {
        let last = self.report.convoys.len().checked_sub(1);
        let at = self.chosen.selected();
        match code {
            KeyCode::Char('q') => return true,
            KeyCode::Esc if self.open => self.open = false,
            KeyCode::Esc => self.chosen.select(None),
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('f' | ' ') => self.frozen = !self.frozen,
            KeyCode::Down | KeyCode::Char('j') => {
                self.chosen
                    .select(last.map(|last| at.map_or(0, |n| (n + 1).min(last))));
            }
            KeyCode::Up | KeyCode::Char('k') => {
                self.chosen
                    .select(last.map(|_| at.unwrap_or(0).saturating_sub(1)));
            }
            KeyCode::Enter if last.is_some() => {
                self.chosen.select(Some(at.unwrap_or(0)));
                self.open = !self.open;
                // What is being read does not change under the reader.
                self.frozen |= self.open;
            }
            _ => {}
        }
        false
    }

    fn refresh(&mut self, observer: &mut Observer) {
        self.report = observer.report(Some(RECENT));
        self.going_on = observer.going_on();
        self.now = Sums::of(&self.report);
        self.before.push_back((Instant::now(), self.now.clone()));
        while self.before.len() > 1 && self.before[0].0.elapsed() > RECENT {
            self.before.pop_front();
        }
        if self.chosen.selected() >= Some(self.report.convoys.len()) {
            self.chosen.select(None);
        }
    }

    fn style(&self, colour: Color) -> Style {
        if self.plain {
            Style::new()
        } else {
            Style::new().fg(colour)
        }
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let going_on = self.going_on.len().min(4) as u16;
        let [head, parts, middle, blame, convoys, now, keys] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(4),
            Constraint::Fill(2),
            Constraint::Fill(2),
            Constraint::Fill(2),
            Constraint::Length(if going_on > 0 { going_on + 1 } else { 0 }),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        self.head(frame, head);
        self.parts(frame, parts);
        let [groups, files] =
            Layout::horizontal([Constraint::Fill(3), Constraint::Fill(2)]).areas(middle);
        self.groups(frame, groups);
        self.files(frame, files);
        self.blame(frame, blame);
        self.convoys(frame, convoys);
        if going_on > 0 {
            let mut lines = vec![Line::from(Span::styled(
                "Just now",
                Style::new().add_modifier(Modifier::BOLD),
            ))];
            lines.extend(
                self.going_on
                    .iter()
                    .take(4)
                    .map(|l| Line::from(format!(" {l}"))),
            );
            frame.render_widget(Paragraph::new(lines), now);
        }
        let frozen = if self.frozen {
            "  FROZEN (f goes on)"
        } else {
            ""
        };
        let help = format!(
            " q end   s sort: {}   f freeze   ↑↓ choose a convoy   Enter open it{frozen}",
            self.sort.name()
        );
        let style = Style::new().add_modifier(Modifier::REVERSED);
        frame.render_widget(Paragraph::new(help).style(style), keys);
        if self.open
            && let Some(convoy) = self
                .chosen
                .selected()
                .and_then(|n| self.report.convoys.get(n))
        {
            drill(frame, convoy);
        }
    }

    /// Milliseconds of each part, and faults, since the window began.
    fn window(&self) -> (f64, Sums) {
        let Some((began, before)) = self.before.front() else {
            return (1.0, Sums::default());
        };
        let end = self.before.back().map_or(*began, |b| b.0);
        let seconds = (end - *began).as_secs_f64().max(1e-3);
        let parts = self
            .now
            .parts
            .iter()
            .zip(&before.parts)
            .map(|(now, before)| (now.0, (now.1 - before.1).max(0.0)))
            .collect();
        let sums = Sums {
            major: self.now.major - before.major.min(self.now.major),
            gone: self.now.gone - before.gone.min(self.now.gone),
            parts,
        };
        (seconds, sums)
    }

    fn head(&self, frame: &mut Frame<'_>, area: Rect) {
        let r = &self.report;
        let (seconds, sums) = self.window();
        let names: Vec<String> = r
            .observed
            .processes
            .iter()
            .take(3)
            .map(|p| format!("{} {}", p.name, p.pid))
            .collect();
        let lost = match r.doubts.lost {
            0 => String::new(),
            n => format!("   {n} RECORDS LOST"),
        };
        let lines = vec![
            Line::from(vec![
                Span::styled(
                    format!("{:.0} major faults/s", sums.major as f64 / seconds),
                    Style::new().add_modifier(Modifier::BOLD),
                ),
                Span::raw(format!(
                    "   p99 {}   page gone at the retry {}   convoys {}{lost}",
                    duration(r.faults.latency_us.p99 / 1e3),
                    r.faults.gone_at_retry,
                    r.convoys_seen,
                )),
            ]),
            Line::from(format!(
                "{}   {} in all; rates are of the last {:.0} s",
                names.join(", "),
                duration(r.observed.seconds * 1e3),
                seconds
            )),
        ];
        frame.render_widget(Paragraph::new(lines), area);
    }

    fn colour(key: &str) -> Color {
        match key {
            "device" => Color::Blue,
            "page_lock" => Color::Cyan,
            "mmap_lock_behind_writer" => Color::Yellow,
            "mmap_lock_behind_reader" => Color::Red,
            "mmap_lock_hand_over" => Color::LightYellow,
            "reclaim" => Color::Magenta,
            "running" => Color::Green,
            "runnable" => Color::Gray,
            _ => Color::DarkGray,
        }
    }

    /// Where time in faults goes: a bar, and its legend.
    fn parts(&self, frame: &mut Frame<'_>, area: Rect) {
        let (_, sums) = self.window();
        let total: f64 = sums.parts.iter().map(|p| p.1).sum();
        let mut parts = sums.parts;
        parts.retain(|p| p.1 > 0.0);
        parts.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut bar = Vec::new();
        let mut legend = Vec::new();
        let fills = ['█', '▓', '▒', '░', '#', '=', '+', '-', ':', '.'];
        for (no, (key, ms)) in parts.iter().enumerate() {
            let fill = if self.plain {
                fills[no % fills.len()]
            } else {
                '█'
            };
            let width = (ms / total * f64::from(area.width)).round() as usize;
            let style = self.style(Self::colour(key));
            bar.push(Span::styled(fill.to_string().repeat(width), style));
            legend.push(Span::styled(format!("{fill} "), style));
            legend.push(Span::raw(format!(
                "{} {:.0} %   ",
                key.replace('_', " "),
                100.0 * ms / total
            )));
        }
        let title = Line::from(Span::styled(
            "Where the time in faults goes",
            Style::new().add_modifier(Modifier::BOLD),
        ));
        let lines = if total > 0.0 {
            vec![title, Line::from(bar), Line::from(legend)]
        } else {
            vec![title, Line::from("no fault slept or took mmap_lock")]
        };
        frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: true }), area);
    }

    fn groups(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut groups: Vec<&Group> = self.report.groups.iter().collect();
        groups.sort_by(|a, b| self.sort.key(b).total_cmp(&self.sort.key(a)));
        let rows = groups.iter().map(|g| {
            Row::new([
                format!("{} ×{}", g.name, g.threads),
                g.major.to_string(),
                duration(g.total_ms),
                duration(g.lock_wait_ms),
                duration(g.device_ms),
                duration(g.call_wait_ms),
                duration(g.latency_us.p99 / 1e3),
            ])
        });
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(9),
            Constraint::Length(8),
            Constraint::Length(9),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(8),
        ];
        let header = [
            "Threads",
            "major",
            "time",
            "mmap_lock",
            "device",
            "calls",
            "p99",
        ];
        frame.render_widget(table(rows, widths, header), area);
    }

    fn files(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.report.files.iter().map(|f| {
            Row::new([
                shorten(&f.path, area.width.saturating_sub(28) as usize),
                f.major.to_string(),
                duration(f.total_ms),
                duration(f.device_ms),
            ])
        });
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(9),
            Constraint::Length(8),
            Constraint::Length(8),
        ];
        frame.render_widget(
            table(rows, widths, ["Files", "major", "time", "device"]),
            area,
        );
    }

    fn blame(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.report.blame.iter().map(|b| {
            Row::new([
                format!(
                    "{} {}{}",
                    b.who,
                    b.pid,
                    if b.neighbour { " (neighbour)" } else { "" }
                ),
                b.what.clone(),
                duration(b.victim_ms),
                format!("{:.0} %", 100.0 * b.share),
                duration(b.longest_ms),
                crate::observe::mostly(b),
            ])
        });
        let widths = [
            Constraint::Fill(2),
            Constraint::Fill(2),
            Constraint::Length(10),
            Constraint::Length(6),
            Constraint::Length(8),
            Constraint::Fill(2),
        ];
        let header = [
            "Who keeps others waiting",
            "doing",
            "waited for",
            "share",
            "longest",
            "holder was",
        ];
        frame.render_widget(table(rows, widths, header), area);
    }

    fn convoys(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.report.convoys.iter().map(|c| {
            Row::new([
                Cell::from(format!(
                    "−{}",
                    duration(self.report.observed.seconds * 1e3 - c.at_ms)
                )),
                Cell::from(duration(c.victim_ms)),
                Cell::from(c.waits.to_string()),
                Cell::from(format!("{} {}", c.holder.thread, c.holder.tid)),
                Cell::from(c.holder.what.clone()),
                Cell::from(duration(c.holder.ms)),
                Cell::from(c.holder_was.clone()),
            ])
        });
        let widths = [
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(5),
            Constraint::Fill(2),
            Constraint::Fill(3),
            Constraint::Length(8),
            Constraint::Fill(3),
        ];
        let header = [
            "Convoys", "waited", "waits", "behind", "doing", "held", "it was",
        ];
        let table = table(rows, widths, header)
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
        frame.render_stateful_widget(table, area, &mut self.chosen);
    }
}

fn table<'a, const N: usize>(
    rows: impl IntoIterator<Item = Row<'a>>,
    widths: [Constraint; N],
    header: [&'static str; N],
) -> Table<'a> {
    Table::new(rows, widths)
        .header(Row::new(header).style(Style::new().add_modifier(Modifier::BOLD)))
        .column_spacing(1)
}

/// The end of a path says more than its beginning.
fn shorten(path: &str, width: usize) -> String {
    let length = path.chars().count();
    if length <= width || width < 2 {
        return path.to_owned();
    }
    let end: String = path.chars().skip(length - (width - 1)).collect();
    format!("…{end}")
}

/// A convoy, over the rest.
fn drill(frame: &mut Frame<'_>, c: &ConvoyRow) {
    let all = frame.area();
    let area = Rect {
        x: all.width / 20,
        y: all.height / 10,
        width: all.width - all.width / 10,
        height: all.height - all.height / 5,
    };
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let mut lines = vec![Line::from(c.sentence.clone()), Line::from("")];
    if !c.holder_stack.is_empty() {
        lines.push(Line::from(Span::styled("The holder slept in", bold)));
        lines.push(Line::from(c.holder_stack.join(" ← ")));
        lines.push(Line::from(""));
    }
    lines.push(Line::from(Span::styled("Who waited", bold)));
    for v in &c.victims {
        let mut line = format!(
            "{:>9}  {} ({}) in {}",
            duration(v.deed.ms),
            v.deed.thread,
            v.deed.tid,
            v.deed.what
        );
        if !v.deed.detail.is_empty() {
            line.push_str(&format!(" of {}", v.deed.detail));
        }
        if let (Some(first), Some(io)) = (v.first_attempt_ms, v.io_ms) {
            line.push_str(&format!(
                "; first attempt {}, of that I/O {}; {}",
                duration(first),
                duration(io),
                match v.gone_at_retry {
                    Some(true) => "the page was gone at the retry",
                    _ => "the page was there at the retry",
                }
            ));
        }
        if v.goes_on {
            line.push_str("; still waits");
        }
        lines.push(Line::from(line));
    }
    frame.render_widget(Clear, area);
    frame.render_widget(
        Paragraph::new(lines)
            .wrap(Wrap { trim: false })
            .block(Block::bordered().title(" convoy (Esc closes it) ")),
        area,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_keep_their_end() {
        assert_eq!(shorten("/var/lib/index/vectors.bin", 12), "…vectors.bin");
        assert_eq!(shorten("/short", 12), "/short");
    }

    #[test]
    fn sorting_comes_round() {
        let all = [Sort::Time, Sort::Lock, Sort::Device, Sort::Major];
        let mut sort = Sort::Time;
        for expected in all.into_iter().skip(1).chain([Sort::Time]) {
            sort = sort.next();
            assert_eq!(sort, expected);
        }
    }
}
