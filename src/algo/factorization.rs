//! LyCORIS's way to write a size as a product of two.

/// (small, large) with `small * large = size`: `factor` and its cofactor where it divides, else as even as can be with a small one up to
/// `factor`; below 0 there is no bound.
pub fn factorization(size: usize, factor: i64) -> (usize, usize) {
    let bound = usize::try_from(factor).ok();
    if let Some(factor) = bound.filter(|&f| f > 0 && size % f == 0) {
        let other = size / factor;
        return (factor.min(other), factor.max(other));
    }
    // Up to the root of the size the sum of a divisor and its cofactor falls.
    let divisors = (1..=size).take_while(|&m| m <= size / m).filter(|m| size % m == 0);
    let small = divisors.filter(|&m| bound.is_none_or(|bound| m <= bound)).last().unwrap_or(1);
    (small, size / small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_those_of_lycoris() {
        // lycoris.functional.general.factorization 4.1.3.
        for (size, factor, want) in [
            (320, -1, (16, 20)),
            (768, -1, (24, 32)),
            (1280, -1, (32, 40)),
            (3072, -1, (48, 64)),
            (5120, 20, (20, 256)),
            (3072, 20, (16, 192)),
            (12288, 64, (64, 192)),
            (127, -1, (1, 127)),
            (127, 8, (1, 127)),
            (250, 8, (5, 50)),
            (11008, -1, (86, 128)),
            (320, 64, (5, 64)),
            (1, -1, (1, 1)),
        ] {
            assert_eq!(factorization(size, factor), want, "{size} by {factor}");
        }
    }
}
