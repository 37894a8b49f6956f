//! One runner for every set of kernels: whatever `Kernels::available` lists must equal the scalar
//! set bit for bit, and the scalar set a definition written without knowledge of the layout.

use super::*;
use crate::weights::{FloatType, TernaryRows};

/// A 64-bit linear congruential generator; the high bits are good enough to test with.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 32) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next()) * u64::from(n)) >> 32) as u32
    }

    /// In [−1, 1).
    fn float(&mut self) -> f32 {
        self.next() as i32 as f32 / (1u32 << 31) as f32
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Every set but the scalar one, which is what they are compared with.
fn others() -> impl Iterator<Item = &'static Kernels> {
    Kernels::available().into_iter().filter(|kernels| kernels.name() != "scalar")
}

/// Codes `(rows, cols)` packed into tiles by the scalar set.
fn pack(packing: Packing, codes: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let stride = cols.next_multiple_of(packing.step_cols());
    let mut tiles = Vec::new();
    for first in (0..rows).step_by(TILE_ROWS) {
        let mut padded = vec![0; TILE_ROWS * stride];
        for (row, out) in (first..rows).zip(padded.chunks_exact_mut(stride)) {
            out[..cols].copy_from_slice(&codes[row * cols..][..cols]);
        }
        let mut tile = vec![0; stride / packing.step_cols() * STEP_BYTES];
        SCALAR.pack_tile(packing, &padded, &mut tile);
        tiles.extend(tile);
    }
    tiles
}

const PACKINGS: [Packing; 2] = [Packing::Codes, Packing::Trits];

fn largest_code(packing: Packing) -> u32 {
    match packing {
        Packing::Codes => 3,
        Packing::Trits => 2,
    }
}

/// Runs a case of each packing on every set of kernels.
fn check_all(case: impl Fn(Packing) -> Case) {
    for packing in PACKINGS {
        let case = case(packing);
        Kernels::available().into_iter().for_each(|kernels| case.check(kernels));
    }
}

/// A case of `Kernels::products`, with the sums it must give.
struct Case {
    packing: Packing,
    tiles: Vec<u8>,
    steps: usize,
    group_steps: usize,
    tokens: Vec<i8>,
    stride: usize,
    n_tokens: usize,
    want: Vec<i32>,
}

impl Case {
    fn new(
        packing: Packing,
        n_tiles: usize,
        steps: usize,
        group_steps: usize,
        n_tokens: usize,
        mut code: impl FnMut(usize, usize) -> u8,
        mut activation: impl FnMut(usize, usize) -> i8,
    ) -> Self {
        let step_cols = packing.step_cols();
        let (rows, cols) = (n_tiles * TILE_ROWS, steps * step_cols);
        let codes: Vec<u8> = (0..rows * cols).map(|i| code(i / cols, i % cols)).collect();
        let stride = cols + 64;
        // Beyond the columns of a token lies what a kernel must not read.
        let mut tokens = vec![77; n_tokens * stride];
        for (t, token) in tokens.chunks_exact_mut(stride).enumerate() {
            (0..cols).for_each(|c| token[c] = activation(t, c));
        }
        let n_groups = steps.div_ceil(group_steps);
        let mut want = vec![0; n_tiles * n_tokens * n_groups * TILE_ROWS];
        for row in 0..rows {
            for t in 0..n_tokens {
                for c in 0..cols {
                    let group = c / (group_steps * step_cols);
                    let at = ((row / TILE_ROWS * n_tokens + t) * n_groups + group) * TILE_ROWS;
                    want[at + row % TILE_ROWS] +=
                        i32::from(codes[row * cols + c]) * i32::from(tokens[t * stride + c]);
                }
            }
        }
        let tiles = pack(packing, &codes, rows, cols);
        Self { packing, tiles, steps, group_steps, tokens, stride, n_tokens, want }
    }

