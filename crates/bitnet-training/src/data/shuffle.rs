//! A permutation of `0..n` that takes no memory: where an item lands is computed from the seed.
//!
//! A Feistel network permutes the numbers of an even count of bits; results that are too large go
//! through it again until one is not (cycle walking), which permutes `0..n` itself.

/// Rounds of the network. Four mix well enough for shuffling; this is no cipher.
const ROUNDS: u64 = 4;

/// A permutation of `0..n`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shuffle {
    n: u64,
    half_bits: u32,
    seed: u64,
}

impl Shuffle {
    /// The permutation of `0..n` that belongs to `seed`.
    pub(crate) fn new(n: u64, seed: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Self { n, half_bits: bits.div_ceil(2).max(1), seed }
    }

    /// Where `index`, below `n`, lands.
    pub(crate) fn get(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        let mut value = index;
        loop {
            value = self.permute(value);
            if value < self.n {
                return value;
            }
        }
    }

    fn permute(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(right ^ mix(self.seed ^ round)) & mask));
        }
        left << self.half_bits | right
    }
}

/// A number that depends on every bit of `x` (SplitMix64's finalizer).
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_once() {
        for n in [1, 2, 3, 7, 64, 65, 1000, 4097] {
            for seed in 0..3 {
                let shuffle = Shuffle::new(n, seed);
                let mut found: Vec<u64> = (0..n).map(|i| shuffle.get(i)).collect();
                found.sort_unstable();
                assert_eq!(found, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn seeds_differ_and_neighbours_part() {
        let n = 10_000;
        let order = |seed| (0..n).map(|i| Shuffle::new(n, seed).get(i)).collect::<Vec<_>>();
        let (a, b) = (order(1), order(2));
        assert!(a.iter().zip(&b).filter(|(a, b)| a == b).count() < 20);
        // In a random order neighbours are a third of the range apart on average.
        let apart: u64 = a.windows(2).map(|pair| pair[0].abs_diff(pair[1])).sum::<u64>() / (n - 1);
        assert!((n / 4..n / 2).contains(&apart), "{apart}");
    }
}
