//! The inner loops of the CPU path, one set for each instruction set, chosen once at run time.
//!
//! `scalar` is the specification: plain loops without `unsafe`. Every other set has the same
//! functions with the same results to the last bit, integers and floats alike, and is tested
//! against it by one runner (`tests` below). A [`Kernels`] value is only handed out when the CPU
//! has the features its functions were compiled for, so its methods are safe to call.
//!
//! Knows slices, not models or threads. Adding an instruction set: write a file with the
//! functions of `scalar` that gain from it, list its `Kernels` in `KNOWN`.

#[macro_use]
mod scalar;

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod float;
mod memory;
mod packed;
mod quantized;
#[cfg(test)]
mod tests;
mod wide;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use float::{FloatMatrix, FloatTile};
pub use memory::{BLOCK_ALIGN, WeightMemory};
pub(crate) use memory::{Block, Storage};
pub use packed::{PackedTernary, Packing, STEP_BYTES, STEP_COLS, TILE_ROWS};
pub(crate) use quantized::{BYTE_OFFSET, ByteRow, Grouping, QuantizedTokens, norm_above};
pub use quantized::{Rescale, TokenCodes, WeightScales};
pub use wide::{WideMatrix, WideRows};

use crate::backend::Activation;
use crate::cpu::attend::{self, AttentionKernels};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::weights::NormWeights;

/// The environment variable that forces a set of kernels by name.
pub const KERNEL_VARIABLE: &str = "BITNET_KERNEL";

/// Asks for the line of memory at `address`, which may be anywhere: a hint, harmless if wrong.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    // SAFETY: a prefetch never faults, and every x86-64 CPU has the instruction.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    // SAFETY: a prefetch never faults, and every aarch64 CPU has the instruction.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) address,
            options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Consecutive tiles of a ternary matrix.
#[derive(Debug, Clone, Copy)]
pub struct Tiles<'a> {
    /// Their bytes, [`STEP_BYTES`]` · steps` for each tile.
    pub codes: &'a [u8],
    /// How many weights share a byte.
    pub packing: Packing,
    /// Steps in a tile.
    pub steps: usize,
    /// Steps whose products are summed together; `steps` where the whole row is.
    pub group_steps: usize,
}

impl Tiles<'_> {
    /// Number of tiles.
    pub fn n_tiles(&self) -> usize {
        self.codes.len() / (self.steps * STEP_BYTES)
    }

    /// Sums each row has.
    pub fn n_groups(&self) -> usize {
        self.steps.div_ceil(self.group_steps)
    }
}

/// Columns in a step of [`Kernels::byte_products`].
pub(crate) const BYTE_STEP_COLS: usize = STEP_BYTES / TILE_ROWS;
/// Most columns of [`Kernels::byte_products`]: `255 · 128 · cols < 2³¹`.
pub(crate) const MAX_BYTE_COLS: usize = 65_536;

