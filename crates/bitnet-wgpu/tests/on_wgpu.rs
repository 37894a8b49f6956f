//! The conformance suite on this machine's device, in every form the shaders have.
//!
//! Without a Vulkan, Metal or Direct3D 12 device the tests say so and pass; with
//! `BITNET_REQUIRE_WGPU` set they fail, so that a check made to run them cannot miss them. On a device
//! that the CPU imitates they take a minute, so there they run only if that is set
//! (`scripts/test-wgpu.sh`).

use std::sync::Arc;

use bitnet_core::backend::{Backend, Batch, SequenceSlice, TableRole};
use bitnet_core::testing::conformance;
use bitnet_core::weights::{FloatRows, NormWeights};
use bitnet_wgpu::{Options, WgpuBackend};

/// Whether there is a device; says so if there is none.
fn present() -> bool {
    let required = std::env::var_os("BITNET_REQUIRE_WGPU").is_some();
    match bitnet_wgpu::find() {
        Ok(found) if required || found.accelerates => {
            eprintln!("on {}", found.hardware);
            true
        }
        Ok(found) => {
            eprintln!("SKIPPED, {} is imitated: scripts/test-wgpu.sh", found.hardware);
            false
        }
        Err(error) => {
            assert!(!required, "a wgpu device is required: {error}");
            eprintln!("SKIPPED, no wgpu device: {error}");
            false
        }
    }
}

fn conforms(options: Options) -> Vec<f32> {
    // One device for the whole suite, so that each kernel is compiled once.
    let first = WgpuBackend::with_options(options).expect("a device was found");
    conformance(|| first.beside().expect("room for another"))
}

#[test]
fn conforms_with_all_the_device_has_and_with_the_least() {
    if !present() {
        return;
    }
    let least =
        Options { subgroups: false, half_precision: false, in_place: false, ..Options::default() };
    let split = Options { max_binding_bytes: 16 << 10, ..Options::default() };
    let [all, least, split] = std::thread::scope(|scope| {
        let suites = [Options::default(), least, split];
        suites
            .map(|options| scope.spawn(move || conforms(options)))
            .map(|suite| suite.join().expect("the suite passes"))
    });
    // Only integers are folded in subgroups, and halves become the same floats either way.
    assert!(all == least, "what a device has changed results");
    // Weights split over bindings give the same results: a row is computed in one of them.
    assert!(all == split, "splitting changed results");
}

/// A head whose logits are chosen freely: features are units, so logit `t` of `x = 1` is `row[t]`.
struct Head(Vec<f32>);

impl FloatRows for Head {
    fn rows(&self) -> usize {
        self.0.len()
    }

    fn cols(&self) -> usize {
        2
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        // Both halves are exact in half precision.
        out.copy_from_slice(&[self.0[row], 0.0]);
    }
}

#[test]
fn the_best_logits_are_found_on_the_device() {
    if !present() {
        return;
    }
    // Few values, so that many are equal, over several pieces; the last piece is short.
    for (vocab, ks) in [(10, [1, 3, 9]), (5000, [1, 40, 256]), (20_000, [1, 7, 256])] {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 301
        };
        let values: Vec<f32> = (0..vocab).map(|_| (next() as f32 - 150.0) / 4.0).collect();
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
        let mut backend = WgpuBackend::new().expect("a device");
        let head = backend.table(Arc::new(Head(values.clone())), TableRole::Head).expect("a head");
        let norm = NormWeights { weight: vec![1.0, 1.0], eps: 0.0 };
        let norm = backend.norm(&norm).expect("a norm");
        // The same table as an embedding: tokens whose first feature is not 0.
        let ones = backend.table(Arc::new(Head(vec![1.0; 3])), TableRole::Embedding);
        let ones = ones.expect("a table");
        let mut x = backend.buffer(3, 2).expect("a buffer");
        for k in ks {
            let sequence = |row: usize| SequenceSlice {
                rows: row..row + 1,
                first_position: 0,
                blocks: vec![],
            };
            let batch = Batch {
                tokens: vec![0, 1, 2],
                sequences: (0..3).map(sequence).collect(),
                logit_rows: vec![0, 2],
                n_best: Some(k),
                ..Batch::default()
            };
            backend.begin(&batch).expect("a step");
            backend.embed(&ones, &mut x).expect("embeddings");
            let mut logits = Vec::new();
            let before = backend.traffic().downloaded_bytes();
            backend.logits(&x, &norm, &head, &mut logits).expect("logits");
            backend.finish().expect("the end");
            let came_back = backend.traffic().downloaded_bytes() - before;
            assert_eq!(came_back, 2 * 8 * k as u64, "only the best come back");
            for row in logits.chunks_exact(vocab) {
                let found: Vec<usize> =
                    (0..vocab).filter(|&t| row[t] > f32::NEG_INFINITY).collect();
                let mut want = order[..k].to_vec();
                want.sort_unstable();
                assert_eq!(found, want, "{k} of {vocab}");
                // x = (1, 0) has a mean square of 1/2.
                let factor = 2f32.sqrt();
                for t in found {
                    let error = (row[t] - values[t] * factor).abs();
                    assert!(error <= values[t].abs() * 1e-6, "{} for {}", row[t], values[t]);
                }
            }
        }
    }
}