    fn random(
        packing: Packing,
        n_tiles: usize,
        steps: usize,
        group_steps: usize,
        n_tokens: usize,
        seed: u64,
    ) -> Self {
        let (mut a, mut b) = (Random(seed), Random(!seed));
        let code = |_, _| a.below(largest_code(packing) + 1) as u8;
        let activation = |_, _| b.next() as i8;
        Self::new(packing, n_tiles, steps, group_steps, n_tokens, code, activation)
    }

    fn check(&self, kernels: &Kernels) {
        let Self { packing, steps, group_steps, n_tokens, stride, .. } = *self;
        let tiles = Tiles { codes: &self.tiles, packing, steps, group_steps };
        let tokens = TokenCodes { codes: &self.tokens, stride, n_tokens };
        let mut sums = vec![-1; self.want.len()];
        kernels.products(&tiles, &tokens, &mut sums);
        assert!(
            sums == self.want,
            "{}: {packing:?}, {} tiles, {steps} steps in groups of {group_steps}, {n_tokens} tokens",
            kernels.name(),
            tiles.n_tiles(),
        );
    }
}

#[test]
fn products_of_every_length() {
    for steps in 1..=45 {
        check_all(|p| Case::random(p, 2, steps, steps, 1 + steps % 3, steps as u64));
    }
}

#[test]
fn products_of_every_batch() {
    for n_tokens in 1..=50 {
        for n_tiles in 1..=3 {
            check_all(|p| Case::random(p, n_tiles, 3, 3, n_tokens, n_tokens as u64));
        }
    }
}

#[test]
fn products_in_groups() {
    for steps in [1, 2, 7, 8, 16, 23] {
        for group_steps in [1, 2, 4, 8, 16, 23, 40] {
            for n_tokens in [1, 2, 5, 13] {
                check_all(|p| Case::random(p, 3, steps, group_steps.min(steps), n_tokens, 7));
            }
        }
    }
}

#[test]
fn products_of_many_tiles() {
    for n_tiles in 1..=9 {
        check_all(|p| Case::random(p, n_tiles, 20, 20, 1, n_tiles as u64));
    }
}

#[test]
fn products_of_extreme_values() {
    // Constant inputs make the largest partial sums: whatever width a kernel sums in, they show it.
    for steps in [1, 5, 10, 11, 21, 42, 43, 86, 161, 513] {
        for value in [127, -128] {
            for n_tokens in [1, 2, 6] {
                for less in [0, 1] {
                    let code = |p| (largest_code(p) - less) as u8;
                    check_all(|p| {
                        Case::new(p, 1, steps, steps, n_tokens, |_, _| code(p), |_, _| value)
                    });
                }
            }
        }
    }
    // Signs that alternate by column, field and step keep differences from cancelling.
    for period in [1, 2, 4, 8, 16, 20, 32] {
        let sign = |_, c: usize| if (c / period).is_multiple_of(2) { 127 } else { -128 };
        check_all(|p| {
            let code = |r: usize, c: usize| ((r + c / 3) % (largest_code(p) as usize + 1)) as u8;
            Case::new(p, 2, 100, 100, 3, code, sign)
        });
    }
}

#[test]
fn products_of_the_widest_matrix() {
    for value in [127, -128] {
        for n_tokens in [1, 2] {
            check_all(|p| {
                let steps = crate::weights::MAX_TERNARY_COLS / p.step_cols();
                let code = largest_code(p);
                let case = Case::new(p, 1, steps, steps, n_tokens, |_, _| code as u8, |_, _| value);
                let want = code as i32 * i32::from(value) * (p.step_cols() * steps) as i32;
                assert!(case.want.iter().all(|&sum| sum == want));
                case
            });
        }
    }
}

