// Rotation, the paged KV cache, and attention over it.
//
// A block of the cache holds `block_tokens` positions of a sequence, for each layer, keys and then
// values, for each head. Keys lie feature by feature, [feature][token], because a thread computes
// the score of one token; values token by token, [token][feature], because a thread computes one
// feature of the result. Numbers are f32 or f16, or signed bytes, of keys four features of a token
// to a word, followed by a scale for each token. `places` holds, for each row of a step, its
// position and where its block table starts.

struct CacheParams {
    uint n_layers;
    uint n_kv_heads;
    uint head_dim;
    uint block_tokens;
    uint format;
    uint layer;
    uint part_bytes; // of the keys or the values of a head in a block
};

// Where the keys (part 0) or values (part 1) of a head lie in a block.
static inline ulong part_start(constant CacheParams& c, uint block, uint part, uint head) {
    return (((ulong(block) * c.n_layers + c.layer) * 2 + part) * c.n_kv_heads + head) * c.part_bytes;
}

// Features rounded up to whole words of bytes.
static inline uint padded_dim(constant CacheParams& c) {
    return (c.head_dim + 3) / 4 * 4;
}

struct RotateParams {
    CacheParams cache;
    uint n_heads;
    uint q_stride;
    uint k_stride;
    uint v_stride;
    uint has_norms;
    float q_eps;
    float k_eps;
};

// Magnitudes below this count as 0, so that no factor overflows.
constant constexpr float TINY = 1e-30f;

// Rounds a head to signed bytes; returns the scale: NaN where a number is not finite. `codes` gets
// padded_dim numbers. One simdgroup; `head` and `codes` are its own.
static inline float quantize_head(threadgroup const float* head, threadgroup int* codes, uint dim, uint padded, uint lane) {
    uint largest = 0;
    for (uint i = lane; i < dim; i += SIMD) {
        largest = max(largest, as_type<uint>(head[i]) & 0x7fffffffu);
    }
    largest = simd_max(largest);
    bool finite = largest < 0x7f800000u;
    float most = as_type<float>(largest);
    float factor = finite && most > TINY ? 127.0f / most : 0.0f;
    for (uint i = lane; i < padded; i += SIMD) {
        codes[i] = factor == 0.0f || i >= dim ? 0 : clamp(round_even(head[i] * factor), -127, 127);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    return finite ? most / 127.0f : as_type<float>(0x7fc00000u);
}

// Halves do not overflow: what is larger becomes the largest.
static inline half to_half(float x) {
    return half(x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x));
}

static inline void store_key(device uchar* keys, constant CacheParams& c, uint token, threadgroup const float* head,
                             threadgroup int* codes, uint lane) {
    uint dim = c.head_dim;
    if (c.format == FORMAT_Q8) {
        uint padded = padded_dim(c);
        float scale = quantize_head(head, codes, dim, padded, lane);
        device uint* words = (device uint*)keys;
        for (uint i = lane; i < padded / 4; i += SIMD) {
            threadgroup const int* four = codes + 4 * i;
            words[i * c.block_tokens + token] = (uint(four[0]) & 0xffu) | ((uint(four[1]) & 0xffu) << 8) |
                                                ((uint(four[2]) & 0xffu) << 16) | ((uint(four[3]) & 0xffu) << 24);
        }
        if (lane == 0) {
            ((device float*)(keys + padded * c.block_tokens))[token] = scale;
        }
        return;
    }
    for (uint i = lane; i < dim; i += SIMD) {
        if (c.format == FORMAT_F16) {
            ((device half*)keys)[i * c.block_tokens + token] = to_half(head[i]);
        } else {
            ((device float*)keys)[i * c.block_tokens + token] = head[i];
        }
    }
}

static inline void store_value(device uchar* values, constant CacheParams& c, uint token, threadgroup const float* head,
                               threadgroup int* codes, uint lane) {
    uint dim = c.head_dim;
    if (c.format == FORMAT_Q8) {
        uint padded = padded_dim(c);
        float scale = quantize_head(head, codes, dim, padded, lane);
        for (uint i = lane; i < padded; i += SIMD) {
            ((device char*)values)[token * padded + i] = char(codes[i]);
        }
        if (lane == 0) {
            ((device float*)(values + padded * c.block_tokens))[token] = scale;
        }
        return;
    }
    for (uint i = lane; i < dim; i += SIMD) {
        if (c.format == FORMAT_F16) {
            ((device half*)values)[token * dim + i] = to_half(head[i]);
        } else {
            ((device float*)values)[token * dim + i] = head[i];
        }
    }
}

