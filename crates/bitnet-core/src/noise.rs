//! Random numbers that make drawing a token a matter of finding the largest of its logits.
//!
//! If `g` are independent numbers of the standard Gumbel distribution, the largest of
//! `logit + T · g` stands at a token with the probability that the softmax of `logit / T` gives it
//! (Gumbel 1954, "the Gumbel-max trick"). So a device that can find the largest logit without
//! computing all of them can draw from all of them, too.
//!
//! The numbers are a function of a key and a token, not a stream: whoever needs that of one token
//! computes that one, and all devices get the same bits. Knows keys and token ids; nothing of seeds
//! or of how a sampler uses them.

use crate::cpu::math;

/// What is added to the logits of one row before the largest is taken: `scale · g(key, token)`.
///
/// ```
/// use bitnet_core::noise::Noise;
///
/// let noise = Noise::new([7, 8], 1.0);
/// let mut all = [0.0; 100];
/// noise.fill(0, &mut all);
/// assert_eq!(noise.at(42), all[42]);
/// assert_eq!(Noise::NONE.at(42), 0.0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    key: [u32; 2],
    scale: f32,
}

impl Default for Noise {
    fn default() -> Self {
        Self::NONE
    }
}

impl Noise {
    /// Leaves every logit as it is.
    pub const NONE: Self = Self { key: [0; 2], scale: 0.0 };

    /// The noise of a key, for draws at the temperature `scale`.
    pub fn new(key: [u32; 2], scale: f32) -> Self {
        Self { key, scale }
    }

    /// Whether it changes nothing.
    pub fn is_none(&self) -> bool {
        self.scale == 0.0
    }

    /// Whether the noise of one of `n` tokens from `first` on may be more than `least`: a cheaper
    /// question than what it is, and mostly answered with no where `least` is large.
    pub fn may_exceed(&self, least: f32, first: u32, n: u32) -> bool {
        // −ln e > x needs e < exp(−x), and e = −ln(1 − u) is never below u.
        let most = 1.001 * math::exp(-least / self.scale);
        if self.is_none() || most >= 1.0 {
            return true;
        }
        let most = (most / STEP) as u32 + 1;
        let bits = (0..n).map(|i| hash(self.key, first.wrapping_add(i)) >> 1);
        bits.fold(u32::MAX, u32::min) <= most
    }

    /// The noise of one token.
    pub fn at(&self, token: u32) -> f32 {
        let mut one = [0.0];
        self.fill(token, &mut one);
        one[0]
    }

    /// The noise of consecutive tokens from `first` on. Branch-free, to become vector code.
    #[inline(always)]
    pub fn fill(&self, first: u32, out: &mut [f32]) {
        if self.is_none() {
            out.fill(0.0);
            return;
        }
        for (i, out) in out.iter_mut().enumerate() {
            let bits = hash(self.key, first.wrapping_add(i as u32));
            *out = self.scale * -math::ln(exponential((bits >> 1) as i32));
        }
    }
}

/// What one unit of a 31-bit number is worth.
const STEP: f32 = 1.0 / (1_u32 << 31) as f32;

/// Mixes a key and a token to 32 bits: rounds as those that end MurmurHash3, a word of the key before
/// the first and one before the second.
#[inline(always)]
fn hash(key: [u32; 2], token: u32) -> u32 {
    let mut x = token.wrapping_mul(0x9e37_79b1) ^ key[0];
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x ^= key[1];
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x ^ (x >> 13)
}

/// A uniform 31-bit number as one of the standard exponential distribution, from 2⁻³² to 22.2.
///
/// `−ln(1 − u)`: near 0, where it decides draws, it has all the resolution of `u`.
#[inline(always)]
fn exponential(bits: i32) -> f32 {
    let u = (bits as f32 + 0.5) * STEP;
    let rest = ((i32::MAX - bits) as f32 + 0.5) * STEP;
    // What rounding took from 1 − u; near u = 1 `rest` is exact enough without.
    let lost = ((1.0 - rest) - u) / rest;
    let lost = if u < 0.5 { lost } else { 0.0 };
    -(math::ln(rest) + lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_exact_to_a_few_roundings_and_never_zero() {
        let edges = [0, 1, 2, 3, 1 << 7, 1 << 15, 1 << 24, (1 << 30) - 1, 1 << 30, i32::MAX];
        for bits in edges.into_iter().chain((0..100_000).map(|i| i * 21_474)) {
            let u = (f64::from(bits) + 0.5) / f64::from(1_u32 << 31);
            let (got, want) = (f64::from(exponential(bits)), -(-u).ln_1p());
            assert!(got > 0.0 && (got / want - 1.0).abs() < 4e-7, "{bits}: {got} for {want}");
        }
    }

    #[test]
    fn nothing_exceeds_what_it_may_not() {
        let mut n_ruled_out = 0;
        for i in 0..2_000_u32 {
            let noise = Noise::new([i, 3], [0.01, 1.0, 50.0][i as usize % 3]);
            let mut row = [0.0; 64];
            noise.fill(i, &mut row);
            let largest = math::max(&row);
            assert!(noise.may_exceed(largest * 0.999, i, 64));
            assert!(noise.may_exceed(-largest, i, 64));
            n_ruled_out += u32::from(!noise.may_exceed(largest * 1.1, i, 64));
        }
        assert!(n_ruled_out > 1_900, "{n_ruled_out}");
    }

    #[test]
    fn noise_has_the_moments_of_its_distribution() {
        // Mean: Euler's constant; variance: π²/6. Of many keys at one token, and of many tokens.
        let many = |i: u32| Noise::new([i.wrapping_mul(77), i ^ 0x5555], 1.0).at(3);
        let keys: Vec<f32> = (0..200_000).map(many).collect();
        let mut tokens = vec![0.0; 200_000];
        Noise::new([1, 2], 1.0).fill(0, &mut tokens);
        for values in [keys, tokens] {
            let n = values.len() as f64;
            let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
            assert!((mean - 0.577_216).abs() < 0.015, "{mean}");
            assert!((variance - 1.644_934).abs() < 0.03, "{variance}");
        }
    }

    #[test]
    fn every_token_is_drawn_as_often_as_any_other() {
        const TOKENS: usize = 64;
        const DRAWS: u32 = 64_000;
        // Keys as a careless caller would choose them.
        for key in [|i: u32| [i, 0], |i: u32| [0, i], |i: u32| [i << 16, 1]] {
            let mut counts = [0_u32; TOKENS];
            for i in 0..DRAWS {
                let mut row = [0.0; TOKENS];
                Noise::new(key(i), 1.0).fill(0, &mut row);
                let best = (0..TOKENS).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
                counts[best] += 1;
            }
            let want = f64::from(DRAWS) / TOKENS as f64;
            let chi2: f64 = counts.iter().map(|&c| (f64::from(c) - want).powi(2) / want).sum();
            // 63 degrees of freedom: mean 63, standard deviation 11.2.
            assert!((20.0..120.0).contains(&chi2), "{chi2}");
        }
    }
}
