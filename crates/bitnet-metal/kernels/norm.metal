// The input side of a projection: root-mean-square norms and quantization to 8 bits.
//
// One threadgroup for each row. Knows nothing of weights.

struct NormParams {
    uint width;
    uint x_stride;   // floats from one row of x to the next
    uint out_stride;
    uint mapped;     // whether row i of the output is row rows[i] of x
    float eps;
};

// Floats of a row that are brought near together: a multiple of LANES.
constant constexpr uint STAGE = 2048;

// 1 / sqrt(mean(x^2) + eps). `shared` holds STAGE + 1 floats; all threads of the group must call it.
static inline float inverse_rms(const device float* x, uint width, float eps, threadgroup float* shared,
                                uint lid, uint threads, uint lane, uint sg) {
    float sum = 0.0f;
    for (uint first = 0; first < width; first += STAGE) {
        uint count = min(STAGE, width - first);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = lid; i < count; i += threads) {
            shared[i] = x[first + i];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (sg == 0 && lane < LANES) {
            for (uint i = lane; i < count; i += LANES) {
                float value = shared[i];
                sum += value * value;
            }
        }
    }
    if (sg == 0) {
        sum = fold_lanes(sum);
        if (lane == 0) {
            shared[STAGE] = 1.0f / precise::sqrt(sum / float(width) + eps);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return shared[STAGE];
}

// out[i] = x[i] * inverse_rms(x) * weight[i]
kernel void rms_layer_norm(const device float* x [[buffer(0)]],
                           const device float* weight [[buffer(1)]],
                           device float* out [[buffer(2)]],
                           const device uint* rows [[buffer(3)]],
                           constant NormParams& p [[buffer(4)]],
                           threadgroup float* shared [[threadgroup(0)]],
                           uint3 group [[threadgroup_position_in_grid]],
                           uint lid [[thread_index_in_threadgroup]],
                           uint3 size [[threads_per_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]],
                           uint sg [[simdgroup_index_in_threadgroup]]) {
    uint row = group.x;
    uint from = p.mapped != 0 ? rows[row] : row;
    const device float* in = x + ulong(from) * p.x_stride;
    float factor = inverse_rms(in, p.width, p.eps, shared, lid, size.x, lane, sg);
    device float* to = out + ulong(row) * p.out_stride;
    for (uint i = lid; i < p.width; i += size.x) {
        to[i] = in[i] * factor * weight[i];
    }
}

struct QuantizeParams {
    uint width;
    uint x_stride;
    uint code_stride; // bytes from one row of codes to the next: a multiple of 16, at least width
    uint scale_cols;  // columns that share a scale
    uint sum_cols;    // columns whose codes are summed
    uint n_scales;
    uint n_sums;
    uint has_norm;
    float eps;
};

static inline float normed(const device float* x, const device float* weight, uint i, float factor, bool has_norm) {
    return has_norm ? x[i] * factor * weight[i] : x[i];
}

// The largest magnitude as bits, which order like the numbers, NaN above infinity.
static inline uint magnitude(float x) {
    return as_type<uint>(x) & 0x7fffffffu;
}

// What a number is multiplied with before it is rounded: 0 where the largest is no number.
static inline float code_factor(uint largest) {
    float most = max(as_type<float>(largest), 1e-5f);
    return largest < 0x7f800000u ? 127.0f / most : 0.0f;
}

// What one unit of a code is worth: NaN where the largest is no number.
static inline float code_scale(uint largest) {
    float most = max(as_type<float>(largest), 1e-5f);
    return largest < 0x7f800000u ? most / 127.0f : as_type<float>(0x7fc00000u);
}

static inline int code_of(float x, float factor) {
    return factor == 0.0f ? 0 : round_even(x * factor);
}

// codes = round(norm(x) * 127 / max |norm(x)|), for each group of columns that shares a scale, and
// the sums of the codes. Columns behind the last have code 0.
kernel void quantize_activations(const device float* x [[buffer(0)]],
                                 const device float* weight [[buffer(1)]],
                                 device uint* codes [[buffer(2)]],
                                 device float* scales [[buffer(3)]],
                                 device int* sums [[buffer(4)]],
                                 constant QuantizeParams& p [[buffer(5)]],
                                 threadgroup float* shared [[threadgroup(0)]],
                                 uint3 group [[threadgroup_position_in_grid]],
                                 uint lid [[thread_index_in_threadgroup]],
                                 uint3 size [[threads_per_threadgroup]],
                                 uint lane [[thread_index_in_simdgroup]],
                                 uint sg [[simdgroup_index_in_threadgroup]]) {
    uint row = group.x;
    uint n_simdgroups = size.x / SIMD;
    const device float* in = x + ulong(row) * p.x_stride;
    bool has_norm = p.has_norm != 0;
    float norm_factor = 1.0f;
    if (has_norm) {
        norm_factor = inverse_rms(in, p.width, p.eps, shared, lid, size.x, lane, sg);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    threadgroup uint* parts = (threadgroup uint*)shared;
    threadgroup float* factors = shared + SIMD;

    // Largest magnitudes, one for each scale.
    if (p.n_scales == 1) {
        uint largest = 0;
        for (uint i = lid; i < p.width; i += size.x) {
            largest = max(largest, magnitude(normed(in, weight, i, norm_factor, has_norm)));
        }
        largest = simd_max(largest);
        if (lane == 0) {
            parts[sg] = largest;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        largest = simd_max(lane < n_simdgroups ? parts[lane] : 0u);
        if (lid == 0) {
            factors[0] = code_factor(largest);
            scales[row] = code_scale(largest);
        }
    } else {
        for (uint g = sg; g < p.n_scales; g += n_simdgroups) {
            uint end = min(p.width, (g + 1) * p.scale_cols);
            uint largest = 0;
            for (uint i = g * p.scale_cols + lane; i < end; i += SIMD) {
                largest = max(largest, magnitude(normed(in, weight, i, norm_factor, has_norm)));
            }
            largest = simd_max(largest);
            if (lane == 0) {
                factors[g] = code_factor(largest);
                scales[row * p.n_scales + g] = code_scale(largest);
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Codes, four in a word; a group of columns is a multiple of 16, so a word has one scale.
    device uint* row_codes = codes + ulong(row) * (p.code_stride / 4);
    int total = 0;
    for (uint word = lid; word < p.code_stride / 4; word += size.x) {
        uint first = word * 4;
        uint bits = 0;
        if (first < p.width) {
            float factor = factors[p.n_scales == 1 ? 0 : first / p.scale_cols];
            for (uint b = 0; b < 4; b++) {
                if (first + b < p.width) {
                    int code = code_of(normed(in, weight, first + b, norm_factor, has_norm), factor);
                    total += code;
                    bits |= (uint(code) & 0xffu) << (8 * b);
                }
            }
        }
        row_codes[word] = bits;
    }

    if (p.n_sums == 1) {
        total = simd_sum(total);
        if (lane == 0) {
            ((threadgroup int*)parts)[sg] = total;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        total = simd_sum(lane < n_simdgroups ? ((threadgroup int*)parts)[lane] : 0);
        if (lid == 0) {
            sums[row] = total;
        }
        return;
    }
    // A simdgroup adds up the codes of other simdgroups.
    threadgroup_barrier(mem_flags::mem_device);
    for (uint g = sg; g < p.n_sums; g += n_simdgroups) {
        uint end = min(p.code_stride, (g + 1) * p.sum_cols) / 4;
        int sum = 0;
        for (uint word = g * p.sum_cols / 4 + lane; word < end; word += SIMD) {
            char4 four = as_type<char4>(row_codes[word]);
            sum += int(four.x) + int(four.y) + int(four.z) + int(four.w);
        }
        sum = simd_sum(sum);
        if (lane == 0) {
            sums[row * p.n_sums + g] = sum;
        }
    }
}
