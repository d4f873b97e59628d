//! Medians, how far rounds lie apart, and ratios that say how far.

use serde::Serialize;

/// The middle value, or the mean of the middle two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The least and the most of several rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Range {
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Range {
    /// Of some values; `None` where there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Range> {
        values.into_iter().fold(None, |range, x| {
            let range = range.unwrap_or(Range { min: x, max: x });
            Some(Range {
                min: range.min.min(x),
                max: range.max.max(x),
            })
        })
    }

    /// Whether a value lies in it.
    pub fn covers(&self, x: f64) -> bool {
        (self.min..=self.max).contains(&x)
    }

    /// The range of a figure that is made from this one, and falls where this one rises or rises with it.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Range {
        let (a, b) = (f(self.min), f(self.max));
        Range {
            min: a.min(b),
            max: a.max(b),
        }
    }

    /// As text, with numbers as `show` writes them: one, where both ends are written alike.
    pub fn text(&self, show: impl Fn(f64) -> String) -> String {
        let (min, max) = (show(self.min), show(self.max));
        if min == max {
            min
        } else {
            format!("{min}–{max}")
        }
    }
}

/// How many times as fast as the baseline.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// Of the medians.
    pub value: f64,
    /// The ratios of single rounds, each to the baseline's in the same round, lie here.
    pub range: Range,
    /// So many rounds have both.
    pub rounds: usize,
}

impl Ratio {
    /// Of reads per second by round: the contender's and the baseline's. `None` where no round has both.
    pub fn of(own: &[(usize, f64)], baseline: &[(usize, f64)]) -> Option<Ratio> {
        let pairs: Vec<(f64, f64)> = own
            .iter()
            .filter_map(|&(round, x)| {
                let (_, base) = baseline.iter().find(|&&(r, b)| r == round && b > 0.0)?;
                Some((x, *base))
            })
            .collect();
        let range = Range::of(pairs.iter().map(|(x, base)| x / base))?;
        let (own, baseline): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
        Some(Ratio {
            value: median(own) / median(baseline),
            range,
            rounds: pairs.len(),
        })
    }

    /// Whether some rounds say that it is faster than the baseline and some that it is slower, or one says neither: then
    /// these rounds tell no difference.
    pub fn is_about_one(&self) -> bool {
        self.rounds > 1 && self.range.covers(1.0)
    }

    /// As text: `≈ 1` where the rounds tell no difference.
    pub fn text(&self) -> String {
        if self.is_about_one() {
            "≈ 1".to_owned()
        } else {
            format!("{:.2}", self.value)
        }
    }

    /// Its spread as text; `None` where a single round says nothing of it.
    pub fn spread(&self) -> Option<String> {
        (self.rounds > 1).then(|| self.range.text(|x| format!("{x:.2}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }

    #[test]
    fn a_range_says_both_ends_once() {
        let show = |x: f64| format!("{x:.1} k");
        let range = Range::of([2.0, 1.0, 3.26]).expect("values");
        assert_eq!(range.text(show), "1.0 k–3.3 k");
        let narrow = Range::of([2.01, 2.04]).expect("values");
        assert_eq!(narrow.text(show), "2.0 k");
        assert_eq!(Range::of([]), None);
        assert_eq!(
            range.map(|x| -x),
            Range {
                min: -3.26,
                max: -1.0
            }
        );
    }

    #[test]
    fn a_ratio_whose_spread_covers_one_is_about_one() {
        let mmap = [(0, 100.0), (1, 200.0), (2, 100.0)];
        let same = Ratio::of(&[(0, 110.0), (1, 190.0), (2, 120.0)], &mmap).expect("rounds");
        assert_eq!((same.text().as_str(), same.value), ("≈ 1", 1.2));
        assert_eq!(same.spread().as_deref(), Some("0.95–1.20"));
        let faster = Ratio::of(&[(0, 150.0), (1, 400.0), (2, 210.0)], &mmap).expect("rounds");
        assert_eq!(faster.text(), "2.10");
        assert_eq!(faster.spread().as_deref(), Some("1.50–2.10"));
        assert!(faster.range.covers(faster.value));
    }

    #[test]
    fn one_round_has_no_spread_and_rounds_are_paired() {
        let one = Ratio::of(&[(1, 200.0)], &[(0, 100.0), (1, 200.0)]).expect("a round");
        assert_eq!((one.text().as_str(), one.spread()), ("1.00", None));
        assert_eq!(Ratio::of(&[(2, 1.0)], &[(0, 1.0)]), None);
    }
}
