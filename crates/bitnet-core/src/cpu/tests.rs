//! The conformance suite on this backend, and what only the CPU promises.

use super::*;
use crate::backend::KvType;
use crate::backend::TableRole;
use crate::testing::conformance;
use crate::weights::FloatType;

#[test]
fn every_kernel_and_thread_count_conforms_with_the_same_bits() {
    let run = |kernels: &Kernels, threads| -> Vec<u32> {
        let make = || CpuBackend::new(Some(threads), Some(kernels.name())).unwrap();
        conformance(make).into_iter().map(f32::to_bits).collect()
    };
    let sets = Kernels::available();
    let want = run(sets[sets.len() - 1], 1);
    for (i, kernels) in sets.iter().enumerate() {
        // Every set on two threads, the fastest on one and three as well.
        for threads in if i == 0 { 1..=3 } else { 2..=2 } {
            let (name, got) = (kernels.name(), run(kernels, threads));
            assert!(got == want, "{name} on {threads} threads differs from scalar on one");
        }
    }
}

const SPEC: KvSpec = KvSpec {
    n_layers: 2,
    n_kv_heads: 2,
    head_dim: 16,
    block_tokens: 16,
    n_blocks: 4,
    dtype: KvType::F16,
};

fn slice(rows: std::ops::Range<usize>, first_position: usize, blocks: &[u32]) -> SequenceSlice {
    SequenceSlice { rows, first_position, blocks: blocks.to_vec() }
}

#[test]
fn batches_that_contradict_themselves_are_errors() {
    let mut backend = CpuBackend::new(Some(1), None).unwrap();
    let good = Batch {
        tokens: vec![0; 3],
        sequences: vec![slice(0..2, 0, &[0]), slice(2..3, 0, &[1])],
        logit_rows: vec![2],
        ..Batch::default()
    };
    backend.begin(&good).unwrap();
    for sequences in [
        vec![],
        vec![slice(0..2, 0, &[0])],
        vec![slice(0..4, 0, &[0])],
        vec![slice(0..3, 0, &[0]), slice(3..3, 0, &[1])],
        vec![slice(0..2, 0, &[0]), slice(1..3, 0, &[1])],
        vec![slice(1..3, 0, &[0]), slice(0..1, 0, &[1])],
        vec![slice(0..3, usize::MAX - 1, &[0])],
    ] {
        assert!(backend.begin(&Batch { sequences, ..good.clone() }).is_err());
    }
    assert!(backend.begin(&Batch { logit_rows: vec![3], ..good.clone() }).is_err());
    backend.begin(&Batch::default()).unwrap();
}

/// Stores three tokens with these slices; then attends to them.
fn store_and_attend(sequences: Vec<SequenceSlice>, layer: usize, widths: [usize; 3]) -> Result<()> {
    let mut backend = CpuBackend::new(Some(2), None)?;
    let batch = Batch { tokens: vec![0; 3], sequences, ..Batch::default() };
    let mut kv = backend.kv_cache(SPEC)?;
    let rope =
        backend.rope(&RopeSpec { inv_freq: vec![1.0; 8], max_positions: 64, magnitude: 1.0 })?;
    let [mut q, mut k, v] = widths.map(|width| backend.buffer(3, width).unwrap());
    let mut out = backend.buffer(3, widths[0])?;
    backend.begin(&batch)?;
    backend.rotate_and_store(&mut q, &mut k, &v, None, &rope, &mut kv, layer)?;
    backend.attention(&q, &kv, layer, &mut out)
}

#[test]
fn block_tables_that_lie_are_errors() {
    let widths = [64, 32, 32];
    store_and_attend(vec![slice(0..2, 0, &[3]), slice(2..3, 15, &[1])], 1, widths).unwrap();
    for sequences in [
        // No block for the last position, none at all, one that does not exist.
        vec![slice(0..3, 14, &[0])],
        vec![slice(0..3, 0, &[])],
        vec![slice(0..3, 0, &[4])],
        vec![slice(0..3, 20, &[u32::MAX, 0])],
        // Two writers of one block, and one sequence that has a block twice.
        vec![slice(0..2, 0, &[1]), slice(2..3, 5, &[1])],
        vec![slice(0..3, 14, &[2, 2])],
    ] {
        let error = store_and_attend(sequences.clone(), 0, widths).unwrap_err();
        assert!(error.to_string().contains("block"), "{sequences:?}: {error}");
    }
    // An earlier block may be shared: it is only read.
    store_and_attend(vec![slice(0..2, 16, &[0, 1]), slice(2..3, 16, &[0, 2])], 0, widths).unwrap();
    assert!(store_and_attend(vec![slice(0..3, 0, &[0])], 2, widths).is_err());
}

