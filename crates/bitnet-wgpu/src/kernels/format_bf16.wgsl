// A word of a float matrix is two bfloat16: the upper halves of single-precision numbers.
const PER_WORD: u32 = 2u;
@group(0) @binding(0) var<storage, read> weights: array<u32>;

fn weight_pair(word: u32) -> vec2<f32> {
    let bits = weights[word];
    return vec2<f32>(bitcast<f32>(bits << 16u), bitcast<f32>(bits & 0xffff0000u));
}
