// Ternary products whose weights or activations have scales for groups of columns: a workgroup for
// each row and token, whose lanes take the groups in turn.

const LANES: u32 = 64u;

// (rows, n_groups) scales, then (rows) biases
@group(0) @binding(1) var<storage, read> row_scales: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x;
    let token = group.y;
    var y = 0.0;
    for (var g = lane; g < p.n_groups; g += LANES) {
        let first = g * p.group_words;
        let end = min(first + p.group_words, p.words);
        var sum = 0;
        for (var word = first; word < end; word++) {
            sum += dot_word(weights[row * p.words + word], codes[token * p.words + word]);
        }
        let of_token = scales[token * p.n_groups + g];
        let trits = sum - bitcast<i32>(of_token.y);
        y += f32(trits) * row_scales[row * p.n_groups + g] * bitcast<f32>(of_token.x);
    }
    let total = sum_lanes(lane, y);
    if lane == 0u {
        let bias = row_scales[p.rows * p.n_groups + row];
        store(token * p.out_width + p.out_first + row, total + bias);
    }
}
