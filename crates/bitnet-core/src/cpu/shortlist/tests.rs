//! Shortlists against whole heads: the best logits, bit for bit, and what no bound holds for.

use super::*;
use crate::weights::FloatType;
use bytes::Bytes;

struct Head {
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

impl FloatRows for Head {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, _: usize, _: &mut [f32]) {
        unreachable!("the bytes are plain numbers");
    }

    fn raw(&self) -> Option<(FloatType, Bytes)> {
        Some((FloatType::F16, self.bytes.clone()))
    }
}

pub(super) fn noise(seed: usize) -> impl Iterator<Item = f32> {
    (0..).map(move |i: usize| {
        let hash = (i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // A sum of uniform numbers is nearly normal, which has tails as real rows do.
        (0..4).map(|b| f32::from((hash >> (16 * b)) as u16) / 65_536.0 - 0.5).sum()
    })
}

#[test]
fn the_best_logits_are_those_of_the_whole_head() {
    let (rows, cols) = (MIN_ROWS + 37, 130);
    let bytes = noise(1).take(rows * cols).flat_map(|x| half::f16::from_f32(x).to_le_bytes());
    let head = Head { rows, cols, bytes: bytes.collect() };
    let pool = ThreadPool::new(2).unwrap();
    let mut memory = WeightMemory::new();
    let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
    let any = Kernels::available()[0];
    let list =
        Shortlist::new(&matrix, None, any, &pool, &mut memory).unwrap().expect("large enough");
    let most = SIFTED_TOKENS + 3;
    let x: Vec<f32> = noise(9).take(most * cols).collect();
    for kernels in Kernels::available() {
        let mut exact = vec![0.0; most * rows];
        matrix.project(&pool, kernels, &x, most, &mut exact);
        let cases = [(1, 3), (40, SIFTED_TOKENS - 1), (1, SIFTED_TOKENS), (40, most)];
        let with_noise = |(n_best, n)| [(n_best, n, false), (n_best, n, true)];
        for (n_best, n, noisy) in cases.into_iter().flat_map(with_noise) {
            let x = &x[..n * cols];
            // Of the spread of the logits, and none for one of the tokens.
            let noise = |i: usize| match i {
                1 => Noise::NONE,
                _ => Noise::new([i as u32, 5], 0.5),
            };
            let noise: Vec<Noise> = (0..if noisy { n } else { 0 }).map(noise).collect();
            let mut ours = vec![0.0; n * rows];
            let mut scratch = ShortlistScratch::default();
            let inputs = Rows { x, noise: &noise };
            list.logits(&matrix, &pool, kernels, inputs, n_best, &mut scratch, &mut ours);
            let logits = ours.chunks_exact(rows).zip(exact.chunks_exact(rows));
            for (token, (ours, exact)) in logits.enumerate() {
                let noise = noise.get(token).copied().unwrap_or_default();
                let noisy = |row: usize| exact[row] + noise.at(row as u32);
                let mut order: Vec<usize> = (0..rows).collect();
                order.sort_by(|&a, &b| noisy(b).total_cmp(&noisy(a)));
                for &row in &order[..n_best] {
                    assert_eq!(ours[row].to_bits(), exact[row].to_bits());
                }
                let kept = ours.iter().filter(|x| x.is_finite()).count();
                assert!(kept < rows / 4, "{kept} of {rows} rows for {n_best}");
                assert!(ours.iter().zip(exact).all(|(a, b)| a == b || *a == f32::NEG_INFINITY));
            }
        }
    }
}

#[test]
fn what_is_not_a_number_excludes_nothing() {
    let (rows, cols) = (MIN_ROWS, 16);
    let bytes = noise(1).take(rows * cols).flat_map(|x| half::f16::from_f32(x).to_le_bytes());
    let head = Head { rows, cols, bytes: bytes.collect() };
    let (pool, kernels) = (ThreadPool::new(2).unwrap(), Kernels::available()[0]);
    let mut memory = WeightMemory::new();
    let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
    let list = Shortlist::new(&matrix, None, kernels, &pool, &mut memory).unwrap().unwrap();
    let of_broken = |broken| [2, SIFTED_TOKENS].map(|n| (broken, n));
    for (broken, n) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().flat_map(of_broken)
    {
        let mut x: Vec<f32> = noise(2).take(n * cols).collect();
        x[cols + 3] = broken;
        let (mut ours, mut exact) = (vec![0.0; n * rows], vec![0.0; n * rows]);
        matrix.project(&pool, kernels, &x, n, &mut exact);
        let mut scratch = ShortlistScratch::default();
        list.logits(
            &matrix,
            &pool,
            kernels,
            Rows { x: &x, noise: &[] },
            1,
            &mut scratch,
            &mut ours,
        );
        assert!(ours[..rows].contains(&f32::NEG_INFINITY), "the whole token is not disturbed");
        for (ours, exact) in ours[rows..2 * rows].iter().zip(&exact[rows..2 * rows]) {
            assert!(ours.to_bits() == exact.to_bits() || ours.is_nan() && exact.is_nan());
        }
    }
}

#[test]
fn a_written_copy_finds_the_same_rows() {
    let (rows, cols) = (MIN_ROWS + 5, 34);
    let bytes = noise(1).take(rows * cols).flat_map(|x| half::f16::from_f32(x).to_le_bytes());
    let head = Head { rows, cols, bytes: bytes.collect() };
    let (pool, kernels) = (ThreadPool::new(1).unwrap(), Kernels::available()[0]);
    let mut memory = WeightMemory::new();
    let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
    let written = round_rows(&head).unwrap().expect("large enough");
    let mut new = |rounded| Shortlist::new(&matrix, rounded, kernels, &pool, &mut memory);
    let (made, read) = (new(None).unwrap().unwrap(), new(Some(written.clone())).unwrap().unwrap());
    assert!(made.codes[..] == read.codes[..] && made.bounds == read.bounds);
    let cut = RoundedRows { codes: written.codes.slice(64..), ..written.clone() };
    assert!(matches!(new(Some(cut)), Err(Error::Shape { .. })));
    let cut = RoundedRows { bounds: written.bounds.slice(12..), ..written.clone() };
    assert!(matches!(new(Some(cut)), Err(Error::Shape { .. })));
    let mut broken = written.bounds.to_vec();
    broken[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let broken = RoundedRows { bounds: broken.into(), ..written };
    assert!(matches!(new(Some(broken)), Err(Error::Invalid { .. })));
}

#[test]
fn a_small_head_needs_no_copy() {
    let head = Head { rows: 4, cols: 2, bytes: Bytes::from(vec![0; 16]) };
    let pool = ThreadPool::new(1).unwrap();
    let mut memory = WeightMemory::new();
    let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
    let any = Kernels::available()[0];
    assert!(Shortlist::new(&matrix, None, any, &pool, &mut memory).unwrap().is_none());
}
