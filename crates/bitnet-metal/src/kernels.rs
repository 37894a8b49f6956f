//! The kernels: their text, their names, and how many threads run them. Knows no device.

/// The text of the kernels by file name, in the order in which it is one text.
pub const SOURCES: [(&str, &str); 5] = [
    ("common.metal", include_str!("../kernels/common.metal")),
    ("norm.metal", include_str!("../kernels/norm.metal")),
    ("bitlinear.metal", include_str!("../kernels/bitlinear.metal")),
    ("rows.metal", include_str!("../kernels/rows.metal")),
    ("attention.metal", include_str!("../kernels/attention.metal")),
];

/// The text a Metal compiler is given.
pub fn source() -> String {
    SOURCES.map(|(_, text)| text).join("\n")
}

/// A kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Root-mean-square norm of rows.
    RmsLayerNorm,
    /// Norm and quantization to 8 bits of rows.
    QuantizeActivations,
    /// Ternary product for few tokens.
    BitlinearOptimized,
    /// Ternary product for many tokens.
    BitlinearTiled,
    /// Ternary product with scales for groups of columns.
    BitlinearQuantized,
    /// Rows of a table.
    EmbedTokens,
    /// Product with a float matrix.
    FloatProduct,
    /// Activation function of a gate, times the other half.
    GateActivation,
    /// Norms and rotation of heads; keys and values to the cache.
    RotateAndStore,
    /// Attention over the cache.
    PagedAttention,
    /// Joins the spans of `PagedAttention`.
    JoinAttention,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::RmsLayerNorm,
        Self::QuantizeActivations,
        Self::BitlinearOptimized,
        Self::BitlinearTiled,
        Self::BitlinearQuantized,
        Self::EmbedTokens,
        Self::FloatProduct,
        Self::GateActivation,
        Self::RotateAndStore,
        Self::PagedAttention,
        Self::JoinAttention,
    ];

    /// Its name in the text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RmsLayerNorm => "rms_layer_norm",
            Self::QuantizeActivations => "quantize_activations",
            Self::BitlinearOptimized => "bitlinear_inference_optimized",
            Self::BitlinearTiled => "bitlinear_inference_tiled",
            Self::BitlinearQuantized => "bitlinear_inference_quantized",
            Self::EmbedTokens => "embed_tokens",
            Self::FloatProduct => "float_product",
            Self::GateActivation => "gate_activation",
            Self::RotateAndStore => "rotate_and_store",
            Self::PagedAttention => "paged_attention",
            Self::JoinAttention => "join_attention",
        }
    }

    /// Threads of a threadgroup. Kernels rely on it where they share work by simdgroups.
    pub const fn threads(self) -> u32 {
        match self {
            Self::RmsLayerNorm | Self::QuantizeActivations => 256,
            Self::GateActivation => 256,
            Self::RotateAndStore => SIMD,
            _ => 128,
        }
    }
}

/// Threads of a simdgroup.
pub(crate) const SIMD: u32 = 32;
/// Simdgroups of a threadgroup where each has a tile of its own.
pub(crate) const TILES_TOGETHER: u32 = 4;
/// Tokens that read a weight together in `BitlinearOptimized` and `FloatProduct`.
pub(crate) const DECODE_TOKENS: u32 = 4;
/// Tokens and rows of a threadgroup of `BitlinearTiled`, and halves of a staged row.
pub(crate) const TILED_TOKENS: u32 = 32;
pub(crate) const TILED_ROWS: u32 = 64;
/// Widest matrix of `BitlinearTiled`: its float sums of code times activation stay below 2²⁴.
pub(crate) const TILED_MAX_COLS: usize = (1 << 24) / (3 * 128);
/// Floats of a row that norms bring near together.
pub(crate) const STAGE: u32 = 2048;
/// Positions of a span of attention, and queries of a threadgroup.
pub(crate) const SPAN: usize = 256;
pub(crate) const QUERIES: u32 = 4;
/// Threadgroup memory of every Apple GPU.
pub(crate) const MAX_SHARED_BYTES: u32 = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// What the text says a constant is.
    fn constant(name: &str) -> u32 {
        let text = source();
        let start = format!("constant constexpr uint {name} = ");
        let at = text.find(&start).expect("the constant is in the text") + start.len();
        let value: String = text[at..].chars().take_while(char::is_ascii_digit).collect();
        value.parse().expect("a number")
    }

    #[test]
    fn the_text_and_the_host_agree_on_constants() {
        for (name, value) in [
            ("SIMD", SIMD),
            ("DECODE_TOKENS", DECODE_TOKENS),
            ("DECODE_SIMDGROUPS", Kernel::BitlinearOptimized.threads() / SIMD),
            ("FLOAT_TOKENS", DECODE_TOKENS),
            ("TILED_TOKENS", TILED_TOKENS),
            ("TILED_ROWS", TILED_ROWS),
            ("STAGE", STAGE),
            ("SPAN", SPAN as u32),
            ("QUERIES", QUERIES),
        ] {
            assert_eq!(constant(name), value, "{name}");
        }
        assert_eq!(Kernel::PagedAttention.threads(), QUERIES * SIMD);
        assert_eq!(Kernel::BitlinearQuantized.threads(), TILES_TOGETHER * SIMD);
    }

    #[test]
    fn every_kernel_is_in_the_text_once() {
        let text = source();
        for kernel in Kernel::ALL {
            assert_eq!(text.matches(&format!("kernel void {}(", kernel.name())).count(), 1);
        }
        assert_eq!(text.matches("kernel void ").count(), Kernel::ALL.len());
    }
}
