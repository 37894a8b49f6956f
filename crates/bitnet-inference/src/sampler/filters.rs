//! The truncation filters, the argmax and the draw, on a list of candidate tokens.
//!
//! A vocabulary has 128k entries and a filter keeps a few dozen: candidates are selected by
//! threshold and partial selection, and only what survives is sorted. Probabilities are sums of
//! `exp(logit - max)` in f64, over the candidates in the order they stand in, in 16 lanes: candidate
//! `i` goes to lane `i mod 16`, and the lanes are added in their order.

use std::cmp::Ordering;

use bitnet_core::cpu::math::{self, LANES, exp};
use bitnet_core::noise::Noise;

/// A token that may still be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) id: u32,
    /// Finite.
    pub(super) logit: f32,
    /// `exp(logit - max)` as of the last [`Distribution::weigh`].
    weight: f32,
}

/// Plus infinity beats every number but must not swallow the sums: it becomes the largest number.
pub(super) fn finite(logit: f32) -> f32 {
    logit.min(f32::MAX)
}

/// NaN and minus infinity cannot be drawn.
fn legal(logit: f32) -> bool {
    logit > f32::NEG_INFINITY
}

/// Larger logit first, then lower id.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// The token with the largest logit, ties to the lowest id.
pub(super) fn argmax(logits: &[f32]) -> Option<u32> {
    // Few blocks beat all before them; only these are searched for where.
    const BLOCK: usize = 16 * LANES;
    let mut best = None;
    let mut best_logit = f32::NEG_INFINITY;
    for (i, block) in logits.chunks(BLOCK).enumerate() {
        let largest = math::max(block);
        if largest > best_logit {
            best_logit = largest;
            let at = block.iter().position(|&logit| logit == largest);
            best = at.map(|at| (i * BLOCK + at) as u32);
        }
    }
    best
}

/// Fills `candidates` with the `k` likeliest legal tokens, best first; with `k` 0 or at least the
/// vocabulary, with all legal tokens by id.
pub(super) fn top_k(logits: &[f32], k: usize, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let all = logits.iter().enumerate().filter(|(_, l)| legal(**l));
    let mut all =
        all.map(|(id, &logit)| Candidate { id: id as u32, logit: finite(logit), weight: 0.0 });
    if k == 0 || k >= logits.len() {
        candidates.extend(all);
        return;
    }
    // One pass: the buffer takes every logit that beats the k-th best so far and is cut back to
    // k when full. Later ids lose ties, so "beats" is strict.
    let capacity = (4 * k).max(256);
    candidates.extend(all.by_ref().take(capacity));
    let mut threshold = cut(candidates, k);
    for candidate in all {
        if candidate.logit > threshold {
            candidates.push(candidate);
            if candidates.len() >= capacity {
                threshold = cut(candidates, k);
            }
        }
    }
    cut(candidates, k);
    candidates.sort_unstable_by(likelier);
}

/// Keeps the `k` likeliest; returns the logit a further candidate has to beat.
fn cut(candidates: &mut Vec<Candidate>, k: usize) -> f32 {
    if candidates.len() < k {
        return f32::NEG_INFINITY;
    }
    let (_, kth, _) = candidates.select_nth_unstable_by(k - 1, likelier);
    let threshold = kth.logit;
    candidates.truncate(k);
    threshold
}

/// The softmax over a list of candidates.
#[derive(Debug, Clone, Copy)]
pub(super) struct Distribution {
    max: f64,
    total: f64,
}

impl Distribution {
    /// Gives every candidate its weight.
    pub(super) fn weigh(candidates: &mut [Candidate]) -> Self {
        let max = candidates.iter().fold(f32::NEG_INFINITY, |max, c| max.max(c.logit)) as f64;
        let weight = |logit: f32| exp((logit as f64 - max) as f32);
        let mut totals = [0.0_f64; LANES];
        let (groups, tail) = candidates.as_chunks_mut::<LANES>();
        for group in groups {
            // Sixteen at a time, so that they become vector code.
            let weights: [f32; LANES] = std::array::from_fn(|i| weight(group[i].logit));
            for i in 0..LANES {
                group[i].weight = weights[i];
                totals[i] += weights[i] as f64;
            }
        }
        for (candidate, total) in tail.iter_mut().zip(&mut totals) {
            candidate.weight = weight(candidate.logit);
            *total += candidate.weight as f64;
        }
        let total = totals.iter().sum();
        Self { max, total }
    }

