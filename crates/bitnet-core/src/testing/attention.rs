//! Rotation, cache and attention: sequences fed in steps of many shapes.

use super::inputs::{Floats, Random, norm_reference};
use super::{ROUNDING, assert_close, download};
use crate::backend::{Backend, Batch, KvSpec, KvType, RopeSpec, SequenceSlice, TableRole};
use crate::weights::{FloatType, NormWeights};
use std::ops::Range;
use std::sync::Arc;

const TYPES: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Q8];
/// Layers of the caches; what is stored in one must not be seen in the other.
const LAYERS: usize = 2;

/// Queries, keys and values of some sequences before norms and rotation.
struct Case {
    dtype: KvType,
    head_dim: usize,
    n_kv_heads: usize,
    /// Queries for each key.
    group: usize,
    block_tokens: usize,
    lengths: Vec<usize>,
    /// `(all positions, heads · head_dim)`
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    head_norms: Option<(NormWeights, NormWeights)>,
    inv_freq: Vec<f32>,
    magnitude: f32,
    /// Block table of each sequence.
    blocks: Vec<Vec<u32>>,
    n_blocks: usize,
}

/// A part of a step: the positions of one sequence.
type Slice = (usize, Range<usize>);

impl Case {
    fn new(
        random: &mut Random,
        dtype: KvType,
        head_dim: usize,
        [n_kv_heads, group]: [usize; 2],
        lengths: &[usize],
        with_norms: bool,
    ) -> Self {
        let block_tokens = 32;
        let total: usize = lengths.iter().sum();
        let needed = |length: usize| length.div_ceil(block_tokens);
        let n_blocks = lengths.iter().map(|&length| needed(length)).sum::<usize>() + 3;
        let mut free = random.shuffled(n_blocks);
        let blocks = lengths.iter().map(|&length| free.split_off(free.len() - needed(length)));
        let blocks = blocks.collect();
        let width = n_kv_heads * head_dim;
        Self {
            dtype,
            head_dim,
            n_kv_heads,
            group,
            block_tokens,
            lengths: lengths.to_vec(),
            // Uneven scores make uneven weights.
            q: random.floats(total * group * width).iter().map(|q| 3.0 * q).collect(),
            k: random.floats(total * width),
            v: random.floats(total * width),
            head_norms: with_norms.then(|| (random.norm(head_dim), random.norm(head_dim))),
            inv_freq: (0..head_dim / 2)
                .map(|i| 10_000f64.powf(-2.0 * i as f64 / head_dim as f64) as f32)
                .collect(),
            magnitude: if with_norms { 1.25 } else { 1.0 },
            blocks,
            n_blocks,
        }
    }

