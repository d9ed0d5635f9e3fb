//! Chance, for spreading what would otherwise happen together. It is no source of secrets.

/// A number from 0 to 1.
#[must_use]
pub fn chance() -> f64 {
    let (_, low) = uuid::Uuid::new_v4().as_u64_pair();
    // The low half of a random UUID has 62 random bits.
    (low & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_spread_between_nought_and_one() {
        let throws: Vec<f64> = (0..10_000).map(|_| chance()).collect();
        assert!(throws.iter().all(|throw| (0.0..1.0).contains(throw)));
        let mean = throws.iter().sum::<f64>() / 10_000.0;
        assert!((0.48..0.52).contains(&mean), "{mean}");
    }
}
