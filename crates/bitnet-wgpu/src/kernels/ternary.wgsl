// What the ternary products share: the layout of codes, and how a sum becomes an output.
//
// A word of codes is 16 columns at two bits, trit + 1: field j of byte b (bits 2j, 2j + 1) is column
// 4j + b, so (word >> 2j) & 0x03030303 is four consecutive columns as bytes, one operand of a
// four-way dot product. Σ trit·x = Σ code·x − Σ x.

const FIELD: u32 = 0x03030303u;

struct Params {
    rows: u32,       // of the weights that are here
    words: u32,      // of 16 columns, in a row
    n_tokens: u32,
    out_width: u32,  // features of an output row
    out_first: u32,  // the output feature of the first row that is here
    activation: u32, // of a gate: 0 relu², 1 silu
    n_groups: u32,   // sums of a row, where columns are summed in groups
    group_words: u32,
    scale_of_token: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> weights: array<u32>;       // (rows, words)
@group(0) @binding(2) var<storage, read> codes: array<vec4<u32>>;   // (tokens, words)
@group(0) @binding(3) var<storage, read> scales: array<vec2<u32>>;  // (tokens) or (tokens, groups)
@group(0) @binding(4) var<storage, read_write> outputs: array<f32>; // (tokens, out_width)

fn dot_word(word: u32, x: vec4<u32>) -> i32 {
    return dot4I8Packed(word & FIELD, x.x) + dot4I8Packed((word >> 2u) & FIELD, x.y)
        + dot4I8Packed((word >> 4u) & FIELD, x.z) + dot4I8Packed((word >> 6u) & FIELD, x.w);
}
