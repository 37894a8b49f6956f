//! The conformance suite on a Mac's own GPU. `tests/on_cpu` runs the same host code elsewhere.
//!
//! Without a Metal device that can run the kernels (virtual machines often have a lesser one) the
//! tests say so and pass; with BITNET_REQUIRE_METAL=1 that is a failure.
#![cfg(target_os = "macos")]

use bitnet_core::backend::Backend;
use bitnet_core::cpu::CpuBackend;
use bitnet_core::testing::conformance;
use bitnet_metal::{AppleDriver, MetalBackend};

/// Makes a backend, or tells why not.
fn device() -> Option<MetalBackend<AppleDriver>> {
    match bitnet_metal::open() {
        Ok(backend) => Some(backend),
        Err(error) if std::env::var_os("BITNET_REQUIRE_METAL").is_none() => {
            eprintln!("SKIPPED: no Metal device runs the kernels: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_device_conforms() {
    let Some(first) = device() else { return };
    println!("device: {}", first.device().hardware);
    drop(first);
    let got = conformance(|| bitnet_metal::open().expect("the device was there before"));
    let scalar = conformance(|| CpuBackend::new(Some(1), Some("scalar")).expect("the CPU"));
    // The kernels ask for the arithmetic that gives the CPU's bits; whether Apple's compilers grant it
    // is measured here, not assumed.
    let different = got.iter().zip(&scalar).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    println!("{different} of {} results differ from the CPU's in their bits", got.len());
}
