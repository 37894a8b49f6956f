use super::*;
use crate::backend::KvSpec;
use crate::cpu::kv::{CpuKv, Part};
use crate::memory::{EnhancedMemoryPool, HostMemory};

/// Every set this CPU has, the portable one first.
fn sets() -> Vec<(&'static str, &'static AttentionKernels)> {
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
    let mut sets = vec![("portable", &PORTABLE)];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
            sets.push(("avx2", &AVX2));
        }
        if is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni") {
            sets.push(("avx512vnni", &AVX512VNNI));
        }
    }
    sets
}

/// Numbers in [−1, 1) from a 64-bit linear congruential generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    fn list(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// Keys and values of one sequence in one head of a cache, in blocks of any order, with NaN in
/// everything that no query may look at.
struct Case {
    kv: CpuKv,
    blocks: Vec<u32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    q: Vec<f32>,
    n_rows: usize,
    group: usize,
    first_position: usize,
}

const LAYER: usize = 1;
const HEAD: usize = 1;

impl Case {
    fn new(dtype: KvType, head_dim: usize, group: usize, rows: Range<usize>) -> Self {
        let block_tokens = 32;
        let end = rows.end;
        let n_blocks = end.div_ceil(block_tokens) + 2;
        let spec = KvSpec { n_layers: 2, n_kv_heads: 2, head_dim, block_tokens, n_blocks, dtype };
        let pool = EnhancedMemoryPool::new(HostMemory, u64::MAX);
        let mut kv = CpuKv::new(spec, &pool).unwrap();
        let layout = kv.layout;
        // An odd step visits every block before it repeats one, if their number is no multiple.
        let step = if n_blocks % 7 == 0 { 5 } else { 7 };
        let blocks: Vec<u32> =
            (0..end.div_ceil(block_tokens)).map(|i| ((i * step + 3) % n_blocks) as u32).collect();
        let mut random = Random(head_dim as u64);
        let (keys, values) = (random.list(end * head_dim), random.list(end * head_dim));
        let mut padded = vec![0.0; layout.dim];
        for position in 0..end.next_multiple_of(block_tokens) {
            for (part, x) in [(Part::Keys, &keys), (Part::Values, &values)] {
                match x.get(position * head_dim..(position + 1) * head_dim) {
                    Some(x) => padded[..head_dim].copy_from_slice(x),
                    None => padded[..head_dim].fill(f32::NAN),
                }
                let tile = position / 16;
                let at = layout.sequence_tile(&blocks, LAYER, part, HEAD, tile);
                let bytes = &mut kv.memory[at..at + layout.tile_bytes];
                match part {
                    Part::Keys => store_key(dtype, bytes, position % 16, &padded),
                    Part::Values => store_value(dtype, bytes, position % 16, &padded),
                }
            }
        }
        // The larger the queries, the more uneven the weights.
        let q = random.list(rows.len() * group * head_dim).iter().map(|q| 4.0 * q).collect();
        let (n_rows, first_position) = (rows.len(), rows.start);
        Self { kv, blocks, keys, values, q, n_rows, group, first_position }
    }

    fn task(&self, rows: Range<usize>, spans: Range<usize>) -> Task<'_> {
        let width = self.group * self.kv.layout.spec.head_dim;
        Task {
            cache: &self.kv.memory,
            layout: &self.kv.layout,
            layer: LAYER,
            kv_head: HEAD,
            blocks: &self.blocks,
            q: &self.q[rows.start * width..],
            q_stride: width,
            n_rows: rows.len(),
            group: self.group,
            first_position: self.first_position + rows.start,
            ahead: spans.end + 1,
            spans,
        }
    }

    fn n_spans(&self) -> usize {
        (self.first_position + self.n_rows).div_ceil(SPAN)
    }

    /// Largest totals and values of all rows, as bits; computed `rows_each` at a time, each span
    /// alone if `by_span`.
    fn run(&self, kernels: &AttentionKernels, rows_each: usize, by_span: bool) -> Vec<u32> {
        let mut scratch = Scratch::default();
        let mut bits = Vec::new();
        for start in (0..self.n_rows).step_by(rows_each) {
            let rows = start..self.n_rows.min(start + rows_each);
            let n = rows.len() * self.group;
            let dim = self.kv.layout.dim;
            let mut result = Partial::default();
            if by_span {
                let mut written = vec![0.0; n * (dim + 2)];
                result.reset(n, dim);
                for span in 0..self.n_spans() {
                    // SAFETY: `sets` lists what the CPU has.
                    unsafe {
                        kernels.attend(&self.task(rows.clone(), span..span + 1), &mut scratch)
                    };
                    scratch.result.write(&mut written);
                    // SAFETY: as above.
                    unsafe { kernels.join(&written, 1, &mut result) };
                }
            } else {
                // SAFETY: as above.
                unsafe { kernels.attend(&self.task(rows, 0..self.n_spans()), &mut scratch) };
                std::mem::swap(&mut result, &mut scratch.result);
            }
            for m in 0..n {
                bits.push(result.max[m].to_bits());
                bits.push(result.total[m].to_bits());
                let values = &result.values[m * dim..][..self.kv.layout.spec.head_dim];
                bits.extend(values.iter().map(|x| x.to_bits()));
            }
        }
        bits
    }

    /// Attention of query `m` in f64, from the numbers before they were stored; and the largest
    /// magnitude of a score.
    fn reference(&self, m: usize) -> (Vec<f64>, f64) {
        let dim = self.kv.layout.spec.head_dim;
        let q = &self.q[m * dim..][..dim];
        let n = self.first_position + m / self.group + 1;
        let dot = |k: &[f32]| -> f64 {
            q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
        };
        let scores: Vec<f64> =
            self.keys.chunks_exact(dim).take(n).map(|k| dot(k) / (dim as f64).sqrt()).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; dim];
        for (weight, v) in weights.iter().zip(self.values.chunks_exact(dim)) {
            out.iter_mut().zip(v).for_each(|(out, &v)| *out += weight / total * f64::from(v));
        }
        (out, scores.iter().fold(0.0, |a, s| s.abs().max(a)))
    }
}