#[test]
fn every_byte_of_trits() {
    // All 243 digits of a byte in all places, against activations that tell them apart.
    let code = |field: usize, byte: usize| (byte / 3usize.pow(field as u32) % 3) as u8;
    let steps = 16;
    let activation = |_, c: usize| [1, 3, 9, 27, 81][c % 20 / 4];
    let code = |row: usize, c: usize| code(c % 20 / 4, (row + 16 * (c / 20) + c % 4 * 59) % 243);
    let case = Case::new(Packing::Trits, 1, steps, 1, 3, code, activation);
    Kernels::available().into_iter().for_each(|kernels| case.check(kernels));
}

#[test]
fn packing_agrees() {
    let mut random = Random(3);
    for packing in PACKINGS {
        for steps in 1..=20 {
            let mut code = || random.below(largest_code(packing) + 1) as u8;
            let n = TILE_ROWS * steps * packing.step_cols();
            let codes: Vec<u8> = (0..n).map(|_| code()).collect();
            let mut want = vec![0; 64 * steps];
            SCALAR.pack_tile(packing, &codes, &mut want);
            for kernels in others() {
                let mut got = vec![0xee; 64 * steps];
                kernels.pack_tile(packing, &codes, &mut got);
                assert!(got == want, "{}: {packing:?}, {steps} steps", kernels.name());
            }
        }
    }
}

struct Codes(usize, usize, Vec<u8>, crate::weights::Scales);

impl TernaryRows for Codes {
    fn rows(&self) -> usize {
        self.0
    }

    fn cols(&self) -> usize {
        self.1
    }

    fn scales(&self) -> &crate::weights::Scales {
        &self.3
    }

    fn decode_row(&self, row: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.2[row * self.1..][..self.1]);
    }
}

#[test]
fn a_packed_matrix_holds_every_code() {
    let (rows, cols) = (37, 53);
    let mut random = Random(5);
    for n_codes in [3, 4] {
        let codes: Vec<u8> = (0..rows * cols).map(|_| random.below(n_codes) as u8).collect();
        let source = Codes(rows, cols, codes.clone(), crate::weights::Scales::Tensor(1.0));
        for kernels in Kernels::available() {
            for (packing, threads) in [(PACKINGS[0], 1), (PACKINGS[0], 5), (PACKINGS[1], 2)] {
                let pool = crate::threads::ThreadPool::new(threads).unwrap();
                let mut memory = WeightMemory::new();
                let packed =
                    PackedTernary::new(&source, packing, kernels, &pool, &mut memory).unwrap();
                // Code 3 is no trit.
                assert_eq!(packed.packing(), if n_codes == 3 { packing } else { Packing::Codes });
                for row in 0..rows {
                    for col in 0..cols {
                        assert_eq!(packed.code(row, col), codes[row * cols + col]);
                    }
                }
            }
        }
    }
}

