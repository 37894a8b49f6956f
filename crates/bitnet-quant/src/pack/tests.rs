//! Every packing, one suite: what goes in comes out, bytes and codes alike, and what breaks a rule
//! is refused.

use super::*;
use proptest::prelude::*;

/// A matrix of plain codes.
pub(crate) struct Plain {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Scales,
}

impl TernaryRows for Plain {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn scales(&self) -> &Scales {
        &self.scales
    }
    fn decode_row(&self, row: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.codes[row * self.cols..][..self.cols]);
    }
}

const ALL: [Packing; 11] = [
    Packing::I2S(I2sLayout::Canonical128),
    Packing::I2S(I2sLayout::Arm64),
    Packing::I2S(I2sLayout::FourRows),
    Packing::Tq1_0,
    Packing::Tq2_0,
    Packing::Q2_0,
    Packing::Q2_0G128,
    Packing::Q1_0,
    Packing::Ptq1_0,
    Packing::Tiles,
    Packing::HfU8,
];

fn read(
    packing: Packing,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    scales: &Scales,
) -> TernaryTensor {
    if packing.has_scales() {
        TernaryTensor::new("w", packing, rows, cols, bytes).unwrap()
    } else {
        TernaryTensor::with_scales("w", packing, rows, cols, bytes, scales.clone()).unwrap()
    }
}

fn codes_of(tensor: &dyn TernaryRows) -> Vec<u8> {
    let mut codes = vec![9; tensor.rows() * tensor.cols()];
    for (row, out) in codes.chunks_exact_mut(tensor.cols()).enumerate() {
        tensor.decode_row(row, out);
    }
    codes
}

/// Codes that `packing` can hold, with some blocks of zeros among them.
fn codes_for(packing: Packing, rows: usize, cols: usize) -> impl Strategy<Value = Vec<u8>> {
    let code = match packing {
        Packing::Q1_0 => prop_oneof![Just(0u8), Just(2u8)].boxed(),
        Packing::Q2_0 | Packing::Q2_0G128 => (0..=3u8).boxed(),
        _ => (0..=2u8).boxed(),
    };
    let sparse = packing != Packing::Q1_0;
    let group = packing.block().map_or(16, |(block_cols, _)| block_cols);
    let zeros = proptest::collection::vec(proptest::bool::weighted(0.3), rows * cols / group);
    (proptest::collection::vec(code, rows * cols), zeros).prop_map(move |(mut codes, zeros)| {
        for (codes, zero) in codes.chunks_mut(group).zip(zeros) {
            if zero && sparse {
                codes.fill(1);
            }
        }
        codes
    })
}

