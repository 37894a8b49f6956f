// A word of a float matrix is one number.
const PER_WORD: u32 = 1u;
@group(0) @binding(0) var<storage, read> weights: array<f32>;

fn weight_pair(word: u32) -> vec2<f32> {
    return vec2<f32>(weights[word], 0.0);
}
