//! The conformance suite on the simulated device, and its results against the CPU's, bit for bit.

use super::simulator::{Floats, Library, backend, over, sources};
use bitnet_core::cpu::CpuBackend;
use bitnet_core::testing::conformance;
use std::sync::Arc;

/// Threads in ascending order, descending, and shuffled: whatever the order between barriers, the
/// results are those of the CPU's scalar code to the last bit.
#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn all_operations_have_the_bits_of_scalar_code() {
    let scalar = conformance(|| CpuBackend::new(Some(1), Some("scalar")).expect("the CPU"));
    for seed in [0, 1, 2] {
        let got = conformance(|| backend(seed));
        assert_eq!(got.len(), scalar.len());
        let equal = |(a, b): &(&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        let different = got.iter().zip(&scalar).filter(|pair| !equal(pair)).count();
        assert_eq!(different, 0, "of {} results, schedule {seed}", got.len());
    }
}

/// A compiler that fuses products and sums against the text's wish changes bits, but everything stays
/// within the suite's tolerances.
#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn fused_arithmetic_conforms_too() {
    let library =
        Arc::new(Library::compile(&sources(), Floats::Fused).expect("the kernels compile"));
    conformance(|| over(library.clone(), 0));
}