fn case() -> impl Strategy<Value = (Packing, usize, usize, Vec<u8>)> {
    (0..ALL.len(), 1..6usize, 1..4usize).prop_flat_map(|(index, rows, blocks)| {
        let packing = ALL[index];
        let rows = if packing == Packing::I2S(I2sLayout::FourRows) { rows * 4 } else { rows };
        let cols = match packing {
            Packing::I2S(_) => blocks * 128,
            _ => packing.block().map_or(blocks * 7, |(block_cols, _)| blocks * block_cols),
        };
        codes_for(packing, rows, cols).prop_map(move |codes| (packing, rows, cols, codes))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn one_scale_survives_every_packing((packing, rows, cols, codes) in case()) {
        let has_nonzero = codes.iter().any(|&code| code != 1);
        let source = Plain { rows, cols, codes, scales: Scales::Tensor(0.375) };
        let encoded = encode(packing, &source, "w").unwrap();
        prop_assert_eq!(encoded.scale_error, 0.0);
        let tensor = read(packing, rows, cols, encoded.bytes.clone(), &source.scales);
        prop_assert_eq!(codes_of(&tensor), &source.codes[..]);
        if has_nonzero {
            prop_assert_eq!(tensor.scales(), &source.scales);
        }
        // Packed again, the bytes are the same.
        prop_assert_eq!(encode(packing, &tensor, "w").unwrap(), encoded);
    }

    #[test]
    fn group_scales_survive_block_packings((packing, rows, cols, codes) in case(), seed: u32) {
        let Some((group, _)) = packing.block() else { return Ok(()) };
        // Different exact scales; blocks of zeros have 0, as quantizers write them.
        let values: Vec<f32> = codes
            .chunks(group)
            .enumerate()
            .map(|(index, codes)| {
                let scale = (1 + (seed.wrapping_add(index as u32 * 7) % 97)) as f32 / 64.0;
                if codes.iter().all(|&code| code == 1) { 0.0 } else { scale }
            })
            .collect();
        let source = Plain { rows, cols, codes, scales: Scales::Group { group, values: values.clone() } };
        let encoded = encode(packing, &source, "w").unwrap();
        let tensor = read(packing, rows, cols, encoded.bytes.clone(), &source.scales);
        prop_assert_eq!(codes_of(&tensor), &source.codes[..]);
        let per_row = cols / group;
        for (index, codes) in source.codes.chunks(group).enumerate() {
            let scale = match tensor.scales() {
                Scales::Tensor(scale) => *scale,
                Scales::Row(values) => values[index / per_row],
                Scales::Group { values, .. } => values[index],
            };
            prop_assert!(scale == values[index] || codes.iter().all(|&code| code == 1));
        }
        prop_assert_eq!(encode(packing, &tensor, "w").unwrap(), encoded);
    }

    #[test]
    fn any_bytes_are_refused_or_valid(index in 0..ALL.len(), mut bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let packing = ALL[index];
        let (rows, cols) = (4, 256);
        let len = packing.bytes("w", rows, cols).unwrap();
        bytes.resize(len, 0b01_01_01_01);
        let tensor = if packing.has_scales() {
            TernaryTensor::new("w", packing, rows, cols, bytes)
        } else {
            TernaryTensor::with_scales("w", packing, rows, cols, bytes, Scales::Tensor(1.0))
        };
        let Ok(tensor) = tensor else { return Ok(()) };
        let max = if matches!(packing, Packing::Q2_0 | Packing::Q2_0G128) { 3 } else { 2 };
        prop_assert!(codes_of(&tensor).iter().all(|&code| code <= max));
    }
}

#[test]
fn rounding_a_scale_is_reported() {
    let source = Plain { rows: 2, cols: 256, codes: vec![2; 512], scales: Scales::Tensor(0.1) };
    let encoded = encode(Packing::Tq2_0, &source, "w").unwrap();
    assert!(encoded.scale_error > 0.0 && encoded.scale_error < 1.0 / 2048.0);
    let tensor = read(Packing::Tq2_0, 2, 256, encoded.bytes, &source.scales);
    assert_eq!(tensor.scales(), &Scales::Tensor(half::f16::from_f32(0.1).to_f32()));
}

#[test]
fn equal_scales_of_a_row_collapse_to_row_scales() {
    let scales = Scales::Group { group: 256, values: vec![0.5, 0.5, 0.25, 0.25] };
    let source = Plain { rows: 2, cols: 512, codes: vec![0; 1024], scales };
    let encoded = encode(Packing::Tq1_0, &source, "w").unwrap();
    let tensor = read(Packing::Tq1_0, 2, 512, encoded.bytes, &source.scales);
    assert_eq!(tensor.scales(), &Scales::Row(vec![0.5, 0.25]));
}

#[test]
fn what_does_not_fit_is_refused_with_its_reason() {
    let groups = |a, b| Scales::Group { group: 128, values: vec![a, b] };
    let cases = [
        (Packing::Q1_0, 1, 256, 1, Scales::Tensor(1.0), "row 0 has a weight of 0"),
        (Packing::Tq1_0, 1, 256, 3, Scales::Tensor(1.0), "row 0 has a weight of +2"),
        (Packing::HfU8, 1, 256, 3, Scales::Tensor(1.0), "row 0 has a weight of +2"),
        (Packing::Tq2_0, 1, 128, 0, Scales::Tensor(1.0), "columns divisible by 256, got 128"),
        (Packing::Tq2_0, 1, 256, 0, Scales::Tensor(1e-7), "half precision cannot hold"),
        (Packing::Tq2_0, 1, 256, 0, groups(1.0, 2.0), "row 0 has several scales in a block"),
        (Packing::I2S(I2sLayout::Canonical128), 1, 256, 0, groups(1.0, 2.0), "several scales"),
        (Packing::I2S(I2sLayout::Canonical128), 4, 64, 0, Scales::Tensor(1.0), "divisible by 128"),
        (Packing::I2S(I2sLayout::FourRows), 2, 256, 0, Scales::Tensor(1.0), "rows divisible by 4"),
    ];
    for (packing, rows, cols, code, scales, reason) in cases {
        let source = Plain { rows, cols, codes: vec![code; rows * cols], scales };
        let message = encode(packing, &source, "blk.0").unwrap_err().to_string();
        assert!(message.starts_with(&format!("blk.0 does not fit {packing}")), "{message}");
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn wrong_lengths_shapes_and_scales_are_refused() {
    let new = |packing, rows, cols, len| {
        TernaryTensor::new("w", packing, rows, cols, vec![0; len]).unwrap_err().to_string()
    };
    assert_eq!(
        new(Packing::Tq2_0, 2, 256, 131),
        "w, 2 × 256 in TQ2_0: expected 132 bytes, got 131"
    );
    assert!(new(Packing::Tq2_0, usize::MAX, 256, 0).contains("a size in memory"));
    assert!(new(Packing::Tq2_0, 0, 256, 0).contains("a size in memory"));
    assert!(new(Packing::HfU8, 4, 4, 4).contains("scales beside the codes, got none"));
    let beside = |packing, scales| {
        TernaryTensor::with_scales("w", packing, 4, 32, vec![0; 32], scales)
            .unwrap_err()
            .to_string()
    };
    assert!(beside(Packing::HfU8, Scales::Tensor(f32::NAN)).contains("finite numbers, got NaN"));
    assert!(beside(Packing::HfU8, Scales::Row(vec![1.0; 3])).contains("expected 4, got 3"));
    let group = Scales::Group { group: 24, values: vec![1.0; 8] };
    assert!(beside(Packing::HfU8, group).contains("multiple of 16"));
    let group = Scales::Group { group: 16, values: vec![1.0; 7] };
    assert!(beside(Packing::HfU8, group).contains("expected 8, got 7"));
}

#[test]
fn bad_blocks_are_named() {
    let mut bytes = vec![0; 4 * 66];
    bytes[3 * 66 + 65] = 0x7C; // infinity
    let new = |bytes: &[u8]| {
        let bytes = bytes.to_vec();
        TernaryTensor::new("w", Packing::Tq2_0, 2, 512, bytes).unwrap_err().to_string()
    };
    assert_eq!(new(&bytes), "w, row 1, columns from 256: expected a finite scale, got inf");
    bytes[66 + 10] = 3;
    assert_eq!(
        new(&bytes),
        "w, row 0, columns from 256: expected the codes 0, 1 and 2, got code 3"
    );
}

#[test]
fn large_tensors_are_checked_like_small_ones() {
    let (rows, cols) = (4096, 1024);
    let mut codes: Vec<u8> = (0..rows * cols).map(|i| (i * 31 % 7 % 3) as u8).collect();
    codes[..cols].fill(1);
    let source = Plain { rows, cols, codes, scales: Scales::Tensor(0.5) };
    for packing in [Packing::Tq2_0, Packing::Tq1_0, Packing::I2S(I2sLayout::Canonical128)] {
        let encoded = encode(packing, &source, "w").unwrap();
        let tensor = read(packing, rows, cols, encoded.bytes.clone(), &source.scales);
        assert_eq!(tensor.scales(), &source.scales);
        let mut row = vec![9; cols];
        for index in [0, 1, rows - 1] {
            tensor.decode_row(index, &mut row);
            assert_eq!(row, source.codes[index * cols..][..cols]);
        }
        if packing != Packing::Tq1_0 {
            let mut bytes = encoded.bytes;
            let middle = bytes.len() / 66 / 2 * 66;
            bytes[middle] = 0xFF;
            assert!(TernaryTensor::new("w", packing, rows, cols, bytes).is_err());
        }
    }
}