#[test]
fn widths_that_do_not_fit_the_cache_are_errors() {
    for widths in [[64, 32, 16], [64, 48, 32], [63, 32, 32], [16, 32, 32], [48, 32, 32]] {
        let error = store_and_attend(vec![slice(0..3, 0, &[0])], 0, widths);
        assert!(matches!(error, Err(Error::Shape { .. })), "{widths:?}: {error:?}");
    }
}

#[test]
fn caches_that_cannot_be_are_errors() {
    let mut backend = CpuBackend::new(Some(1), None).unwrap();
    for spec in [
        KvSpec { n_layers: 0, ..SPEC },
        KvSpec { n_kv_heads: 0, ..SPEC },
        KvSpec { n_blocks: 0, ..SPEC },
        KvSpec { head_dim: 0, ..SPEC },
        KvSpec { head_dim: MAX_HEAD_DIM + 1, ..SPEC },
        KvSpec { block_tokens: 0, ..SPEC },
        KvSpec { block_tokens: 24, ..SPEC },
    ] {
        let error = backend.kv_cache(spec).err();
        assert!(matches!(error, Some(Error::Invalid { .. })), "{spec:?}: {error:?}");
    }
    for n_blocks in [1 << 40, usize::MAX] {
        let error = backend.kv_cache(KvSpec { n_blocks, ..SPEC }).err();
        assert!(matches!(error, Some(Error::OutOfMemory { .. })), "{n_blocks}: {error:?}");
    }
}

/// Resident bytes of this process.
#[cfg(target_os = "linux")]
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    4096 * statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn an_untouched_cache_takes_no_memory() {
    let mut backend = CpuBackend::new(Some(1), None).unwrap();
    let before = resident();
    let kv = backend.kv_cache(KvSpec { n_blocks: 1 << 20, ..SPEC }).unwrap();
    assert!(kv.capacity_bytes() >= 4 << 30);
    assert_eq!(backend.memory().kv_cache, kv.capacity_bytes());
    // Other tests of this process may allocate meanwhile, but nothing near the capacity.
    assert!(resident() < before + (1 << 30));
}

#[test]
fn a_token_outside_the_table_is_an_error() {
    struct Zeros;
    impl FloatRows for Zeros {
        fn rows(&self) -> usize {
            4
        }
        fn cols(&self) -> usize {
            8
        }
        fn decode_row(&self, _: usize, out: &mut [f32]) {
            out.fill(0.0);
        }
        fn raw(&self) -> Option<(FloatType, bytes::Bytes)> {
            None
        }
    }
    let mut backend = CpuBackend::new(Some(1), None).unwrap();
    let table = backend.table(Arc::new(Zeros), TableRole::Head).unwrap();
    let mut x = backend.buffer(1, 8).unwrap();
    for (token, fits) in [(3, true), (4, false), (u32::MAX, false)] {
        let sequences = vec![slice(0..1, 0, &[0])];
        backend.begin(&Batch { tokens: vec![token], sequences, ..Batch::default() }).unwrap();
        assert_eq!(backend.embed(&table, &mut x).is_ok(), fits);
    }
    let mut narrow = backend.buffer(1, 7).unwrap();
    assert!(backend.embed(&table, &mut narrow).is_err());
}

#[test]
fn unknown_kernels_and_absurd_threads_are_errors() {
    assert!(CpuBackend::new(None, Some("abacus")).is_err());
    assert!(CpuBackend::new(Some(0), None).is_err());
    assert_eq!(CpuBackend::new(Some(2), Some("scalar")).unwrap().device().threads, 2);
}
