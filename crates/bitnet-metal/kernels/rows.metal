// Embeddings, float projections, heads, and the gate of a feed-forward block.
//
// A float matrix lies in tiles of 8 rows and steps of 16 columns: 8 x 16 numbers side by side. Four
// threads read the 16 columns of a row, so a simdgroup reads a step of a tile in one run. Rows of
// activations are multiples of 16 floats apart, and what pads a row is 0.

struct TableParams {
    uint steps;
    uint format;
    uint width;
    uint out_stride;
};

// out[i] = table[tokens[i]]
kernel void embed_tokens(const device uchar* table [[buffer(0)]],
                         const device uint* tokens [[buffer(1)]],
                         device float* out [[buffer(2)]],
                         constant TableParams& p [[buffer(3)]],
                         uint3 group [[threadgroup_position_in_grid]],
                         uint3 size [[threads_per_threadgroup]],
                         uint lid [[thread_index_in_threadgroup]]) {
    uint row = group.x;
    uint token = tokens[row];
    for (uint i = lid; i < p.width; i += size.x) {
        ulong at = ((ulong(token / 8) * p.steps + i / 16) * 8 + token % 8) * 16 + i % 16;
        out[ulong(row) * p.out_stride + i] = load1(table, p.format, at);
    }
}

struct FloatParams {
    uint rows;
    uint tiles;
    uint steps;
    uint tokens;
    uint format;
    uint x_stride;
    uint out_stride;
    uint has_bias;
    uint accumulate;
};

// Tokens that read a weight together.
constant constexpr uint FLOAT_TOKENS = 4;

// y = W x + b. One simdgroup for a tile of 8 rows and up to FLOAT_TOKENS tokens.
kernel void float_product(const device uchar* weights [[buffer(0)]],
                          const device float* x [[buffer(1)]],
                          const device float* bias [[buffer(2)]],
                          device float* out [[buffer(3)]],
                          constant FloatParams& p [[buffer(4)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint3 size [[threads_per_threadgroup]],
                          uint lane [[thread_index_in_simdgroup]],
                          uint sg [[simdgroup_index_in_threadgroup]]) {
    uint tile = group.x * (size.x / SIMD) + sg;
    if (tile >= p.tiles) {
        return;
    }
    uint first_token = group.y * FLOAT_TOKENS;
    uint n_tokens = min(FLOAT_TOKENS, p.tokens - first_token);
    uint part = lane & 3;
    // Lanes 4 part ... 4 part + 3 of the sums of one row, for each token.
    float4 sums[FLOAT_TOKENS];
    for (uint t = 0; t < FLOAT_TOKENS; t++) {
        sums[t] = float4(0.0f);
    }
    for (uint step = 0; step < p.steps; step++) {
        float4 w = load4(weights, p.format, (ulong(tile) * p.steps + step) * 128 + lane * 4);
        for (uint t = 0; t < FLOAT_TOKENS; t++) {
            if (t < n_tokens) {
                const device float* token = x + ulong(first_token + t) * p.x_stride;
                float4 product = w * *(const device float4*)(token + step * 16 + part * 4);
                sums[t] = sums[t] + product;
            }
        }
    }
    for (uint t = 0; t < FLOAT_TOKENS; t++) {
        float4 sum = sums[t];
        // Lanes i and i + 8 are two threads apart, i and i + 4 one.
        sum = sum + simd_shuffle_down(sum, 2);
        sum = sum + simd_shuffle_down(sum, 1);
        float y = (sum.x + sum.z) + (sum.y + sum.w);
        uint row = tile * 8 + lane / 4;
        if (part == 0 && t < n_tokens && row < p.rows) {
            if (p.has_bias != 0) {
                y += bias[row];
            }
            device float* to = out + ulong(first_token + t) * p.out_stride + row;
            *to = p.accumulate != 0 ? *to + y : y;
        }
    }
}

struct GateParams {
    uint width;
    uint stride;
    uint silu; // x / (1 + e^-x) if not 0, max(x, 0)^2 otherwise
};

// out = activation(out) * up
kernel void gate_activation(device float* out [[buffer(0)]],
                            const device float* up [[buffer(1)]],
                            constant GateParams& p [[buffer(2)]],
                            uint3 group [[threadgroup_position_in_grid]],
                            uint3 size [[threads_per_threadgroup]],
                            uint lid [[thread_index_in_threadgroup]]) {
    uint i = group.x * size.x + lid;
    if (i >= p.width) {
        return;
    }
    ulong at = ulong(group.y) * p.stride + i;
    float x = out[at];
    float positive = x > 0.0f ? x : 0.0f;
    float activated = p.silu != 0 ? x / (1.0f + exact_exp(-x)) : positive * positive;
    out[at] = activated * up[at];
}
