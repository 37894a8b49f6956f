//! Kernels of aarch64: NEON as every such CPU has it, with `sdot`, and with `smmla`.

mod bytes;
mod dotprod;
mod i8mm;
mod neon;

pub(super) use dotprod::DOTPROD;
pub(super) use i8mm::I8MM;
pub(super) use neon::NEON;