// Normalizes and rotates a head from `x` into `head`; features i and i + dim / 2 are a pair.
static inline void turn(const device float* x, const device float* angles, const device float* weight, bool has_norm,
                        float eps, uint dim, threadgroup float* head, uint lane) {
    float factor = 1.0f;
    if (has_norm) {
        float sum = 0.0f;
        if (lane < LANES) {
            for (uint i = lane; i < dim; i += LANES) {
                sum += x[i] * x[i];
            }
        }
        sum = simd_broadcast(fold_lanes(sum), 0);
        factor = 1.0f / precise::sqrt(sum / float(dim) + eps);
    }
    uint half_dim = dim / 2;
    for (uint i = lane; i < half_dim; i += SIMD) {
        float a = x[i];
        float b = x[i + half_dim];
        if (has_norm) {
            a = a * factor * weight[i];
            b = b * factor * weight[i + half_dim];
        }
        float cosine = angles[i];
        float sine = angles[half_dim + i];
        head[i] = a * cosine - b * sine;
        head[i + half_dim] = b * cosine + a * sine;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Rotates queries in place; rotates keys and brings them and the values to the cache. One simdgroup
// for a row and a head: first those of the queries, then those of the cache.
kernel void rotate_and_store(device float* q [[buffer(0)]],
                             const device float* k [[buffer(1)]],
                             const device float* v [[buffer(2)]],
                             const device float* q_norm [[buffer(3)]],
                             const device float* k_norm [[buffer(4)]],
                             const device float* angles [[buffer(5)]],
                             const device uint2* places [[buffer(6)]],
                             const device uint* blocks [[buffer(7)]],
                             device uchar* cache [[buffer(8)]],
                             constant RotateParams& p [[buffer(9)]],
                             threadgroup float* shared [[threadgroup(0)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             uint lane [[thread_index_in_simdgroup]]) {
    uint head = group.x;
    uint row = group.y;
    uint dim = p.cache.head_dim;
    const device float* row_angles = angles + ulong(row) * dim;
    bool has_norms = p.has_norms != 0;
    if (head < p.n_heads) {
        device float* x = q + ulong(row) * p.q_stride + head * dim;
        turn(x, row_angles, q_norm, has_norms, p.q_eps, dim, shared, lane);
        for (uint i = lane; i < dim; i += SIMD) {
            x[i] = shared[i];
        }
        return;
    }
    head -= p.n_heads;
    threadgroup int* codes = (threadgroup int*)(shared + padded_dim(p.cache));
    uint position = places[row].x;
    uint block = blocks[places[row].y + position / p.cache.block_tokens];
    uint token = position % p.cache.block_tokens;
    turn(k + ulong(row) * p.k_stride + head * dim, row_angles, k_norm, has_norms, p.k_eps, dim, shared, lane);
    store_key(cache + part_start(p.cache, block, 0, head), p.cache, token, shared, codes, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const device float* value = v + ulong(row) * p.v_stride + head * dim;
    for (uint i = lane; i < dim; i += SIMD) {
        shared[i] = value[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    store_value(cache + part_start(p.cache, block, 1, head), p.cache, token, shared, codes, lane);
}

struct AttentionParams {
    CacheParams cache;
    uint group;         // queries that share a head of the cache
    uint q_stride;
    uint out_stride;
    uint first_row;     // of the rows this dispatch is for
    uint n_spans;       // spans of the longest row
    float query_scale;  // 1 / sqrt(head_dim)
};

// Positions of a span, by absolute position: sums stay within a span, spans join in their order.
constant constexpr uint SPAN = 256;
// Queries of one threadgroup, one for each of its simdgroups.
constant constexpr uint QUERIES = 4;
// Largest magnitude of an integer factor.
constant constexpr float WEIGHT_MAX = 32639.0f;

// Scores of a key with the queries of the group, times nothing but the keys' own scale.
static inline void score_token(const device uchar* keys, constant CacheParams& c, uint token,
                               threadgroup const float* queries, threadgroup const float* query_factors, uint padded,
                               uint n_queries, thread float* scores) {
    if (c.format == FORMAT_Q8) {
        int sums[QUERIES] = {0, 0, 0, 0};
        threadgroup const int* codes = (threadgroup const int*)queries;
        for (uint i = 0; i < padded / 4; i++) {
            char4 key = as_type<char4>(((const device uint*)keys)[i * c.block_tokens + token]);
            for (uint m = 0; m < n_queries; m++) {
                threadgroup const int* four = codes + m * padded + 4 * i;
                sums[m] += int(key.x) * four[0] + int(key.y) * four[1] + int(key.z) * four[2] + int(key.w) * four[3];
            }
        }
        float scale = ((const device float*)(keys + padded * c.block_tokens))[token];
        for (uint m = 0; m < n_queries; m++) {
            scores[m] = float(sums[m]) * scale * query_factors[m];
        }
        return;
    }
    for (uint m = 0; m < QUERIES; m++) {
        scores[m] = 0.0f;
    }
    for (uint i = 0; i < c.head_dim; i++) {
        float key = load1(keys, c.format, i * c.block_tokens + token);
        for (uint m = 0; m < n_queries; m++) {
            float product = queries[m * padded + i] * key;
            scores[m] = scores[m] + product;
        }
    }
}

// Turns the first `visible` scores of a query into weights; for bytes also into integers, weights
// times the scales of the values. One simdgroup. `stats` gets the maximum, the sum
// of the weights and the factor of the integers.
static inline void weigh(threadgroup float* scores, uint visible, const device uchar* cache,
                         const device uint* blocks, constant CacheParams& c, uint head, uint first_position,
                         threadgroup float* stats, uint lane) {
    float most = -INFINITY;
    for (uint t = lane; t < visible; t += SIMD) {
        most = larger(scores[t], most);
    }
    most = simd_max(most);
    for (uint t = lane; t < visible; t += SIMD) {
        scores[t] = exact_exp(scores[t] - most);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float total = 0.0f;
    if (lane < LANES) {
        for (uint t = lane; t < visible; t += LANES) {
            total += scores[t];
        }
    }
    total = fold_lanes(total);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
        stats[0] = most;
        stats[1] = total;
    }
    if (c.format != FORMAT_Q8) {
        return;
    }
    uint padded = padded_dim(c);
    uint largest = 0;
    for (uint t = lane; t < visible; t += SIMD) {
        uint position = first_position + t;
        uint block = blocks[position / c.block_tokens];
        const device uchar* values = cache + part_start(c, block, 1, head);
        float scale = ((const device float*)(values + padded * c.block_tokens))[position % c.block_tokens];
        float weight = scores[t] * scale;
        scores[t] = weight;
        largest = max(largest, as_type<uint>(weight) & 0x7fffffffu);
    }
    largest = simd_max(largest);
    bool finite = largest < 0x7f800000u;
    float most_weight = as_type<float>(largest);
    float factor = finite && most_weight > TINY ? WEIGHT_MAX / most_weight : 0.0f;
    for (uint t = lane; t < visible; t += SIMD) {
        int code = factor == 0.0f ? 0 : round_even(scores[t] * factor);
        ((threadgroup int*)scores)[t] = code;
    }
    if (lane == 0) {
        stats[2] = finite ? most_weight / WEIGHT_MAX : as_type<float>(0x7fc00000u);
    }
}

// One feature of the weighted sum of the values of a span.
static inline float mix_values(const device uchar* cache, const device uint* blocks, constant CacheParams& c, uint head,
                               uint first_position, uint visible, threadgroup const float* weights, float factor,
                               uint feature) {
    uint padded = padded_dim(c);
    float sum = 0.0f;
    int codes = 0;
    for (uint t = 0; t < visible;) {
        uint position = first_position + t;
        const device uchar* values = cache + part_start(c, blocks[position / c.block_tokens], 1, head);
        uint token = position % c.block_tokens;
        uint end = min(visible, t + c.block_tokens - token);
        for (; t < end; t++, token++) {
            if (c.format == FORMAT_Q8) {
                codes += int(((const device char*)values)[token * padded + feature]) * ((threadgroup const int*)weights)[t];
            } else {
                float product = weights[t] * load1(values, c.format, token * c.head_dim + feature);
                sum = sum + product;
            }
        }
    }
    return c.format == FORMAT_Q8 ? float(codes) * factor : sum;
}

// Causal attention of one row for up to QUERIES queries of one head of the cache, over one span. Where
// no row has more than one that is the result; otherwise `join_attention` makes it of the partial
// results: maximum, total, values. A row that has one span is treated alike in both.
kernel void paged_attention(const device float* q [[buffer(0)]],
                            const device uchar* cache [[buffer(1)]],
                            const device uint2* places [[buffer(2)]],
                            const device uint* block_tables [[buffer(3)]],
                            device float* out [[buffer(4)]],
                            device float* partials [[buffer(5)]],
                            constant AttentionParams& p [[buffer(6)]],
                            threadgroup float* shared [[threadgroup(0)]],
                            uint3 group [[threadgroup_position_in_grid]],
                            uint lid [[thread_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]],
                            uint sg [[simdgroup_index_in_threadgroup]]) {
    constant CacheParams& c = p.cache;
    uint row = p.first_row + group.y;
    uint batches = (p.group + QUERIES - 1) / QUERIES;
    uint head = group.x / batches;
    uint first_query = group.x % batches * QUERIES;
    uint n_queries = min(QUERIES, p.group - first_query);
    uint dim = c.head_dim;
    uint padded = padded_dim(c);
    const device uint* blocks = block_tables + places[row].y;
    uint seen = places[row].x + 1;
    uint first_position = group.z * SPAN;
    if (first_position >= seen) {
        return;
    }
    uint visible = min(SPAN, seen - first_position);
    threadgroup float* queries = shared;                    // (QUERIES, padded), integers for bytes
    threadgroup float* scores = queries + QUERIES * padded; // (QUERIES, SPAN), then weights
    threadgroup float* stats = scores + QUERIES * SPAN;     // (QUERIES, 4): maximum, total, factor
    threadgroup float* query_factors = stats + QUERIES * 4; // (QUERIES)

    if (sg < n_queries) {
        const device float* query = q + ulong(row) * p.q_stride + (head * p.group + first_query + sg) * dim;
        threadgroup float* mine = queries + sg * padded;
        uint largest = 0;
        for (uint i = lane; i < padded; i += SIMD) {
            float x = i < dim ? query[i] * p.query_scale : 0.0f;
            mine[i] = x;
            largest = max(largest, as_type<uint>(x) & 0x7fffffffu);
        }
        if (c.format == FORMAT_Q8) {
            largest = simd_max(largest);
            bool finite = largest < 0x7f800000u;
            float most = as_type<float>(largest);
            float factor = finite && most > TINY ? WEIGHT_MAX / most : 0.0f;
            for (uint i = lane; i < padded; i += SIMD) {
                int code = factor == 0.0f ? 0 : round_even(mine[i] * factor);
                ((threadgroup int*)mine)[i] = code;
            }
            if (lane == 0) {
                query_factors[sg] = finite ? most / WEIGHT_MAX : as_type<float>(0x7fc00000u);
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint t = lid; t < visible; t += QUERIES * SIMD) {
        uint position = first_position + t;
        const device uchar* keys = cache + part_start(c, blocks[position / c.block_tokens], 0, head);
        float mine[QUERIES];
        score_token(keys, c, position % c.block_tokens, queries, query_factors, padded, n_queries, mine);
        for (uint m = 0; m < n_queries; m++) {
            scores[m * SPAN + t] = mine[m];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg < n_queries) {
        weigh(scores + sg * SPAN, visible, cache, blocks, c, head, first_position, stats + sg * 4, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    uint n_heads = c.n_kv_heads * p.group;
    for (uint i = lid; i < n_queries * dim; i += QUERIES * SIMD) {
        uint m = i / dim;
        uint feature = i % dim;
        uint query = head * p.group + first_query + m;
        threadgroup const float* stat = stats + m * 4;
        float value = mix_values(cache, blocks, c, head, first_position, visible, scores + m * SPAN, stat[2], feature);
        if (p.n_spans == 1) {
            float factor = 1.0f / stat[1];
            out[ulong(row) * p.out_stride + query * dim + feature] = value * factor;
        } else {
            device float* partial = partials + ((ulong(group.y) * n_heads + query) * p.n_spans + group.z) * (dim + 2);
            partial[2 + feature] = value;
            if (feature == 0) {
                partial[0] = stat[0];
                partial[1] = stat[1];
            }
        }
    }
}

// Joins the spans of a row and a query, in order. One threadgroup for both.
kernel void join_attention(const device float* partials [[buffer(0)]],
                           const device uint2* places [[buffer(1)]],
                           device float* out [[buffer(2)]],
                           constant AttentionParams& p [[buffer(3)]],
                           uint3 group [[threadgroup_position_in_grid]],
                           uint3 size [[threads_per_threadgroup]],
                           uint lid [[thread_index_in_threadgroup]]) {
    uint query = group.x;
    uint row = p.first_row + group.y;
    uint dim = p.cache.head_dim;
    uint n_heads = p.cache.n_kv_heads * p.group;
    uint n = places[row].x / SPAN + 1;
    const device float* first = partials + (ulong(group.y) * n_heads + query) * p.n_spans * (dim + 2);
    for (uint i = lid; i < dim; i += size.x) {
        float most = first[0];
        float total = first[1];
        float value = first[2 + i];
        for (uint span = 1; span < n; span++) {
            const device float* next = first + ulong(span) * (dim + 2);
            float new_most = larger(most, next[0]);
            float old_factor = exact_exp(most - new_most);
            float new_factor = exact_exp(next[0] - new_most);
            total = total * old_factor + next[1] * new_factor;
            value = value * old_factor + next[2 + i] * new_factor;
            most = new_most;
        }
        float factor = 1.0f / total;
        out[ulong(row) * p.out_stride + query * dim + i] = value * factor;
    }
}
