//! How fast rows come out of each packing: what loading a model costs before kernels lay it out.
//!
//! One element is one weight. A 2B4T model has 2.08 G ternary weights.

use bitnet_core::weights::{FloatRows, FloatType, Scales, TernaryRows};
use bitnet_quant::pack::{
    FloatFormat, FloatTensor, I2sLayout, Packing, TernaryTensor, encode, encode_float,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const ROWS: usize = 1024;
const COLS: usize = 2560;

/// Reproducible codes without a pattern; no zeros where the packing has none.
struct Source {
    codes: Vec<u8>,
    scales: Scales,
}

impl Source {
    fn new(has_zero: bool) -> Self {
        let mut state = 1u32;
        let codes = (0..ROWS * COLS).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if has_zero { (state >> 24) as u8 % 3 } else { (state >> 31) as u8 * 2 }
        });
        Self { codes: codes.collect(), scales: Scales::Tensor(0.5) }
    }
}

impl TernaryRows for Source {
    fn rows(&self) -> usize {
        ROWS
    }
    fn cols(&self) -> usize {
        COLS
    }
    fn scales(&self) -> &Scales {
        &self.scales
    }
    fn decode_row(&self, row: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.codes[row * COLS..][..COLS]);
    }
}

impl FloatRows for Source {
    fn rows(&self) -> usize {
        ROWS
    }
    fn cols(&self) -> usize {
        COLS
    }
    fn decode_row(&self, row: usize, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(&self.codes[row * COLS..]) {
            *out = f32::from(*code) - 1.0;
        }
    }
}

fn ternary(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ternary");
    group.throughput(Throughput::Elements((ROWS * COLS) as u64));
    for packing in [
        Packing::I2S(I2sLayout::Canonical128),
        Packing::Tq1_0,
        Packing::Tq2_0,
        Packing::Q2_0,
        Packing::Q1_0,
        Packing::Ptq1_0,
        Packing::HfU8,
    ] {
        let source = Source::new(packing != Packing::Q1_0);
        let bytes = bytes::Bytes::from(encode(packing, &source, "w").unwrap().bytes);
        let open = || {
            if packing.has_scales() {
                TernaryTensor::new("w", packing, ROWS, COLS, bytes.clone())
            } else {
                let scales = source.scales.clone();
                TernaryTensor::with_scales("w", packing, ROWS, COLS, bytes.clone(), scales)
            }
            .unwrap()
        };
        group.bench_function(format!("{packing} check"), |bencher| bencher.iter(open));
        let tensor = open();
        let mut row_codes = vec![0; COLS];
        group.bench_function(format!("{packing} decode"), |bencher| {
            bencher.iter(|| {
                for row in 0..ROWS {
                    tensor.decode_row(row, black_box(&mut row_codes));
                }
            });
        });
    }
}

fn float(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("float");
    group.throughput(Throughput::Elements((ROWS * COLS) as u64));
    let source = Source::new(true);
    let encoded = |format| encode_float(format, &source, "w").unwrap();
    let cases = [
        (FloatFormat::Plain(FloatType::F32), encoded(FloatFormat::Plain(FloatType::F32))),
        (FloatFormat::Plain(FloatType::F16), encoded(FloatFormat::Plain(FloatType::F16))),
        (FloatFormat::Plain(FloatType::BF16), encoded(FloatFormat::Plain(FloatType::BF16))),
        (FloatFormat::Q8_0, encoded(FloatFormat::Q8_0)),
        (FloatFormat::Q6K, encoded(FloatFormat::Q6K)),
        (FloatFormat::Q4K, vec![0x11; FloatFormat::Q4K.bytes("w", ROWS, COLS).unwrap()]),
        (FloatFormat::Q4_0, vec![0x11; FloatFormat::Q4_0.bytes("w", ROWS, COLS).unwrap()]),
    ];
    for (format, bytes) in cases {
        let tensor = FloatTensor::new("w", format, ROWS, COLS, bytes).unwrap();
        let mut row_numbers = vec![0.0; COLS];
        group.bench_function(format!("{format} decode"), |bencher| {
            bencher.iter(|| {
                for row in 0..ROWS {
                    tensor.decode_row(row, black_box(&mut row_numbers));
                }
            });
        });
    }
}

criterion_group!(benches, ternary, float);
criterion_main!(benches);