type ProductsFn = unsafe fn(&Tiles<'_>, &TokenCodes<'_>, &mut [i32]);
type RescaleFn = unsafe fn(&Rescale<'_>, &mut [f32]);
type QuantizeFn = unsafe fn(&[f32], usize, usize, &mut [i8], &mut [f32], &mut [i32]);
type NormFn = unsafe fn(&[f32], &NormWeights, &mut [f32]);
type GateFn = unsafe fn(Activation, &mut [f32], &[f32]);
type PackTileFn = unsafe fn(&[u8], &mut [u8]);
type MacLoopFn = unsafe fn(u64) -> u64;
type WideFn = unsafe fn(&WideRows<'_>, &WideMatrix, &mut [f32], usize);
type RoundRowsFn = unsafe fn(&FloatTile<'_>, &mut Vec<f32>, &mut [u8], &mut [ByteRow]);
type NoiseFn = unsafe fn(&Noise, u32, &mut [f32]);
type FloatFn = unsafe fn(&FloatTile<'_>, &[f32], usize, &mut [f32]);

/// A set of kernels for one instruction set, available on this CPU.
pub struct Kernels {
    name: &'static str,
    supported: fn() -> bool,
    products: ProductsFn,
    rescale: RescaleFn,
    quantize: QuantizeFn,
    norm: NormFn,
    gate: GateFn,
    pack_tile: PackTileFn,
    /// The two functions of [`Packing::Trits`], where unpacking it costs less than it saves.
    trits: Option<(ProductsFn, PackTileFn)>,
    float_products: FloatFn,
    wide_products: WideFn,
    byte_products: ProductsFn,
    round_rows: RoundRowsFn,
    noise: NoiseFn,
    attention: &'static AttentionKernels,
    mac_loop: MacLoopFn,
}

/// Every set compiled for this architecture, fastest first. Private: see [`Kernels::available`].
static KNOWN: &[&Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    &x86_64::AVX512VBMI,
    #[cfg(target_arch = "x86_64")]
    &x86_64::AVX512VNNI,
    #[cfg(target_arch = "x86_64")]
    &x86_64::AVXVNNI,
    #[cfg(target_arch = "x86_64")]
    &x86_64::AVX2,
    #[cfg(target_arch = "aarch64")]
    &aarch64::I8MM,
    #[cfg(target_arch = "aarch64")]
    &aarch64::DOTPROD,
    #[cfg(target_arch = "aarch64")]
    &aarch64::NEON,
    &SCALAR,
];

static SCALAR: Kernels = Kernels {
    name: "scalar",
    supported: || true,
    products: scalar::products,
    rescale: scalar::rescale,
    quantize: scalar::quantize,
    norm: scalar::norm,
    gate: scalar::gate,
    pack_tile: scalar::pack_tile,
    trits: None,
    float_products: scalar::float_products,
    byte_products: scalar::byte_products,
    wide_products: wide::scalar,
    round_rows: scalar::round_rows,
    noise: |noise, first, out| noise.fill(first, out),
    attention: &attend::PORTABLE,
    mac_loop: scalar::mac_loop,
};

impl Kernels {
    /// The sets this CPU can run, fastest first; `scalar` is always the last.
    pub fn available() -> Vec<&'static Self> {
        KNOWN.iter().copied().filter(|kernels| (kernels.supported)()).collect()
    }

    /// The set that [`KERNEL_VARIABLE`] names, or the fastest one.
    ///
    /// # Errors
    /// As [`Kernels::by_name`].
    pub fn detect() -> Result<&'static Self> {
        match std::env::var(KERNEL_VARIABLE) {
            Ok(name) if !name.is_empty() => Self::by_name(&name),
            Ok(_) | Err(std::env::VarError::NotPresent) => Ok(Self::available()[0]),
            Err(e) => Err(Error::invalid(KERNEL_VARIABLE, e.to_string())),
        }
    }

    /// The set with this name.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the names that would do, if there is none or this CPU lacks its
    /// instructions.
    pub fn by_name(name: &str) -> Result<&'static Self> {
        let available = Self::available();
        available.iter().copied().find(|kernels| kernels.name == name).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|kernels| kernels.name).collect();
            let reason = match KNOWN.iter().any(|kernels| kernels.name == name) {
                true => "this CPU lacks the instructions",
                false => "no such kernels on this architecture",
            };
            Error::invalid(
                format!("kernels {name:?}"),
                format!("{reason}; available: {}", names.join(", ")),
            )
        })
    }

    /// The name, as in [`KERNEL_VARIABLE`] and reports.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Sums of `code · activation` for every row of `tiles` and every token:
    /// `sums[((tile · n_tokens + token) · n_groups + group) · 16 + row]`. Exact.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub fn products(&self, tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
        assert!(tiles.steps > 0 && tiles.group_steps > 0);
        assert_eq!(tiles.codes.len() % (tiles.steps * STEP_BYTES), 0);
        assert!(tokens.stride >= tiles.steps * tiles.packing.step_cols());
        assert!(tokens.codes.len() >= tokens.n_tokens * tokens.stride);
        let n_sums = tiles.n_tiles() * tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
        assert_eq!(sums.len(), n_sums);
        if n_sums == 0 {
            return;
        }
        let products = match (tiles.packing, self.trits) {
            (Packing::Codes, _) => self.products,
            (Packing::Trits, Some((products, _))) => products,
            (Packing::Trits, None) => scalar::trit_products,
        };
        // SAFETY: the CPU has the features, as `available` saw to; the lengths are as the kernels
        // of every set assume: checked above.
        unsafe { products(tiles, tokens, sums) }
    }

    /// Turns the sums of [`Kernels::products`] into outputs: `out[(tile · n_tokens + token) · 16 +
    /// row]`, in one order of operations (see [`Rescale`]).
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub fn rescale(&self, job: &Rescale<'_>, out: &mut [f32]) {
        job.check(out.len());
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { (self.rescale)(job, out) }
    }

    /// Quantizes one token to 8 bits, absmax over every `scale_cols` columns:
    /// `out = round_half_even(x · 127 / max(|x|, 1e-5))`, `scales = max(|x|, 1e-5) / 127`, and
    /// `sums` of the results over every `sum_cols` columns. `out` beyond `x` becomes 0. A span
    /// with a NaN or an infinity gets zeros and the scale NaN, so that it cannot pass unseen.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub fn quantize(
        &self,
        x: &[f32],
        scale_cols: usize,
        sum_cols: usize,
        out: &mut [i8],
        scales: &mut [f32],
        sums: &mut [i32],
    ) {
        assert!(scale_cols > 0 && sum_cols > 0 && out.len() >= x.len());
        assert_eq!(scales.len(), x.len().div_ceil(scale_cols));
        assert_eq!(sums.len(), x.len().div_ceil(sum_cols));
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { (self.quantize)(x, scale_cols, sum_cols, out, scales, sums) }
    }

    /// `out = x / sqrt(mean(x²) + eps) · weight` for one token.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn norm(&self, x: &[f32], norm: &NormWeights, out: &mut [f32]) {
        assert!(x.len() == norm.weight.len() && x.len() == out.len());
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { (self.norm)(x, norm, out) }
    }

    /// `gate = activation(gate) · up`, elementwise.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn gate(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { (self.gate)(activation, gate, up) }
    }

    /// The packing these kernels multiply fastest with where a row has a single scale.
    pub fn packing(&self) -> Packing {
        if self.trits.is_some() { Packing::Trits } else { Packing::Codes }
    }

    /// Packs 16 rows of codes, `(16, step_cols · steps)`, one a byte, into a tile of `64 · steps`
    /// bytes.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub fn pack_tile(&self, packing: Packing, codes: &[u8], out: &mut [u8]) {
        let steps = out.len() / STEP_BYTES;
        assert_eq!(out.len(), steps * STEP_BYTES);
        assert_eq!(codes.len(), TILE_ROWS * steps * packing.step_cols());
        let pack = match (packing, self.trits) {
            (Packing::Codes, _) => self.pack_tile,
            (Packing::Trits, Some((_, pack))) => pack,
            (Packing::Trits, None) => scalar::pack_trits,
        };
        // SAFETY: the CPU has the features, as `available` saw to; lengths checked above.
        unsafe { pack(codes, out) }
    }

    /// Dot products of up to 16 float rows with `n_tokens` tokens `(n_tokens, cols)`:
    /// `out[token · 16 + row]`; the rest of `out` is left alone. Lane `i` of 16 sums columns `i`,
    /// `i + 16`, …, each product rounded before it is added, and the lanes fold in a fixed tree.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub fn float_products(
        &self,
        tile: &FloatTile<'_>,
        x: &[f32],
        n_tokens: usize,
        out: &mut [f32],
    ) {
        assert!(tile.cols > 0 && tile.n_rows() <= TILE_ROWS);
        assert_eq!(tile.bytes.len() % (tile.cols * tile.dtype.size()), 0);
        assert_eq!(x.len(), n_tokens * tile.cols);
        assert_eq!(out.len(), n_tokens * TILE_ROWS);
        // SAFETY: the CPU has the features, as `available` saw to; lengths checked above.
        unsafe { (self.float_products)(tile, x, n_tokens, out) }
    }

    /// Products of tiles of unsigned bytes with tokens of 8-bit integers:
    /// `sums[(tile · n_tokens + token) · 16 + row]`. A step of a tile is 64 bytes: four columns of
    /// each of 16 rows. Exact.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub(crate) fn byte_products(
        &self,
        codes: &[u8],
        steps: usize,
        tokens: &TokenCodes<'_>,
        sums: &mut [i32],
    ) {
        let cols = steps * BYTE_STEP_COLS;
        assert!(steps > 0 && codes.len().is_multiple_of(steps * STEP_BYTES));
        assert!(cols <= tokens.stride && cols <= MAX_BYTE_COLS);
        assert!(tokens.codes.len() >= tokens.n_tokens * tokens.stride);
        // The packing says which function is called; the functions do not look at it.
        let tiles = Tiles { codes, packing: Packing::Codes, steps, group_steps: steps };
        assert_eq!(sums.len(), tiles.n_tiles() * tokens.n_tokens * TILE_ROWS);
        if sums.is_empty() {
            return;
        }
        // SAFETY: the CPU has the features, as `available` saw to; lengths checked above.
        unsafe { (self.byte_products)(&tiles, tokens, sums) }
    }

    /// Rounds up to 16 rows of floats to a tile of bytes for [`Kernels::byte_products`], and says of
    /// each how far that is off. `row` is a buffer.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub(crate) fn round_rows(
        &self,
        rows: &FloatTile<'_>,
        row: &mut Vec<f32>,
        out: &mut [u8],
        bounds: &mut [ByteRow],
    ) {
        assert!(rows.cols > 0 && rows.n_rows() <= bounds.len() && bounds.len() <= TILE_ROWS);
        assert_eq!(out.len(), rows.cols.div_ceil(BYTE_STEP_COLS) * STEP_BYTES);
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { (self.round_rows)(rows, row, out, bounds) }
    }

    /// [`Noise::fill`], as fast as this instruction set allows.
    pub(crate) fn noise(&self, noise: &Noise, first: u32, out: &mut [f32]) {
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { (self.noise)(noise, first, out) }
    }

    /// Attention of a few queries over one head of a cache; the result is left in `scratch`.
    pub(crate) fn attend(&self, task: &attend::Task<'_>, scratch: &mut attend::Scratch) {
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { self.attention.attend(task, scratch) }
    }

    /// Joins partial results of `n_spans` consecutive spans to `result`.
    pub(crate) fn join(&self, partials: &[f32], n_spans: usize, result: &mut attend::Partial) {
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { self.attention.join(partials, n_spans, result) }
    }

    /// Multiplies and accumulates in registers for `rounds` rounds, as fast as this instruction
    /// set allows, and returns how many multiply-accumulates a round has.
    pub(crate) fn mac_loop(&self, rounds: u64) -> u64 {
        // SAFETY: the CPU has the features, as `available` saw to.
        unsafe { (self.mac_loop)(rounds) }
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kernels").field(&self.name).finish()
    }
}