fn cases(dtype: KvType) -> Vec<Case> {
    vec![
        Case::new(dtype, 64, 2, 0..1),
        Case::new(dtype, 32, 4, 0..37),
        Case::new(dtype, 128, 4, 511..512),
        Case::new(dtype, 128, 5, 512..513),
        Case::new(dtype, 40, 3, 250..280),
        Case::new(dtype, 16, 1, 700..720),
        Case::new(dtype, 8, 9, 3..6),
    ]
}

const DTYPES: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Q8];

#[test]
fn every_set_and_every_partition_gives_the_same_bits() {
    for dtype in DTYPES {
        for case in cases(dtype) {
            let want = case.run(&PORTABLE, case.n_rows, false);
            assert!(want.iter().all(|&x| f32::from_bits(x).is_finite()), "{dtype:?}: saw a NaN");
            for (name, kernels) in sets() {
                for rows_each in [1, 3, case.n_rows] {
                    for by_span in [false, true] {
                        let got = case.run(kernels, rows_each, by_span);
                        assert!(got == want, "{dtype:?} {name} {rows_each} {by_span}");
                    }
                }
            }
        }
    }
}

#[test]
fn results_match_the_definition() {
    for dtype in DTYPES {
        for case in cases(dtype) {
            let dim = case.kv.layout.spec.head_dim;
            let got = case.run(&PORTABLE, case.n_rows, false);
            // Relative error of a stored number, as a share of the largest of its head.
            let stored = match dtype {
                KvType::F32 => 0.0,
                KvType::F16 => 0.5f64.powi(11),
                KvType::Q8 => 0.5 / 127.0,
            };
            for (m, got) in got.chunks_exact(dim + 2).enumerate() {
                let (want, largest_score) = case.reference(m);
                let total = f64::from(f32::from_bits(got[1]));
                // A score's error: that of the key against Σ|q| (|k| ≤ 1), and of dim roundings.
                let q = &case.q[m * dim..][..dim];
                let q_sum: f64 = q.iter().map(|q| f64::from(q.abs())).sum();
                let epsilon = f64::from(f32::EPSILON);
                let score = q_sum / (dim as f64).sqrt() * (stored + dim as f64 * epsilon)
                    + 4.0 * epsilon * largest_score;
                // Weights change by e^±score, so their mean of values (|v| ≤ 1) by twice that; the
                // values' own error, 16-bit weights and the sums over positions come on top.
                let n = (case.first_position + m / case.group + 1) as f64;
                let weights = if dtype == KvType::Q8 { n.min(SPAN as f64) / 65_278.0 } else { 0.0 };
                let tolerance = 2.0 * (score.exp() - 1.0) + stored + 2.0 * weights + n * epsilon;
                for (d, want) in want.iter().enumerate() {
                    let got = f64::from(f32::from_bits(got[d + 2])) / total;
                    assert!(
                        (got - want).abs() <= tolerance,
                        "{dtype:?} dim {dim} query {m}: {got} for {want}, tolerance {tolerance}"
                    );
                }
            }
        }
    }
}

#[test]
fn eight_bit_products_stand_their_largest_sums() {
    // All keys, values and queries at the largest magnitude: the integer sums at their bounds.
    for sign in [1.0f32, -1.0] {
        let mut case = Case::new(KvType::Q8, 512, 1, 255..256);
        let layout = case.kv.layout;
        for position in 0..256 {
            for part in [Part::Keys, Part::Values] {
                let tile = position / 16;
                let at = layout.sequence_tile(&case.blocks, LAYER, part, HEAD, tile);
                let bytes = &mut case.kv.memory[at..at + layout.tile_bytes];
                let x = vec![sign; 512];
                match part {
                    Part::Keys => store_key(KvType::Q8, bytes, position % 16, &x),
                    Part::Values => store_value(KvType::Q8, bytes, position % 16, &x),
                }
            }
        }
        case.q.fill(1.0);
        for (name, kernels) in sets() {
            let bits = case.run(kernels, 1, false);
            let score = f32::from_bits(bits[0]);
            // 512 products of ±1 over sqrt(512), each of three factors rounded once or twice.
            assert!((score / (sign * 512f32.sqrt()) - 1.0).abs() < 1e-6, "{name}: {score}");
            assert_eq!(f32::from_bits(bits[1]), 256.0);
            for &value in &bits[2..] {
                assert!((f32::from_bits(value) / (sign * 256.0) - 1.0).abs() < 1e-6, "{name}");
            }
        }
    }
}

#[test]
fn a_query_that_is_no_number_gives_none() {
    for dtype in DTYPES {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut case = Case::new(dtype, 32, 2, 20..21);
            case.q[3] = bad;
            for (_, kernels) in sets() {
                let bits = case.run(kernels, 1, false);
                let values = |m: usize| -> Vec<f32> {
                    let query = &bits[m * 34..(m + 1) * 34];
                    let total = f32::from_bits(query[1]);
                    query[2..].iter().map(|&x| f32::from_bits(x) / total).collect()
                };
                assert!(values(0).iter().all(|x| x.is_nan()), "{dtype:?} {bad}");
                assert!(values(1).iter().all(|x| x.is_finite()), "{dtype:?} {bad}");
            }
        }
    }
}
