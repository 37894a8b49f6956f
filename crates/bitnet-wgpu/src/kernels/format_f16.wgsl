// A word of a float matrix is two half-precision numbers.
const PER_WORD: u32 = 2u;
@group(0) @binding(0) var<storage, read> weights: array<u32>;

fn weight_pair(word: u32) -> vec2<f32> {
    return unpack2x16float(weights[word]);
}
