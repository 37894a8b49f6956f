// Products of packed ternary weights with 8-bit activations.
//
// Weights lie in tiles of 16 rows. A tile is a run of steps of 16 columns: 16 words, one for each
// row; bits 2j, 2j + 1 of byte b of a word are the code (trit + 1) of column 4j + b. Four threads
// that read four rows each thus read a step, eight steps to a simdgroup, 512 bytes in a row.
// Activations are bytes, 16 to a step. The sums of code * activation are exact whatever their
// order; (sum - sum of the activations) * scales is the result. Rows and columns are padded with
// code 0 and activation 0.

struct ProductParams {
    uint rows;
    uint steps;
    uint tokens;
    uint code_stride;     // bytes from one token's activations to the next
    uint out_stride;      // floats from one token's outputs to the next
    uint row_scales;      // whether each row has a scale of its own; all rows share `scale` if not
    uint has_bias;
    uint accumulate;      // whether the result is added to what is there
    float scale;
};

// How the 16 rows of a tile become outputs.
struct Epilogue {
    const device float* scales;       // (tiles * 16)
    const device float* bias;         // (tiles * 16)
    const device float* token_scales; // (tokens)
    const device int* code_sums;      // (tokens)
    device float* out;                // (tokens, out_stride)
};

// Stores output `row` of `token`; `sum` is that of code * activation.
static inline void store_output(Epilogue to, constant ProductParams& p, uint token, uint row, int sum) {
    float weight = p.row_scales != 0 ? to.scales[row] : p.scale;
    // The first addition is the CPU's: it makes a negative zero positive.
    float y = (0.0f + float(sum - to.code_sums[token]) * weight) * to.token_scales[token];
    if (p.has_bias != 0) {
        y += to.bias[row];
    }
    device float* out = to.out + ulong(token) * p.out_stride + row;
    *out = p.accumulate != 0 ? *out + y : y;
}

// Sum over four columns of each of four rows, as numbers that a float holds exactly: fields of the
// codes are not shifted down, the activations were scaled down instead.
static inline float4 dot_field(uint4 words, uint field, float4 x) {
    uint4 codes = words & (0x03030303u << (2 * field));
    return float4(dot(float4(as_type<uchar4>(codes.x)), x), dot(float4(as_type<uchar4>(codes.y)), x),
                  dot(float4(as_type<uchar4>(codes.z)), x), dot(float4(as_type<uchar4>(codes.w)), x));
}

// Tokens that read a weight together.
constant constexpr uint DECODE_TOKENS = 4;
// Simdgroups that share the steps of a tile.
constant constexpr uint DECODE_SIMDGROUPS = 4;

