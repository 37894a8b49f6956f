//! Embeddings, logits, and norms on the way out.

use super::inputs::{Floats, Random, norm_reference};
use super::{ROUNDING, assert_close, download, rows_batch, upload};
use crate::backend::{Backend, Batch, SequenceSlice, TableRole};
use crate::weights::FloatType;
use std::sync::Arc;

const FORMATS: [Option<FloatType>; 4] =
    [Some(FloatType::F32), Some(FloatType::F16), Some(FloatType::BF16), None];

pub(super) fn embedding_copies_rows<B: Backend>(make: &impl Fn() -> B, record: &mut Vec<f32>) {
    let mut random = Random(1);
    for (vocab, hidden) in [(5, 8), (33, 100), (300, 64)] {
        for dtype in FORMATS {
            let mut backend = make();
            let source = Arc::new(Floats::new(vocab, hidden, random.floats(vocab * hidden), dtype));
            let table = backend.table(source.clone(), TableRole::Head).expect("a table");
            let mut x = backend.buffer(4, hidden).expect("a buffer");
            let tokens = vec![vocab as u32 - 1, 0, 0, vocab as u32 / 2];
            let slice = SequenceSlice { rows: 0..4, first_position: 0, blocks: vec![0] };
            let batch = Batch { tokens, sequences: vec![slice], ..Batch::default() };
            backend.begin(&batch).expect("a step");
            backend.embed(&table, &mut x).expect("tokens of the table");
            let got = download(&mut backend, &x);
            backend.finish().expect("the end of a step");
            for (got, &token) in got.chunks_exact(hidden).zip(&batch.tokens) {
                assert_eq!(got, source.row(token as usize), "{dtype:?} {vocab}×{hidden}");
            }
            record.extend(got);
        }
    }
}

pub(super) fn logits_are_dot_products<B: Backend>(make: &impl Fn() -> B, record: &mut Vec<f32>) {
    let mut random = Random(2);
    for (vocab, hidden, rows) in [(7, 8, 1), (77, 96, 3), (320, 128, 18), (1000, 48, 2)] {
        for dtype in FORMATS {
            let mut backend = make();
            let source = Arc::new(Floats::new(vocab, hidden, random.floats(vocab * hidden), dtype));
            let head = backend.table(source.clone(), TableRole::Head).expect("a table");
            let weights = random.norm(hidden);
            let norm = backend.norm(&weights).expect("a norm");
            let mut batch = rows_batch(rows);
            batch.logit_rows.retain(|row| row % 3 != 1);
            let x = random.floats(rows * hidden);
            backend.begin(&batch).expect("a step");
            let buffer = upload(&mut backend, &x, hidden);
            let mut logits = vec![f32::NAN];
            backend.logits(&buffer, &norm, &head, &mut logits).expect("logits");
            backend.finish().expect("the end of a step");
            assert_eq!(logits.len(), batch.logit_rows.len() * vocab);
            for (got, &row) in logits.chunks_exact(vocab).zip(&batch.logit_rows) {
                let x: Vec<f64> =
                    x[row * hidden..][..hidden].iter().copied().map(f64::from).collect();
                let normed = norm_reference(&x, &weights);
                for (token, &got) in got.iter().enumerate() {
                    let terms =
                        normed.iter().zip(source.row(token)).map(|(x, &w)| x * f64::from(w));
                    let size: f64 = terms.clone().map(f64::abs).sum();
                    // A norm's factor is off by half the roundings of its sum and a few more, a
                    // product by one, a sum in any order by its length.
                    let roundings = hidden as f64 / 2.0 + 6.0 + 1.0 + hidden as f64;
                    let what = || format!("{dtype:?} {vocab}×{hidden} row {row} token {token}");
                    assert_close(got, terms.sum(), roundings * ROUNDING * size, &what);
                }
            }
            record.extend(logits);
        }
    }
}

pub(super) fn reading_normalizes<B: Backend>(make: &impl Fn() -> B, record: &mut Vec<f32>) {
    let mut random = Random(3);
    for (rows, width) in [(1, 8), (3, 100), (20, 2560)] {
        let mut backend = make();
        let x = random.floats(rows * width);
        let weights = random.norm(width);
        let norm = backend.norm(&weights).expect("a norm");
        backend.begin(&rows_batch(rows)).expect("a step");
        let buffer = upload(&mut backend, &x, width);
        assert_eq!(download(&mut backend, &buffer), x);
        let mut got = Vec::new();
        backend.read(&buffer, Some(&norm), &mut got).expect("a buffer can be read");
        backend.finish().expect("the end of a step");
        for (row, (got, x)) in got.chunks_exact(width).zip(x.chunks_exact(width)).enumerate() {
            let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
            for (&got, want) in got.iter().zip(norm_reference(&x, &weights)) {
                let tolerance = (width as f64 / 2.0 + 6.0) * ROUNDING * want.abs();
                assert_close(got, want, tolerance, &|| format!("width {width} row {row}"));
            }
        }
        record.extend(got);
    }
}
