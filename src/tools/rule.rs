//! How many ranks a module keeps, by its singular values: sd-scripts' definitions (`resize_lora.py`), so that its numbers mean the same here.
//!
//! With S falling, k is at least 1 and at most one less than the smaller side of the weight:
//!
//! | method | k | rank |
//! |---|---|---|
//! | fixed | | the given one |
//! | sv_ratio | how many `S_i > S_0 / param` | k + 1 |
//! | sv_cumulative | 1 + the first i where `sum(S_0..S_i) >= param * sum(S)` | k + 1 |
//! | sv_fro | 1 + the first i where `sum(S_0^2..S_i^2) >= param^2 * sum(S^2)` | k + 1 |
//!
//! Never more than the given rank; one where S_0 is 1e-6 or less.

/// A method of picking ranks, with its parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// The given rank.
    Fixed,
    /// By the ratio of the largest singular value to the smallest kept; 2 or more is usual.
    Ratio(f64),
    /// By the share of the sum of the singular values, 0 to 1.
    Cumulative(f64),
    /// By the share of the Frobenius norm, 0 to 1.
    Frobenius(f64),
}

/// Below this a module counts as empty.
const LEAST: f64 = 1e-6;

impl Method {
    /// Its name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Method::Fixed => "fixed",
            Method::Ratio(_) => "sv_ratio",
            Method::Cumulative(_) => "sv_cumulative",
            Method::Frobenius(_) => "sv_fro",
        }
    }

    /// The parameter of the methods that have one.
    pub fn param(self) -> Option<f64> {
        match self {
            Method::Fixed => None,
            Method::Ratio(p) | Method::Cumulative(p) | Method::Frobenius(p) => Some(p),
        }
    }

    /// The rank that singular values, in falling order, ask for. `side` is the smaller side of the weight (values that are not listed
    /// are 0), `limit` the most.
    pub fn rank(self, values: &[f64], side: usize, limit: usize) -> usize {
        if values.first().is_none_or(|s| *s <= LEAST) {
            return 1;
        }
        let k = match self {
            Method::Fixed => return limit,
            Method::Ratio(param) => values.iter().filter(|s| **s > values[0] / param).count(),
            Method::Cumulative(param) => reach(values.iter().copied(), param),
            Method::Frobenius(param) => reach(values.iter().map(|s| s * s), param * param),
        };
        (k.clamp(1, side.saturating_sub(1).max(1)) + 1).min(limit)
    }
}

/// How many of the terms it takes to reach this share of their sum.
fn reach(terms: impl Iterator<Item = f64> + Clone, share: f64) -> usize {
    let sum: f64 = terms.clone().sum();
    let mut so_far = 0.0;
    let before = terms.take_while(|term| {
        so_far += term;
        so_far / sum < share
    });
    before.count() + 1
}

/// What `rank` of the singular values keep: the share of their sum and of their Frobenius norm.
pub fn retained(values: &[f64], rank: usize) -> (f64, f64) {
    let kept = &values[..rank.min(values.len())];
    let squares = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>();
    let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 1.0 };
    let sum = share(kept.iter().sum(), values.iter().sum());
    (sum, share(squares(kept), squares(values)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_pick_what_their_definitions_say() {
        let s = [8.0, 4.0, 2.0, 1.0, 1.0];
        // S > 8 / 3: two of them.
        assert_eq!(Method::Ratio(3.0).rank(&s, 100, 100), 3);
        assert_eq!(Method::Ratio(8.0).rank(&s, 100, 100), 4);
        // 12 of 16 is reached by the second, exactly.
        assert_eq!(Method::Cumulative(0.75).rank(&s, 100, 100), 3);
        assert_eq!(Method::Cumulative(0.76).rank(&s, 100, 100), 4);
        // 80 of 86: 0.9645 of the norm.
        assert_eq!(Method::Frobenius(0.96).rank(&s, 100, 100), 3);
        assert_eq!(Method::Frobenius(0.97).rank(&s, 100, 100), 4);
        assert_eq!(Method::Fixed.rank(&s, 100, 7), 7);
    }

    #[test]
    fn the_ends_are_clamped() {
        let s = [8.0, 4.0, 2.0, 1.0, 1.0];
        // k is at most 4 of the 5 of a weight this small, so the rank is at most 5.
        assert_eq!(Method::Ratio(1e9).rank(&s, 5, 100), 5);
        assert_eq!(Method::Cumulative(1.0).rank(&s, 100, 100), 6);
        assert_eq!(Method::Cumulative(2.0).rank(&s, 100, 100), 7);
        assert_eq!(Method::Ratio(0.5).rank(&s, 100, 100), 2, "no value is larger: k is 1 all the same");
        assert_eq!(Method::Cumulative(0.9).rank(&s, 100, 2), 2, "the limit");
        for method in [Method::Fixed, Method::Ratio(2.0), Method::Cumulative(0.5), Method::Frobenius(0.5)] {
            assert_eq!(method.rank(&[1e-6, 0.0], 100, 8), 1, "an empty module");
            assert_eq!(method.rank(&[], 100, 8), 1);
        }
    }

    #[test]
    fn shares_are_of_the_whole() {
        assert_eq!(retained(&[3.0, 4.0], 1), (3.0 / 7.0, 3.0 / 5.0));
        assert_eq!(retained(&[3.0, 4.0], 9), (1.0, 1.0));
        assert_eq!(retained(&[0.0], 1), (1.0, 1.0));
    }
}