/// Rows of 1024 features, all of them the row's number.
struct Numbered(usize);

impl FloatRows for Numbered {
    fn rows(&self) -> usize {
        self.0
    }

    fn cols(&self) -> usize {
        1024
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        out.fill(row as f32);
    }
}

/// Large weights go over in pieces through two staging buffers in turn: one is copied while the next
/// is packed. Where host and device have one memory, nothing is allocated beside the weights, and
/// results are read where kernels wrote them.
#[test]
fn weights_pass_through_two_staging_buffers_or_none() {
    if !present() {
        return;
    }
    let unified = bitnet_wgpu::find().expect("a device").unified_memory;
    brings_weights(false, 2 * (4 << 20) + (64 << 10));
    brings_weights(true, if unified { 64 << 10 } else { 2 * (4 << 20) + (64 << 10) });
}

/// Brings a table to the device; takes `most` bytes there beside it, at most.
fn brings_weights(in_place: bool, most: u64) {
    /// In pieces of 4 MiB: five and a short one.
    const ROWS: usize = 10 * 1024 + 500;
    let options = Options { in_place, ..Options::default() };
    let mut backend = WgpuBackend::with_options(options).expect("a device");
    let source = Arc::new(Numbered(ROWS));
    let table = backend.table(source, TableRole::Embedding).expect("a table");
    let stats = backend.memory_stats();
    let bytes = (ROWS * 1024 * 2) as u64;
    assert_eq!((stats.transfers, stats.transferred_bytes), (6, bytes));
    assert!(stats.bandwidth > 0.0);
    let beside = stats.allocated_bytes - bytes;
    assert!(beside <= most, "{beside} bytes beside the weights");
    let tokens: Vec<u32> = vec![0, 2047, 2048, 10_239, 10_240, ROWS as u32 - 1];
    let rows = 0..tokens.len();
    let sequences = vec![SequenceSlice { rows: rows.clone(), first_position: 0, blocks: vec![] }];
    let batch = Batch { tokens: tokens.clone(), sequences, ..Batch::default() };
    let mut x = backend.buffer(rows.end, 1024).expect("a buffer");
    backend.begin(&batch).expect("a step");
    backend.embed(&table, &mut x).expect("embeddings");
    let mut out = Vec::new();
    backend.read(&x, None, &mut out).expect("rows");
    backend.finish().expect("the end");
    for (row, token) in out.chunks_exact(1024).zip(tokens) {
        // Halves have 11 bits.
        let want = half::f16::from_f32(token as f32).to_f32();
        assert!(row.iter().all(|&x| x == want), "row {token}");
    }
}

#[test]
fn a_lost_device_is_an_error_of_the_device_and_no_panic() {
    if !present() {
        return;
    }
    let mut backend = WgpuBackend::new().expect("a device");
    let table = backend.table(Arc::new(Head(vec![1.0; 8])), TableRole::Head).expect("a table");
    let mut x = backend.buffer(1, 2).expect("a buffer");
    let sequences = vec![SequenceSlice { rows: 0..1, first_position: 0, blocks: vec![] }];
    let batch = Batch { tokens: vec![1], sequences, ..Batch::default() };
    let mut step = |backend: &mut WgpuBackend, lose: Option<&dyn Fn()>| {
        backend.begin(&batch)?;
        backend.embed(&table, &mut x)?;
        if let Some(lose) = lose {
            lose();
        }
        let mut out = Vec::new();
        backend.read(&x, None, &mut out)?;
        backend.finish()?;
        Ok(out)
    };
    assert_eq!(step(&mut backend, None).expect("a step"), [1.0, 0.0]);
    let loss = backend.loss();
    let lost = step(&mut backend, Some(&loss)).expect_err("the device is lost in the step");
    assert!(matches!(lost, bitnet_core::Error::Device { .. }), "{lost}");
    let again = step(&mut backend, None).expect_err("it stays lost");
    assert!(matches!(again, bitnet_core::Error::Device { .. }), "{again}");
    assert!(backend.buffer(1, 2).is_err(), "nothing new can be made on it");
}
