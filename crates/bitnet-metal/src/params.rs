//! The constants kernels are given, field by field as the kernels' structures have them.

/// Declares a structure of 4-byte fields, in the order of the kernel's.
macro_rules! params {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type,)*
        }
    };
}

params!(
    /// Of `rms_layer_norm`.
    NormParams {
        width: u32,
        x_stride: u32,
        out_stride: u32,
        mapped: u32,
        eps: f32,
    }
);

params!(
    /// Of `quantize_activations`.
    QuantizeParams {
        width: u32,
        x_stride: u32,
        code_stride: u32,
        scale_cols: u32,
        sum_cols: u32,
        n_scales: u32,
        n_sums: u32,
        has_norm: u32,
        eps: f32,
    }
);

params!(
    /// Of `bitlinear_inference_optimized` and `bitlinear_inference_tiled`.
    ProductParams {
        rows: u32,
        steps: u32,
        tokens: u32,
        code_stride: u32,
        out_stride: u32,
        row_scales: u32,
        has_bias: u32,
        accumulate: u32,
        scale: f32,
    }
);

params!(
    /// Of `bitlinear_inference_quantized`.
    QuantizedParams {
        rows: u32,
        steps: u32,
        tiles: u32,
        code_stride: u32,
        out_stride: u32,
        scale_kind: u32,
        n_groups: u32,
        group_steps: u32,
        n_weight_groups: u32,
        sum_groups: u32,
        scale_per_group: u32,
        has_bias: u32,
        accumulate: u32,
        scale: f32,
    }
);

params!(
    /// Of `embed_tokens`.
    TableParams {
        steps: u32,
        format: u32,
        width: u32,
        out_stride: u32,
    }
);

params!(
    /// Of `float_product`.
    FloatParams {
        rows: u32,
        tiles: u32,
        steps: u32,
        tokens: u32,
        format: u32,
        x_stride: u32,
        out_stride: u32,
        has_bias: u32,
        accumulate: u32,
    }
);

params!(
    /// Of `gate_activation`.
    GateParams {
        width: u32,
        stride: u32,
        silu: u32,
    }
);

params!(
    /// The shape of a cache, a part of what its kernels are given.
    CacheParams {
        n_layers: u32,
        n_kv_heads: u32,
        head_dim: u32,
        block_tokens: u32,
        format: u32,
        layer: u32,
        part_bytes: u32,
    }
);

params!(
    /// Of `rotate_and_store`.
    RotateParams {
        cache: CacheParams,
        n_heads: u32,
        q_stride: u32,
        k_stride: u32,
        v_stride: u32,
        has_norms: u32,
        q_eps: f32,
        k_eps: f32,
    }
);

params!(
    /// Of `paged_attention` and `join_attention`.
    AttentionParams {
        cache: CacheParams,
        group: u32,
        q_stride: u32,
        out_stride: u32,
        first_row: u32,
        n_spans: u32,
        query_scale: f32,
    }
);
