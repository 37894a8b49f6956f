// Products of float weights and float activations: a workgroup reads four rows of weights for one
// token. Embeddings as output heads, and projections that are not ternary.

const LANES: u32 = 64u;
const ROWS: u32 = 4u;

struct Params {
    rows: u32,       // of the weights that are here
    words: u32,      // in a row
    cols: u32,
    out_width: u32,  // features of an output row
    out_first: u32,  // the output feature of the first row that is here
    activation: u32, // of a gate: 0 relu², 1 silu
    biased: u32,     // 1: there is a bias
}
var<immediate> p: Params;

@group(0) @binding(1) var<storage, read> bias: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;             // (tokens, cols)
@group(0) @binding(4) var<storage, read_write> outputs: array<f32>; // (tokens, out_width)

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first_row = group.x * ROWS;
    let token = group.y;
    var sums: array<f32, ROWS>;
    for (var word = lane; word < p.words; word += LANES) {
        let col = word * PER_WORD;
        var pair = vec2<f32>(x[token * p.cols + col], 0.0);
        if PER_WORD == 2u && col + 1u < p.cols {
            pair.y = x[token * p.cols + col + 1u];
        }
        for (var r = 0u; r < ROWS; r++) {
            let row = min(first_row + r, p.rows - 1u);
            let w = weight_pair(row * p.words + word);
            sums[r] = sums[r] + w.x * pair.x + w.y * pair.y;
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        let total = sum_lanes(lane, sums[r]);
        let row = first_row + r;
        if lane == 0u && row < p.rows {
            var y = total;
            if p.biased == 1u {
                y += bias[p.out_first + row];
            }
            store(token * p.out_width + p.out_first + row, y);
        }
    }
}
