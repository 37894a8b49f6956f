//! Kernels of x86-64: AVX2, AVX2 with VNNI, and AVX-512 with VNNI.

mod avx2;
mod avx512vnni;
mod avxvnni;
mod bytes;

pub(super) use avx2::AVX2;
pub(super) use avx512vnni::AVX512VNNI;
pub(super) use avxvnni::AVXVNNI;