#[test]
fn impossible_matrices_are_errors() {
    let pool = crate::threads::ThreadPool::new(1).unwrap();
    for (rows, cols) in [(0, 4), (4, 0), (1, crate::weights::MAX_TERNARY_COLS + 1)] {
        let source = Codes(rows, cols, Vec::new(), crate::weights::Scales::Tensor(1.0));
        for packing in PACKINGS {
            let mut memory = WeightMemory::new();
            let packed = PackedTernary::new(&source, packing, &SCALAR, &pool, &mut memory);
            assert!(packed.is_err(), "{rows}×{cols}");
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn quantization_follows_its_definition() {
    let mut random = Random(11);
    for cols in (1..=70).chain([2560, 6912]) {
        for magnitude in [0.0, 1e-30, 1e-6, 1.0, 300.0, 1e30] {
            let mut x: Vec<f32> = random.floats(cols).iter().map(|x| x * magnitude).collect();
            x[cols / 2] = magnitude;
            if cols > 3 {
                // Ties: halves of a step.
                x[0] = magnitude * (2.5 / 127.0);
                x[1] = magnitude * (-3.5 / 127.0);
            }
            for (scale_cols, sum_cols) in [(cols, cols), (cols, 16), (16, 16), (32, 32)] {
                let stride = cols.next_multiple_of(16) + 16;
                let n_scales = cols.div_ceil(scale_cols);
                let n_sums = cols.div_ceil(sum_cols);
                let (mut want, mut scales) = (vec![0i8; stride], vec![0.0; n_scales]);
                for (i, span) in x.chunks(scale_cols).enumerate() {
                    let max = span.iter().fold(1e-5f32, |max, x| max.max(x.abs()));
                    for (c, x) in span.iter().enumerate() {
                        let q = (x * (127.0 / max)).round_ties_even().clamp(-128.0, 127.0);
                        want[i * scale_cols + c] = q as i8;
                    }
                    scales[i] = max / 127.0;
                }
                let sums: Vec<i32> = want[..cols]
                    .chunks(sum_cols)
                    .map(|span| span.iter().map(|&q| i32::from(q)).sum())
                    .collect();
                for kernels in Kernels::available() {
                    let mut got = (vec![9i8; stride], vec![9.0; n_scales], vec![9; n_sums]);
                    let (codes, got_scales, got_sums) = (&mut got.0, &mut got.1, &mut got.2);
                    kernels.quantize(&x, scale_cols, sum_cols, codes, got_scales, got_sums);
                    let what = format!("{}: {cols} columns of {magnitude}", kernels.name());
                    assert!(got.0 == want, "{what}");
                    assert_eq!(bits(&got.1), bits(&scales), "{what}");
                    assert_eq!(got.2, sums, "{what}");
                }
            }
        }
    }
}

#[test]
fn quantization_shows_what_is_not_finite() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 15, 16, 39] {
            let mut x = Random(2).floats(40);
            x[at] = bad;
            for kernels in Kernels::available() {
                let mut got = ([9i8; 48], [0.0; 1], [9; 1]);
                kernels.quantize(&x, 40, 40, &mut got.0, &mut got.1, &mut got.2);
                assert!(got.1[0].is_nan(), "{}", kernels.name());
                assert_eq!((got.0, got.2), ([0; 48], [0]), "{}", kernels.name());
            }
        }
    }
}

#[test]
fn rescaling_agrees() {
    let mut random = Random(23);
    for (n_tiles, n_tokens, n_groups) in [(1, 1, 1), (3, 1, 1), (2, 5, 1), (1, 1, 7), (2, 3, 4)] {
        let n = n_tiles * n_tokens * n_groups;
        let sums: Vec<i32> = (0..n * TILE_ROWS).map(|_| random.next() as i32 >> 6).collect();
        let code_sums: Vec<i32> =
            (0..n_tokens * n_groups).map(|_| random.next() as i32 >> 9).collect();
        let row_scales = random.floats(n_tiles * TILE_ROWS);
        let group_scales = random.floats(n * TILE_ROWS);
        for scale_per_group in [false, true] {
            let token_scales = random.floats(n_tokens * if scale_per_group { n_groups } else { 1 });
            for weights in [
                WeightScales::Tensor(0.37),
                WeightScales::Row(&row_scales),
                WeightScales::Group {
                    values: &group_scales,
                    n_weight_groups: n_groups,
                    sum_groups: 1,
                },
                WeightScales::Group {
                    values: &group_scales,
                    n_weight_groups: n_groups.div_ceil(2),
                    sum_groups: 2,
                },
            ] {
                let job = Rescale {
                    sums: &sums,
                    n_tokens,
                    n_groups,
                    code_sums: &code_sums,
                    token_scales: &token_scales,
                    scale_per_group,
                    weights,
                };
                let mut want = vec![0.0; n_tiles * n_tokens * TILE_ROWS];
                SCALAR.rescale(&job, &mut want);
                for kernels in others() {
                    let mut got = vec![9.0; want.len()];
                    kernels.rescale(&job, &mut got);
                    assert_eq!(bits(&got), bits(&want), "{}", kernels.name());
                }
            }
        }
    }
}

