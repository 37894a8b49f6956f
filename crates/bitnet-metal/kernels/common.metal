// Arithmetic that every kernel shares: the order of float sums, the exponential, number formats.
//
// Float results are to have the bits of the CPU's scalar code: every sum runs in 16 lanes (lane i
// takes elements i, i + 16, ...), a product is rounded before it is added, and the lanes fold as
// i + (i + 8), then 4, 2, 1. So contraction is off and fast math is off. Integer sums need no order.
// Knows no shapes. All files of this folder are compiled as one text, this one first.
#include <metal_stdlib>
#if defined(__METAL_VERSION__) && __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#endif
using namespace metal;

// Lanes of a float sum.
constant constexpr uint LANES = 16;
// Threads of a simdgroup on every Apple GPU.
constant constexpr uint SIMD = 32;
// Adding this to |x| < 2^22 rounds x to the nearest integer, ties to even.
constant constexpr float ROUND = 12582912.0f;

// Folds the values of lanes 0...15 of a simdgroup; the sum is in lane 0. All lanes must call it.
static inline float fold_lanes(float lane_sum) {
    lane_sum += simd_shuffle_down(lane_sum, 8);
    lane_sum += simd_shuffle_down(lane_sum, 4);
    lane_sum += simd_shuffle_down(lane_sum, 2);
    lane_sum += simd_shuffle_down(lane_sum, 1);
    return lane_sum;
}

// The nearest integer, ties to even, for |x| < 2^22.
static inline int round_even(float x) {
    return as_type<int>(x + ROUND) - as_type<int>(ROUND);
}

static inline bool is_finite(float x) {
    return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u;
}

static inline float larger(float a, float b) {
    return a > b ? a : b;
}

// 2^n for -126 <= n <= 127.
static inline float power_of_two(int n) {
    return as_type<float>(uint(n + 127) << 23);
}

// e^x as the CPU computes it: below the smallest normal number 0, above the largest infinity.
static inline float exact_exp(float x) {
    const float underflow = -87.33654f;
    const float overflow = 88.72283f;
    float clamped = x > overflow ? overflow : x;
    clamped = clamped < underflow ? underflow : clamped;
    // x = n ln 2 + r; ln 2 in two parts, of which the first has few bits.
    float shifted = clamped * 1.44269504f + ROUND;
    int n = as_type<int>(shifted) - as_type<int>(ROUND);
    float n_float = shifted - ROUND;
    float r = (clamped - n_float * 0.6933594f) - n_float * -2.1219444e-4f;
    float poly = (((0.001381454f * r + 0.008368745f) * r + 0.04166839f) * r + 0.16666521f) * r + 0.49999994f;
    float e_r = 1.0f + (r + r * r * poly);
    // 2^n in two factors: n may be 128, which is no exponent of a number.
    int first = n >> 1;
    float y = e_r * power_of_two(first) * power_of_two(n - first);
    y = x < underflow ? 0.0f : y;
    return x > overflow ? INFINITY : y;
}

// How a float matrix or a cache holds its numbers.
constant constexpr uint FORMAT_F32 = 0;
constant constexpr uint FORMAT_F16 = 1;
constant constexpr uint FORMAT_BF16 = 2;
constant constexpr uint FORMAT_Q8 = 3;

// Four numbers from element `at` on, a multiple of 4.
static inline float4 load4(const device uchar* bytes, uint format, ulong at) {
    if (format == FORMAT_F32) {
        return *(const device float4*)(bytes + at * 4);
    }
    if (format == FORMAT_F16) {
        return float4(*(const device half4*)(bytes + at * 2));
    }
    uint4 bits = uint4(*(const device ushort4*)(bytes + at * 2));
    return as_type<float4>(bits << 16);
}

static inline float load1(const device uchar* bytes, uint format, ulong at) {
    if (format == FORMAT_F32) {
        return ((const device float*)bytes)[at];
    }
    if (format == FORMAT_F16) {
        return float(((const device half*)bytes)[at]);
    }
    return as_type<float>(uint(((const device ushort*)bytes)[at]) << 16);
}
