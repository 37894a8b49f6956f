// Eight-bit absmax quantization: what turns a number into a code, and codes into a word.

const INFINITE: u32 = 0x7f800000u;
const NAN: u32 = 0x7fc00000u;

// Absolute values order like their bits, NaN above infinity, so that none goes unnoticed.
fn magnitude(value: f32) -> u32 {
    return bitcast<u32>(value) & 0x7fffffffu;
}

// The largest value a scale stands for; nothing is scaled up from less than 1e-5.
fn largest_of(bits: u32) -> f32 {
    return max(bitcast<f32>(bits), 1e-5);
}

fn code(value: f32, factor: f32) -> i32 {
    return clamp(i32(round(value * factor)), -128, 127);
}
