//! Kernels of x86-64: AVX2, AVX2 with VNNI, AVX-512 with VNNI, and that with VBMI.

mod avx2;
mod avx512;
mod avx512vbmi;
mod avx512vnni;
mod avxvnni;
mod bytes;
mod wide;

pub(super) use avx2::AVX2;
pub(super) use avx512vbmi::AVX512VBMI;
pub(super) use avx512vnni::AVX512VNNI;
pub(super) use avxvnni::AVXVNNI;