    /// Natural logarithm of a candidate's probability.
    pub(super) fn ln_probability(&self, logit: f32) -> f64 {
        logit as f64 - self.max - libm::log(self.total)
    }
}

/// Keeps the shortest run of weighed candidates, taken in `order`, whose probabilities reach `mass`.
fn keep_mass(
    candidates: &mut Vec<Candidate>,
    distribution: Distribution,
    mass: f32,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
) {
    let wanted = mass as f64 * distribution.total;
    let mut reached = 0.0;
    let mut sorted = 0;
    let mut step = 64;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let step_now = step.min(rest.len());
        if step_now < rest.len() {
            rest.select_nth_unstable_by(step_now - 1, &order);
        }
        rest[..step_now].sort_unstable_by(&order);
        for candidate in &rest[..step_now] {
            sorted += 1;
            reached += candidate.weight as f64;
            if reached >= wanted {
                candidates.truncate(sorted);
                return;
            }
        }
        step *= 4;
    }
}

/// Keeps the candidates whose surprise is nearest the expected one, up to probability `p`.
pub(super) fn typical(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 || candidates.len() <= 1 {
        return;
    }
    let distribution = Distribution::weigh(candidates);
    // Entropy: the mean of -ln p, with ln p = (logit - max) - ln total.
    let moment: f64 =
        candidates.iter().map(|c| c.weight as f64 * (c.logit as f64 - distribution.max)).sum();
    let entropy = libm::log(distribution.total) - moment / distribution.total;
    let distance = |c: &Candidate| (-distribution.ln_probability(c.logit) - entropy).abs();
    keep_mass(candidates, distribution, p, |a, b| {
        distance(a).total_cmp(&distance(b)).then_with(|| likelier(a, b))
    });
}

/// Keeps the likeliest candidates that together reach probability `p`, at least one.
pub(super) fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 || candidates.len() <= 1 {
        return;
    }
    let distribution = Distribution::weigh(candidates);
    keep_mass(candidates, distribution, p, likelier);
}

/// Keeps the candidates at least `p` times as likely as the likeliest.
pub(super) fn min_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p <= 0.0 {
        return;
    }
    let max = candidates.iter().fold(f32::NEG_INFINITY, |max, c| max.max(c.logit));
    // p(token) / p(best) = exp(logit - max); the best itself passes at p = 1.
    let least = max as f64 + libm::log(p as f64);
    candidates.retain(|c| c.logit as f64 >= least || c.logit == max);
}

/// Draws from the softmax of `logit / temperature`, both in the noise. `None` only for an empty list.
pub(super) fn draw(candidates: &[Candidate], noise: Noise) -> Option<u32> {
    let noisy = candidates.iter().map(|c| (c.id, c.logit + noise.at(c.id)));
    let better = |a: (u32, f32), b: (u32, f32)| match b.1 > a.1 || (b.1 == a.1 && b.0 < a.0) {
        true => b,
        false => a,
    };
    noisy.reduce(better).map(|(id, _)| id)
}

/// As [`draw`] from all legal logits; `None` if there are none.
pub(super) fn draw_among_all(logits: &[f32], noise: Noise) -> Option<u32> {
    let mut noisy = [0.0; 16 * LANES];
    let mut best = None;
    let mut best_logit = f32::NEG_INFINITY;
    for (i, block) in logits.chunks(noisy.len()).enumerate() {
        let first = i * noisy.len();
        let largest = finite(math::max(block));
        // A hair less than what is missing, for what rounding of the sum may add.
        let missing = best_logit - largest - 1e-5 * (best_logit.abs() + largest.abs());
        if !legal(largest) || !noise.may_exceed(missing, first as u32, block.len() as u32) {
            continue;
        }
        let noisy = &mut noisy[..block.len()];
        noise.fill(first as u32, noisy);
        for (noisy, &logit) in noisy.iter_mut().zip(block) {
            // Not a number stays one, and is larger than nothing.
            *noisy += if logit > f32::MAX { f32::MAX } else { logit };
        }
        let largest = math::max(noisy);
        if largest > best_logit {
            best_logit = largest;
            let at = noisy.iter().position(|&logit| logit == largest);
            best = at.map(|at| (first + at) as u32);
        }
    }
    best
}