#[test]
fn float_products_agree() {
    let mut random = Random(31);
    for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        for cols in (1..=70).chain([250, 1024]) {
            for n_rows in [1, 2, 3, 4, 5, 8, 15, 16] {
                for n_tokens in [1, 2, 3, 4, 5, 9] {
                    if cols > 40 && (n_rows != 15 || n_tokens != 5) {
                        continue;
                    }
                    // An odd offset: files promise no alignment.
                    let mut bytes = vec![0xffu8];
                    for _ in 0..n_rows * cols {
                        let x = random.float() * 4.0;
                        match dtype {
                            FloatType::F32 => bytes.extend(x.to_le_bytes()),
                            FloatType::F16 => bytes.extend(half::f16::from_f32(x).to_le_bytes()),
                            FloatType::BF16 => bytes.extend(half::bf16::from_f32(x).to_le_bytes()),
                        }
                    }
                    let x = random.floats(n_tokens * cols);
                    let tile = FloatTile { bytes: &bytes[1..], dtype, cols };
                    let mut want = vec![7.0; n_tokens * TILE_ROWS];
                    SCALAR.float_products(&tile, &x, n_tokens, &mut want);
                    for kernels in others() {
                        let mut got = vec![7.0; want.len()];
                        kernels.float_products(&tile, &x, n_tokens, &mut got);
                        let what = format!("{dtype:?}, {n_rows}×{cols}, {n_tokens} tokens");
                        assert_eq!(bits(&got), bits(&want), "{}: {what}", kernels.name());
                    }
                }
            }
        }
    }
}

#[test]
fn scalar_float_products_use_the_order_of_all_sums() {
    let mut random = Random(37);
    let (cols, rows) = (100, 16);
    let weights = random.floats(rows * cols);
    let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    let x = random.floats(cols);
    let mut out = [0.0; TILE_ROWS];
    SCALAR.float_products(
        &FloatTile { bytes: &bytes, dtype: FloatType::F32, cols },
        &x,
        1,
        &mut out,
    );
    for (row, y) in weights.chunks_exact(cols).zip(out) {
        assert_eq!(y.to_bits(), crate::cpu::math::dot(row, &x).to_bits());
    }
}

#[test]
fn norms_and_gates_agree() {
    let mut random = Random(41);
    for n in 1..=100 {
        let (x, up) = (random.floats(n), random.floats(n));
        let norm = NormWeights { weight: random.floats(n), eps: 1e-5 };
        let mut want = vec![0.0; n];
        SCALAR.norm(&x, &norm, &mut want);
        for kernels in others() {
            let mut got = vec![9.0; n];
            kernels.norm(&x, &norm, &mut got);
            assert_eq!(bits(&got), bits(&want), "{}: norm of {n}", kernels.name());
        }
        for activation in [Activation::Relu2, Activation::Silu] {
            let mut want: Vec<f32> = x.iter().map(|x| 9.0 * x).collect();
            let input = want.clone();
            SCALAR.gate(activation, &mut want, &up);
            for kernels in others() {
                let mut got = input.clone();
                kernels.gate(activation, &mut got, &up);
                assert_eq!(bits(&got), bits(&want), "{}: {activation:?}", kernels.name());
            }
        }
    }
}

#[test]
fn noise_agrees() {
    for (n, first) in [(1, 0), (7, 3), (64, 128_000), (100, u32::MAX - 50)] {
        let noise = Noise::new([n as u32, 9], 0.7);
        let mut want = vec![0.0; n];
        SCALAR.noise(&noise, first, &mut want);
        for kernels in others() {
            let mut got = vec![9.0; n];
            kernels.noise(&noise, first, &mut got);
            assert_eq!(bits(&got), bits(&want), "{}: noise of {n}", kernels.name());
        }
    }
}

