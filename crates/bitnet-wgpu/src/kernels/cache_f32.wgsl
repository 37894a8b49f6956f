// A head in the cache: a word for each feature.

const FEATURES: u32 = 1u; // of a word
const HEADER: u32 = 0u;   // words before the features

fn unpack_word(word: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<f32>(word), 0.0, 0.0, 0.0);
}