// Few tokens: every weight is read once, with vector loads. One threadgroup for a tile and up to
// DECODE_TOKENS tokens.
kernel void bitlinear_inference_optimized(const device uint4* weights [[buffer(0)]],
                                          const device uchar* codes [[buffer(1)]],
                                          const device float* scales [[buffer(2)]],
                                          const device float* bias [[buffer(3)]],
                                          const device float* token_scales [[buffer(4)]],
                                          const device int* code_sums [[buffer(5)]],
                                          device float* out [[buffer(6)]],
                                          constant ProductParams& p [[buffer(7)]],
                                          threadgroup int4* parts [[threadgroup(0)]],
                                          uint3 group [[threadgroup_position_in_grid]],
                                          uint lid [[thread_index_in_threadgroup]],
                                          uint lane [[thread_index_in_simdgroup]],
                                          uint sg [[simdgroup_index_in_threadgroup]]) {
    uint tile = group.x;
    uint first_token = group.y * DECODE_TOKENS;
    uint n_tokens = min(DECODE_TOKENS, p.tokens - first_token);
    uint quad = lane & 3;
    const device uint4* tile_weights = weights + ulong(tile) * p.steps * 4 + quad;
    const device uchar* tokens = codes + ulong(first_token) * p.code_stride;
    float4 sums[DECODE_TOKENS];
    for (uint t = 0; t < DECODE_TOKENS; t++) {
        sums[t] = float4(0.0f);
    }
    // 16 columns times 3 * 128 for each of at most 8192 steps of a thread: below 2^24 for the
    // widest matrix, so that every sum is exact.
    for (uint step = sg * 8 + lane / 4; step < p.steps; step += 8 * DECODE_SIMDGROUPS) {
        uint4 words = tile_weights[ulong(step) * 4];
        for (uint t = 0; t < DECODE_TOKENS; t++) {
            if (t < n_tokens) {
                uint4 x = *(const device uint4*)(tokens + ulong(t) * p.code_stride + ulong(step) * 16);
                sums[t] += dot_field(words, 0, float4(as_type<char4>(x.x)));
                sums[t] += dot_field(words, 1, float4(as_type<char4>(x.y)) * 0.25f);
                sums[t] += dot_field(words, 2, float4(as_type<char4>(x.z)) * 0.0625f);
                sums[t] += dot_field(words, 3, float4(as_type<char4>(x.w)) * 0.015625f);
            }
        }
    }
    for (uint t = 0; t < DECODE_TOKENS; t++) {
        int4 sum = int4(sums[t]);
        sum += simd_shuffle_xor(sum, 4);
        sum += simd_shuffle_xor(sum, 8);
        sum += simd_shuffle_xor(sum, 16);
        if (lane < 4) {
            parts[(sg * DECODE_TOKENS + t) * 4 + quad] = sum;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint token = lid / 16;
    uint row = tile * 16 + lid % 16;
    if (token < n_tokens && row < p.rows) {
        threadgroup const int* part = (threadgroup const int*)parts + lid;
        int sum = 0;
        for (uint s = 0; s < DECODE_SIMDGROUPS; s++) {
            sum += part[s * DECODE_TOKENS * 16];
        }
        store_output(Epilogue{scales, bias, token_scales, code_sums, out}, p, first_token + token, row, sum);
    }
}

// Tokens and rows of a threadgroup of four simdgroups, and columns of a round.
constant constexpr uint TILED_TOKENS = 32;
constant constexpr uint TILED_ROWS = 64;
constant constexpr uint TILED_COLS = 32;
// Halves from one row of a staged block to the next; eight more than needed, against bank conflicts.
constant constexpr uint TILED_STRIDE = 40;

// Many tokens: blocks of codes and activations are brought near as halves, which hold them exactly,
// and multiplied as 8 x 8 matrices with float sums, exact below 2^24: for up to 43,690 columns.
kernel void bitlinear_inference_tiled(const device uint* weights [[buffer(0)]],
                                      const device uchar* codes [[buffer(1)]],
                                      const device float* scales [[buffer(2)]],
                                      const device float* bias [[buffer(3)]],
                                      const device float* token_scales [[buffer(4)]],
                                      const device int* code_sums [[buffer(5)]],
                                      device float* out [[buffer(6)]],
                                      constant ProductParams& p [[buffer(7)]],
                                      threadgroup half* shared [[threadgroup(0)]],
                                      uint3 group [[threadgroup_position_in_grid]],
                                      uint lid [[thread_index_in_threadgroup]],
                                      uint sg [[simdgroup_index_in_threadgroup]]) {
    uint first_row = group.x * TILED_ROWS;
    uint first_token = group.y * TILED_TOKENS;
    threadgroup half* near_tokens = shared;
    threadgroup half* near_rows = shared + TILED_TOKENS * TILED_STRIDE;

    // Each thread brings one word of weights and eight activations of a round.
    uint load_row = lid / 32 * 16 + lid % 16;
    uint load_step = lid % 32 / 16;
    uint load_tile = first_row / 16 + lid / 32;
    bool row_exists = load_tile * 16 < p.rows;
    uint load_token = lid / 4;
    uint load_part = lid % 4;
    bool token_exists = first_token + load_token < p.tokens;

    simdgroup_float8x8 sums[4][2];
    for (uint m = 0; m < 4; m++) {
        for (uint n = 0; n < 2; n++) {
            sums[m][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    for (uint first_step = 0; first_step < p.steps; first_step += TILED_COLS / 16) {
        uint word = 0;
        uint step = first_step + load_step;
        if (row_exists && step < p.steps) {
            word = weights[(ulong(load_tile) * p.steps + step) * 16 + lid % 16];
        }
        threadgroup half* row = near_rows + load_row * TILED_STRIDE + load_step * 16;
        for (uint field = 0; field < 4; field++) {
            uchar4 four = as_type<uchar4>((word >> (2 * field)) & 0x03030303u);
            *(threadgroup half4*)(row + 4 * field) = half4(four);
        }
        uint2 bytes = uint2(0, 0);
        if (token_exists && first_step + load_part / 2 < p.steps) {
            const device uchar* token = codes + ulong(first_token + load_token) * p.code_stride;
            bytes = *(const device uint2*)(token + first_step * 16 + load_part * 8);
        }
        threadgroup half* token = near_tokens + load_token * TILED_STRIDE + load_part * 8;
        *(threadgroup half4*)token = half4(as_type<char4>(bytes.x));
        *(threadgroup half4*)(token + 4) = half4(as_type<char4>(bytes.y));
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint k = 0; k < TILED_COLS; k += 8) {
            simdgroup_half8x8 right[2];
            for (uint n = 0; n < 2; n++) {
                simdgroup_load(right[n], near_rows + (sg * 16 + n * 8) * TILED_STRIDE + k, TILED_STRIDE,
                               ulong2(0, 0), true);
            }
            for (uint m = 0; m < 4; m++) {
                simdgroup_half8x8 left;
                simdgroup_load(left, near_tokens + m * 8 * TILED_STRIDE + k, TILED_STRIDE);
                for (uint n = 0; n < 2; n++) {
                    simdgroup_multiply_accumulate(sums[m][n], left, right[n], sums[m][n]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    // The sums take the place of the blocks.
    threadgroup float* results = (threadgroup float*)shared;
    for (uint m = 0; m < 4; m++) {
        for (uint n = 0; n < 2; n++) {
            simdgroup_store(sums[m][n], results + m * 8 * TILED_ROWS + sg * 16 + n * 8, TILED_ROWS);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Epilogue to = Epilogue{scales, bias, token_scales, code_sums, out};
    for (uint i = lid; i < TILED_TOKENS * TILED_ROWS; i += 128) {
        uint out_token = first_token + i / TILED_ROWS;
        uint out_row = first_row + i % TILED_ROWS;
        if (out_token < p.tokens && out_row < p.rows) {
            store_output(to, p, out_token, out_row, int(results[i]));
        }
    }
}

struct QuantizedParams {
    uint rows;
    uint steps;
    uint tiles;
    uint code_stride;
    uint out_stride;
    uint scale_kind;      // 0: `scale` for all, 1: one for each row, 2: one for each weight group
    uint n_groups;        // groups of columns that are summed as integers
    uint group_steps;     // steps of a group
    uint n_weight_groups;
    uint sum_groups;      // groups in a weight group
    uint scale_per_group; // whether each group of a token has a scale
    uint has_bias;
    uint accumulate;
    float scale;
};

// Four columns of one row.
static inline int dot_bytes(uint codes, uint x) {
    uchar4 c = as_type<uchar4>(codes);
    char4 v = as_type<char4>(x);
    return int(c.x) * int(v.x) + int(c.y) * int(v.y) + int(c.z) * int(v.z) + int(c.w) * int(v.w);
}

// 16 columns of one row.
static inline int dot_word(uint word, uint4 x) {
    return dot_bytes(word & 0x03030303u, x.x) + dot_bytes((word >> 2) & 0x03030303u, x.y) +
           dot_bytes((word >> 4) & 0x03030303u, x.z) + dot_bytes((word >> 6) & 0x03030303u, x.w);
}

// Any grouping of columns: integer sums for each group, which then join in the order of the groups.
// One simdgroup for a tile and a token.
kernel void bitlinear_inference_quantized(const device uint4* weights [[buffer(0)]],
                                          const device uchar* codes [[buffer(1)]],
                                          const device float4* scales [[buffer(2)]],
                                          const device float* bias [[buffer(3)]],
                                          const device float* token_scales [[buffer(4)]],
                                          const device int* code_sums [[buffer(5)]],
                                          device float* out [[buffer(6)]],
                                          constant QuantizedParams& p [[buffer(7)]],
                                          uint3 group [[threadgroup_position_in_grid]],
                                          uint3 size [[threads_per_threadgroup]],
                                          uint lane [[thread_index_in_simdgroup]],
                                          uint sg [[simdgroup_index_in_threadgroup]]) {
    uint tile = group.x * (size.x / SIMD) + sg;
    uint token = group.y;
    if (tile >= p.tiles) {
        return;
    }
    uint quad = lane & 3;
    const device uint4* tile_weights = weights + ulong(tile) * p.steps * 4 + quad;
    const device uint4* x = (const device uint4*)(codes + ulong(token) * p.code_stride);
    float4 y = float4(0.0f);
    for (uint g = 0; g < p.n_groups; g++) {
        uint end = min(p.steps, (g + 1) * p.group_steps);
        int4 sum = int4(0);
        for (uint step = g * p.group_steps + lane / 4; step < end; step += 8) {
            uint4 words = tile_weights[ulong(step) * 4];
            uint4 four = x[step];
            sum += int4(dot_word(words.x, four), dot_word(words.y, four), dot_word(words.z, four),
                        dot_word(words.w, four));
        }
        sum += simd_shuffle_xor(sum, 4);
        sum += simd_shuffle_xor(sum, 8);
        sum += simd_shuffle_xor(sum, 16);
        float4 weight = float4(p.scale);
        if (p.scale_kind == 1) {
            weight = scales[tile * 4 + quad];
        } else if (p.scale_kind == 2) {
            weight = scales[(ulong(tile) * p.n_weight_groups + g / p.sum_groups) * 4 + quad];
        }
        float4 term = float4(sum - code_sums[token * p.n_groups + g]) * weight;
        if (p.scale_per_group != 0) {
            term = term * token_scales[token * p.n_groups + g];
        }
        y = y + term;
    }
    if (p.scale_per_group == 0) {
        y = y * token_scales[token];
    }
    if (lane < 4) {
        for (uint r = 0; r < 4; r++) {
            uint row = tile * 16 + quad * 4 + r;
            if (row < p.rows) {
                float value = p.has_bias != 0 ? y[r] + bias[row] : y[r];
                device float* to = out + ulong(token) * p.out_stride + row;
                *to = p.accumulate != 0 ? *to + value : value;
            }
        }
    }
}
