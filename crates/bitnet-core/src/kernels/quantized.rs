//! What stands on the two sides of an integer product: quantized activations going in, and the
//! description of how sums become floats coming out. Holds no loops; the kernels do.

use super::{Kernels, Packing, TILE_ROWS};

/// Activations of some tokens, quantized to 8 bits: what the products read.
#[derive(Debug, Clone, Copy)]
pub struct TokenCodes<'a> {
    /// `(n_tokens, stride)`; 0 in the columns that pad the last step.
    pub codes: &'a [i8],
    /// Bytes from one token to the next.
    pub stride: usize,
    /// Number of tokens.
    pub n_tokens: usize,
}

impl<'a> TokenCodes<'a> {
    /// The activations of a token at a step, four for each of the `FIELDS` fields of the codes.
    ///
    /// # Safety
    /// `token` must be below `n_tokens`, and `(step + 1) · 4 · FIELDS` at most `stride`, in a value
    /// that [`Kernels::products`] has checked.
    #[inline(always)]
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(dead_code))]
    pub(super) unsafe fn columns<const FIELDS: usize>(
        &self,
        token: usize,
        step: usize,
    ) -> &'a [[i8; 4]; FIELDS] {
        let at = token * self.stride + step * 4 * FIELDS;
        debug_assert!(at + 4 * FIELDS <= self.codes.len());
        // SAFETY: in bounds by the caller's promise; bytes need no alignment.
        unsafe { &*self.codes.as_ptr().add(at).cast() }
    }
}

/// What a byte of [`Kernels::byte_products`] is offset by: it holds `128 + round(w / scale)`.
pub(crate) const BYTE_OFFSET: i32 = 128;

/// How a row of floats was rounded to bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct ByteRow {
    /// What one unit of a code is worth.
    pub(crate) scale: f32,
    /// At least the Euclidean norm of the rounded row.
    pub(crate) norm: f32,
    /// At least the Euclidean norm of its difference to the exact row.
    pub(crate) error: f32,
}

/// Makes a sum of squares in f64 an upper bound of the norm in f32.
#[inline(always)]
pub(crate) fn norm_above(squares: f64) -> f32 {
    (squares.sqrt() * (1.0 + 1e-6)) as f32
}

/// A reusable buffer of quantized tokens with their scales and sums.
#[derive(Debug, Default)]
pub(crate) struct QuantizedTokens {
    pub(crate) codes: Vec<i8>,
    pub(crate) stride: usize,
    /// `(n_tokens, n_scales)`
    pub(crate) scales: Vec<f32>,
    pub(crate) n_scales: usize,
    /// `(n_tokens, n_groups)`
    pub(crate) sums: Vec<i32>,
    pub(crate) n_groups: usize,
}

/// Which columns of a token share what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grouping {
    pub(crate) cols: usize,
    /// Columns that share an activation scale.
    pub(crate) scale_cols: usize,
    /// Columns whose products are summed as integers.
    pub(crate) sum_cols: usize,
}

impl QuantizedTokens {
    /// Makes room for `n_tokens` tokens; what was there is gone.
    pub(crate) fn resize(&mut self, n_tokens: usize, grouping: Grouping) {
        // Whole steps, whatever the packing of the weights.
        let steps =
            [Packing::Codes, Packing::Trits].map(|p| grouping.cols.next_multiple_of(p.step_cols()));
        self.stride = steps[0].max(steps[1]);
        // Tokens a multiple of 4 KiB apart would compete for the same few lines of the L1 cache.
        if self.stride.is_multiple_of(1024) {
            self.stride += 64;
        }
        self.n_scales = grouping.cols.div_ceil(grouping.scale_cols);
        self.n_groups = grouping.cols.div_ceil(grouping.sum_cols);
        self.codes.resize(n_tokens * self.stride, 0);
        self.scales.resize(n_tokens * self.n_scales, 0.0);
        self.sums.resize(n_tokens * self.n_groups, 0);
    }

    /// Quantizes the only token.
    pub(crate) fn set_single(&mut self, x: &[f32], grouping: Grouping, kernels: &Kernels) {
        self.resize(1, grouping);
        let (scale_cols, sum_cols) = (grouping.scale_cols, grouping.sum_cols);
        let Self { codes, scales, sums, .. } = self;
        kernels.quantize(x, scale_cols, sum_cols, codes, scales, sums);
    }

    /// Bytes held.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (self.codes.capacity() + 4 * self.scales.capacity() + 4 * self.sums.capacity()) as u64
    }
}

/// Weight scales in the order of tiles, so that 16 rows are one load.
#[derive(Debug, Clone, Copy)]
pub enum WeightScales<'a> {
    /// One for all rows.
    Tensor(f32),
    /// `(n_tiles, 16)`
    Row(&'a [f32]),
    /// `(n_tiles, n_weight_groups, 16)`; a weight group covers `sum_groups` groups of sums.
    Group {
        /// The scales.
        values: &'a [f32],
        /// Weight groups of a row.
        n_weight_groups: usize,
        /// Groups of sums in a weight group.
        sum_groups: usize,
    },
}

/// How integer sums become outputs.
///
/// With `d = sums − code_sums` (codes are trits + 1), `w` the weight scale and `a` the activation
/// scale: `y = (0 + d₀·w₀ + d₁·w₁ + …) · a` where a token has one scale, and
/// `y = 0 + (d₀·w₀)·a₀ + (d₁·w₁)·a₁ + …` where each group of sums has its own; groups ascend, every
/// operation rounds.
#[derive(Debug, Clone, Copy)]
pub struct Rescale<'a> {
    /// From [`Kernels::products`].
    pub sums: &'a [i32],
    /// Number of tokens.
    pub n_tokens: usize,
    /// Sums of each row and token.
    pub n_groups: usize,
    /// Sums of the activation codes, `(n_tokens, n_groups)`.
    pub code_sums: &'a [i32],
    /// Scales of the activations, `(n_tokens)` or `(n_tokens, n_groups)`.
    pub token_scales: &'a [f32],
    /// Whether `token_scales` has one for each group.
    pub scale_per_group: bool,
    /// Scales of the weights, beginning with the first tile of `sums`.
    pub weights: WeightScales<'a>,
}

impl Rescale<'_> {
    pub(super) fn check(&self, out_len: usize) {
        let n_tiles = out_len / (self.n_tokens * TILE_ROWS);
        assert_eq!(out_len, n_tiles * self.n_tokens * TILE_ROWS);
        assert_eq!(self.sums.len(), out_len * self.n_groups);
        assert_eq!(self.code_sums.len(), self.n_tokens * self.n_groups);
        let scales = if self.scale_per_group { self.n_groups } else { 1 };
        assert_eq!(self.token_scales.len(), self.n_tokens * scales);
        match self.weights {
            WeightScales::Tensor(_) => {}
            WeightScales::Row(values) => assert!(values.len() >= n_tiles * TILE_ROWS),
            WeightScales::Group { values, n_weight_groups, sum_groups } => {
                assert!(sum_groups > 0 && n_weight_groups * sum_groups >= self.n_groups);
                assert!(values.len() >= n_tiles * n_weight_groups * TILE_ROWS);
            }
        }
    }
}
