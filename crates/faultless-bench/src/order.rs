//! Which contender goes first: the order of the contenders, round by round.
//!
//! All contenders of a round read the same pages, and a device may have a cache of its own: the first contender of a
//! round pays for those that follow. So each contender is first equally often.

use crate::data::mix;

/// Fewest rounds, unless told otherwise: with fewer there is no median.
const ROUNDS_MIN: usize = 3;

/// The fewest rounds, but three at least, in which each of so many contenders can be first equally often.
pub fn balanced_rounds(contenders: usize) -> usize {
    ROUNDS_MIN.next_multiple_of(contenders.max(1))
}

/// The order of the contenders `0..contenders` in each of so many rounds.
///
/// Each cycle of `contenders` rounds has each contender in each place once; with an even number of contenders, each also
/// comes right behind each other one once. The seed draws the order of the rounds of each cycle. A last cycle that is cut
/// short has different contenders in its first places: none is first twice more often than another.
pub fn orders(contenders: usize, rounds: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = Vec::new();
    let mut random = seed;
    while contenders > 0 && all.len() < rounds {
        let mut cycle = square(contenders);
        for i in (1..cycle.len()).rev() {
            random = mix(random);
            cycle.swap(i, (random % (i as u64 + 1)) as usize);
        }
        all.extend(cycle);
    }
    all.truncate(rounds);
    all
}

/// A Latin square: the first row is 0, 1, n - 1, 2, n - 2 and so on, and each further row is the one before plus one. (If
/// n is even, the differences of neighbours in a row are all different: the square is Williams's.)
fn square(n: usize) -> Vec<Vec<usize>> {
    let first = |place: usize| match place {
        0 => 0,
        odd if odd % 2 == 1 => odd.div_ceil(2),
        even => n - even / 2,
    };
    (0..n)
        .map(|row| (0..n).map(|place| (first(place) + row) % n).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_in(orders: &[Vec<usize>], contenders: usize) -> Vec<usize> {
        (0..contenders)
            .map(|c| orders.iter().filter(|o| o[0] == c).count())
            .collect()
    }

    #[test]
    fn each_contender_is_in_each_place_equally_often() {
        for n in 1..=6 {
            for cycles in 1..=3 {
                let all = orders(n, n * cycles, 7);
                assert_eq!(all.len(), n * cycles);
                for place in 0..n {
                    for contender in 0..n {
                        let times = all.iter().filter(|o| o[place] == contender).count();
                        assert_eq!(times, cycles, "{contender} of {n} in place {place}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_even_number_of_contenders_follow_each_other_equally_often() {
        for n in [2, 4, 6] {
            let all = orders(n, n, 7);
            for before in 0..n {
                for after in (0..n).filter(|&a| a != before) {
                    let times = all
                        .iter()
                        .filter(|o| o.windows(2).any(|w| w == [before, after]))
                        .count();
                    assert_eq!(times, 1, "{after} behind {before} of {n}");
                }
            }
        }
    }

    #[test]
    fn a_cycle_that_is_cut_short_differs_by_one_and_is_drawn_by_the_seed() {
        for n in 2..=5 {
            for rounds in 1..=3 * n {
                let first = first_in(&orders(n, rounds, 3), n);
                let (least, most) = (first.iter().min(), first.iter().max());
                assert!(
                    most.zip(least).is_some_and(|(m, l)| m - l <= 1),
                    "{first:?}"
                );
            }
        }
        assert_eq!(orders(4, 3, 5), orders(4, 3, 5));
        let first: Vec<usize> = (0..100).map(|seed| orders(4, 1, seed)[0][0]).collect();
        for contender in 0..4 {
            assert!(first.contains(&contender), "{contender} is never drawn");
        }
    }

    #[test]
    fn the_default_number_of_rounds_comes_out() {
        assert_eq!([1, 2, 3, 4, 5].map(balanced_rounds), [3, 4, 3, 4, 5]);
        assert_eq!(balanced_rounds(0), 3);
        assert!(orders(0, 3, 1).is_empty());
    }
}