#[test]
fn names_choose() {
    for kernels in Kernels::available() {
        assert!(std::ptr::eq(Kernels::by_name(kernels.name()).unwrap(), kernels));
    }
    let error = Kernels::by_name("abacus").unwrap_err().to_string();
    assert!(error.contains("abacus") && error.contains("scalar"), "{error}");
    assert_eq!(Kernels::available().last().unwrap().name(), "scalar");
}

#[test]
fn wide_products_are_exact_sums_times_scales() {
    let mut random = Random(11);
    for terms in [1, 2, 3, 16, 37] {
        for cols in [1, 15, 16, 17, 31, 32, 33, 70] {
            for rows in [1, 2, 3, 4, 7, 8, 11, 12, 13, 25] {
                let (right_stride, out_stride) = (cols + 3, cols + 5);
                let b: Vec<i8> =
                    (0..terms * right_stride).map(|_| random.below(256) as u8 as i8).collect();
                let mut right = WideMatrix::default();
                right.pack(&b, right_stride, terms, cols);
                assert_eq!((right.terms(), right.cols()), (terms, cols));
                let stride = right.padded_terms() + 2;
                let a: Vec<i16> = (0..rows * stride)
                    .map(|i| {
                        let value = random.below(65_535) as i32 - 32_767;
                        // Padding is 0; beyond it lies what a kernel must not read.
                        if i % stride == terms && terms % 2 == 1 { 0 } else { value as i16 }
                    })
                    .collect();
                let scales = random.floats(rows);
                let before = random.floats(rows * out_stride);
                let mut want = before.clone();
                for r in 0..rows {
                    for c in 0..cols {
                        let sum: i32 = (0..terms)
                            .map(|t| {
                                i32::from(a[r * stride + t]) * i32::from(b[t * right_stride + c])
                            })
                            .sum();
                        want[r * out_stride + c] += sum as f32 * scales[r];
                    }
                }
                for kernels in Kernels::available() {
                    let mut got = before.clone();
                    let left = WideRows { values: &a, stride, scales: &scales };
                    kernels.wide_products(&left, &right, &mut got, out_stride);
                    let case = format!("{} {rows} {terms} {cols}", kernels.name());
                    assert!(
                        got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{case}"
                    );
                }
            }
        }
    }
}

#[test]
fn byte_products_equal_plain_loops() {
    // Tiles, steps and tokens around the sizes of the kernels' passes.
    let most = MAX_BYTE_COLS / 4;
    let few = (1..=9).map(|n_tokens| (3, 7, n_tokens));
    let cases = [(1, 1, 1), (2, 2, 3), (1, 64, 5), (4, 5, 17), (1, most, 1), (2, most, 5)];
    for kernels in Kernels::available() {
        for (n_tiles, steps, n_tokens) in few.clone().chain(cases) {
            let stride = 4 * steps + 8;
            let hash = |i: usize| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8;
            let extreme = steps > 1000;
            let code = |i| if extreme { 255 } else { hash(i) };
            let tiles: Vec<u8> = (0..n_tiles * steps * STEP_BYTES).map(code).collect();
            let x = |i| if extreme { -128 } else { hash(i + 77) as i8 };
            let x: Vec<i8> = (0..n_tokens * stride).map(x).collect();
            let mut sums = vec![1; n_tiles * n_tokens * TILE_ROWS];
            let tokens = TokenCodes { codes: &x, stride, n_tokens };
            kernels.byte_products(&tiles, steps, &tokens, &mut sums);
            for (i, sum) in sums.iter().enumerate() {
                let (row, at) = (i % TILE_ROWS, i / TILE_ROWS);
                let (token, tile) = (at % n_tokens, at / n_tokens);
                let expected: i64 = (0..4 * steps)
                    .map(|c| {
                        let step = tile * steps + c / 4;
                        let code = tiles[step * STEP_BYTES + 4 * row + c % 4];
                        i64::from(code) * i64::from(x[token * stride + c])
                    })
                    .sum();
                assert_eq!(i64::from(*sum), expected, "{kernels:?} {steps} {n_tokens} {i}");
            }
        }
    }
}