    fn q_width(&self) -> usize {
        self.group * self.n_kv_heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Index of a sequence's first position among all positions.
    fn first(&self, sequence: usize) -> usize {
        self.lengths[..sequence].iter().sum()
    }

    /// Every sequence in one step of its own.
    fn whole(&self) -> Vec<Vec<Slice>> {
        self.lengths.iter().enumerate().map(|(i, &length)| vec![(i, 0..length)]).collect()
    }

    /// All sequences at once, each advancing by one of `strides` positions a step.
    fn mixed(&self, strides: &[usize]) -> Vec<Vec<Slice>> {
        let mut next = vec![0; self.lengths.len()];
        let mut steps = Vec::new();
        for step in 0.. {
            let mut slices = Vec::new();
            for (i, &length) in self.lengths.iter().enumerate() {
                let end = length.min(next[i] + strides[(step + i) % strides.len()]);
                if next[i] < end {
                    slices.push((i, next[i]..end));
                    next[i] = end;
                }
            }
            if slices.is_empty() {
                break;
            }
            steps.push(slices);
        }
        steps
    }

    /// Runs the steps; returns the rotated queries and the results of all positions.
    fn run<B: Backend>(&self, backend: &mut B, steps: &[Vec<Slice>]) -> (Vec<f32>, Vec<f32>) {
        let total: usize = self.lengths.iter().sum();
        let (q_width, kv_width) = (self.q_width(), self.kv_width());
        let max_rows =
            steps.iter().map(|s| s.iter().map(|(_, r)| r.len()).sum::<usize>()).max().unwrap_or(1);
        let spec = KvSpec {
            n_layers: LAYERS,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            block_tokens: self.block_tokens,
            n_blocks: self.n_blocks,
            dtype: self.dtype,
        };
        let mut kv = backend.kv_cache(spec).expect("a cache");
        let rope = RopeSpec {
            inv_freq: self.inv_freq.clone(),
            max_positions: 4096,
            magnitude: self.magnitude,
        };
        let rope = backend.rope(&rope).expect("rotations");
        let norms = self
            .head_norms
            .as_ref()
            .map(|(q, k)| (backend.norm(q).expect("a norm"), backend.norm(k).expect("a norm")));
        let inputs = [(&self.q, q_width), (&self.k, kv_width), (&self.v, kv_width)];
        let tables = inputs.map(|(x, width)| {
            let source = Floats::new(total, width, x.clone(), Some(FloatType::F32));
            backend.table(Arc::new(source), TableRole::Head).expect("a table")
        });
        let mut buffers =
            inputs.map(|(_, width)| backend.buffer(max_rows, width).expect("a buffer"));
        let [mut out, mut other_q] =
            [q_width; 2].map(|width| backend.buffer(max_rows, width).expect("a buffer"));
        let mut rotated = vec![f32::NAN; total * q_width];
        let mut results = vec![f32::NAN; total * q_width];
        for step in steps {
            let batch = self.batch(step);
            backend.begin(&batch).expect("a step");
            let norms = norms.as_ref().map(|(q, k)| (q, k));
            let [q, k, v] = &mut buffers;
            let embed = |backend: &mut B, q: &mut B::Buffer, k: &mut B::Buffer, v: &mut _| {
                for (table, buffer) in tables.iter().zip([q, k, v]) {
                    backend.embed(table, buffer).expect("positions are rows of the tables");
                }
            };
            embed(backend, q, k, v);
            let store = "room in the cache";
            backend.rotate_and_store(q, k, v, norms, &rope, &mut kv, 0).expect(store);
            // The other layer gets the values as keys and the keys as values, after the first was
            // written: were layers mixed up, results would be far off.
            embed(backend, &mut other_q, v, k);
            backend.rotate_and_store(&mut other_q, k, v, norms, &rope, &mut kv, 1).expect(store);
            backend.attention(q, &kv, 0, &mut out).expect("attention");
            for (from, into) in [(&*q, &mut rotated), (&out, &mut results)] {
                let got = download(backend, from);
                for (got, &token) in got.chunks_exact(q_width).zip(&batch.tokens) {
                    into[token as usize * q_width..][..q_width].copy_from_slice(got);
                }
            }
            backend.finish().expect("the end of a step");
        }
        (rotated, results)
    }

    fn batch(&self, step: &[Slice]) -> Batch {
        let mut batch = Batch::default();
        for (sequence, positions) in step {
            let start = batch.tokens.len();
            let first = self.first(*sequence);
            batch.tokens.extend(positions.clone().map(|position| (first + position) as u32));
            batch.sequences.push(SequenceSlice {
                rows: start..batch.tokens.len(),
                first_position: positions.start,
                blocks: self.blocks[*sequence][..positions.end.div_ceil(self.block_tokens)]
                    .to_vec(),
            });
        }
        batch
    }

    /// A head in f64, normalized and rotated.
    fn turned(&self, x: &[f32], norm: Option<&NormWeights>, position: usize) -> Vec<f64> {
        let mut x: Vec<f64> = x.iter().copied().map(f64::from).collect();
        if let Some(norm) = norm {
            x = norm_reference(&x, norm);
        }
        let half = self.head_dim / 2;
        for (i, &frequency) in self.inv_freq.iter().enumerate() {
            let (sin, cos) = (position as f64 * f64::from(frequency)).sin_cos();
            let [a, b] = [x[i], x[i + half]].map(|x| x * f64::from(self.magnitude));
            (x[i], x[i + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
        x
    }

    /// Relative error of a normalized and rotated number, against the largest of its head: the
    /// norm, an angle that was rounded as an f32, and the magnitude.
    fn turning_error(&self, position: usize) -> f64 {
        let norm = if self.head_norms.is_some() { self.head_dim as f64 / 2.0 + 6.0 } else { 0.0 };
        (norm + 2.0 * (2.0 * position as f64 + 10.0)) * ROUNDING
    }

    /// Checks what `run` returned against the definition.
    fn check(&self, rotated: &[f32], results: &[f32]) {
        let (dim, q_width, kv_width) = (self.head_dim, self.q_width(), self.kv_width());
        let largest = |x: &[f64]| x.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let (q_norm, k_norm) = match &self.head_norms {
            Some((q, k)) => (Some(q), Some(k)),
            None => (None, None),
        };
        // A stored number is off by this, relative to the largest of its head.
        let stored = match self.dtype {
            KvType::F32 => 0.0,
            KvType::F16 => 0.5f64.powi(11),
            KvType::Q8 => 0.5 / 127.0,
        };
        // Queries and weights may be rounded to 16 bits where the cache has 8.
        let rounded = if self.dtype == KvType::Q8 { 0.5 / 32_639.0 } else { 0.0 };
        for (sequence, &length) in self.lengths.iter().enumerate() {
            let first = self.first(sequence);
            for head in 0..self.n_kv_heads {
                let at = |position: usize| (first + position) * kv_width + head * dim;
                let keys: Vec<Vec<f64>> =
                    (0..length).map(|p| self.turned(&self.k[at(p)..][..dim], k_norm, p)).collect();
                let values: Vec<Vec<f64>> = (0..length)
                    .map(|p| self.v[at(p)..][..dim].iter().copied().map(f64::from).collect())
                    .collect();
                let k_max = keys.iter().map(|k| largest(k)).fold(0.0, f64::max);
                let v_max = values.iter().map(|v| largest(v)).fold(0.0, f64::max);
                for position in 0..length {
                    for g in 0..self.group {
                        let at = (first + position) * q_width + (head * self.group + g) * dim;
                        let what = || {
                            format!(
                                "{:?} head_dim {dim} sequence {sequence} position {position} head \
                                 {head} query {g}",
                                self.dtype
                            )
                        };
                        let q = self.turned(&self.q[at..][..dim], q_norm, position);
                        let q_max = largest(&q);
                        let turning = self.turning_error(position);
                        for (&got, &want) in rotated[at..][..dim].iter().zip(&q) {
                            assert_close(got, want, 2.0 * turning * q_max, &what);
                        }
                        let n = position + 1;
                        let scores: Vec<f64> = keys[..n]
                            .iter()
                            .map(|k| {
                                let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                                dot / (dim as f64).sqrt()
                            })
                            .collect();
                        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                        let total: f64 = weights.iter().sum();
                        // A score is off by the errors of its factors and the roundings of its
                        // sum; an exponential by 4 units and its argument's own rounding.
                        let q_sum: f64 = q.iter().map(|q| q.abs()).sum();
                        let factors = 4.0 * turning + stored + (dim as f64 + 4.0) * ROUNDING;
                        let score = (q_sum * k_max * factors
                            + dim as f64 * q_max * k_max * rounded)
                            / (dim as f64).sqrt()
                            + (8.0 + 2.0 * largest(&scores)) * ROUNDING;
                        // Weights change by e^±score, their mean of values by twice that.
                        let n = n as f64;
                        let tolerance = v_max
                            * (2.0 * (score.exp() - 1.0)
                                + stored
                                + 2.0 * n * rounded
                                + (2.0 * n + 16.0) * ROUNDING);
                        for d in 0..dim {
                            let want: f64 =
                                weights.iter().zip(&values).map(|(w, v)| w * v[d]).sum::<f64>()
                                    / total;
                            assert_close(results[at + d], want, tolerance, &what);
                        }
                    }
                }
            }
        }
    }
}

/// Cases of every head size, number of queries for a key, and number format.
fn cases(random: &mut Random) -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in TYPES {
        for (head_dim, heads, lengths, with_norms) in [
            (32, [2, 2], &[1, 37, 70][..], false),
            (64, [1, 1], &[90, 5], true),
            (128, [2, 4], &[33, 280], false),
            (16, [1, 3], &[530], true),
            (80, [1, 5], &[20], false),
            (8, [3, 1], &[40, 16, 17], true),
        ] {
            cases.push(Case::new(random, dtype, head_dim, heads, lengths, with_norms));
        }
    }
    cases
}

pub(super) fn attention_matches_the_definition<B: Backend>(
    make: &impl Fn() -> B,
    record: &mut Vec<f32>,
) {
    for case in cases(&mut Random(20)) {
        let (rotated, results) = case.run(&mut make(), &case.whole());
        case.check(&rotated, &results);
        record.extend(rotated);
        record.extend(results);
    }
}

/// However a sequence is cut into steps, whatever runs beside it and wherever its blocks lie.
pub(super) fn the_partition_of_a_sequence_does_not_matter<B: Backend>(
    make: &impl Fn() -> B,
    record: &mut Vec<f32>,
) {
    let mut random = Random(21);
    for mut case in cases(&mut random) {
        let mut backend = make();
        let want = case.run(&mut backend, &case.whole());
        for strides in [&[1][..], &[5, 17, 64], &[1, 100, 3], &[1000]] {
            let got = case.run(&mut backend, &case.mixed(strides));
            assert!(got == want, "{:?} head_dim {}: {strides:?}", case.dtype, case.head_dim);
        }
        let places = random.shuffled(case.n_blocks);
        for block in case.blocks.iter_mut().flatten() {
            *block = places[*block as usize];
        }
        let got = case.run(&mut backend, &case.mixed(&[50, 20]));
        assert!(got == want, "{:?} head_dim {}: other blocks", case.dtype, case.head_dim);
        record.extend(got.1);
    }
}

pub(super) fn memory_is_accounted_for<B: Backend>(make: &impl Fn() -> B) {
    let mut backend = make();
    let before = backend.memory();
    let spec = KvSpec {
        n_layers: 3,
        n_kv_heads: 2,
        head_dim: 64,
        block_tokens: 32,
        n_blocks: 10,
        dtype: KvType::Q8,
    };
    let kv = backend.kv_cache(spec).expect("a cache");
    let during = backend.memory();
    assert!(during.kv_cache >= before.kv_cache + (spec.block_bytes() * spec.n_blocks) as u64);
    drop(kv);
    let source = Floats::new(100, 64, vec![1.0; 6400], Some(FloatType::F32));
    let table = backend.table(Arc::new(source), TableRole::Head).expect("a table");
    let buffer = backend.buffer(10, 64).expect("a buffer");
    let during = backend.memory();
    assert_eq!(during.kv_cache, before.kv_cache, "a dropped cache is not counted");
    assert!(during.weights >= before.weights + 25_600);
    assert!(during.activations >= before.activations + 2560);
    drop((table, buffer));
    let after = backend.memory();
    assert_eq!(after.weights, before.weights, "a dropped table is not counted");
    assert!(after.activations < during.activations, "a dropped buffer is not counted");

    // More than any address space holds, and more than a number holds.
    for n_blocks in [1 << 52, usize::MAX] {
        assert!(backend.kv_cache(KvSpec { n_blocks, ..spec }).is_err());
    }
    assert!(backend.buffer(usize::MAX / 8, 1 << 20).is_err());
}
