// x[row] = table[tokens[row]], for the tokens whose rows are in this part of the table.

struct Params {
    first: u32,  // of the table's rows that are here
    n_rows: u32,
    cols: u32,
    words: u32,  // of a row of the table
    tokens: u32, // where the step's tokens start
}
var<immediate> p: Params;

@group(0) @binding(1) var<storage, read> step: array<u32>;
@group(0) @binding(2) var<storage, read_write> outputs: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let word = group.x * 64u + lane;
    let row = step[p.tokens + group.y];
    if word >= p.words || row < p.first || row - p.first >= p.n_rows {
        return;
    }
    let pair = weight_pair((row - p.first) * p.words + word);
    let at = group.y * p.cols;
    let col = word * PER_WORD;
    outputs[at + col] = pair.x;
    if PER_WORD == 2u && col + 1u < p.cols {
        outputs[at + col + 1u] = pair.y;
    }
}
