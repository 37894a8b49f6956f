// A word of a float matrix is two half-precision numbers, which this device reads as such.
const PER_WORD: u32 = 2u;
@group(0) @binding(0) var<storage, read> weights: array<vec2<f16>>;

fn weight_pair(word: u32) -> vec2<f32> {
    return vec2<f32>(weights[word]);
}
