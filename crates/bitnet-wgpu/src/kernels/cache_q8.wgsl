// A head in the cache: its scale, then a word for each four features.

const FEATURES: u32 = 4u; // of a word
const HEADER: u32 = 1u;   // words before the features

fn unpack_word(word: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8(word));
}
