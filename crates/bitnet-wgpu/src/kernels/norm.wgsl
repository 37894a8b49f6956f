// outputs[i] = normed(x[rows[i]]), one workgroup for each row.

const LANES: u32 = 256u;
const NO_LIST: u32 = 0xffffffffu;

struct Params {
    cols: u32,
    norms: u32, // bit 0: the first norm, bit 1: the second
    eps0: f32,
    eps1: f32,
    rows: u32,  // where the list of rows starts in the step, or NO_LIST: output i is row i
}
var<immediate> p: Params;

@group(0) @binding(3) var<storage, read> step: array<u32>;
@group(0) @binding(4) var<storage, read_write> outputs: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var row = group.x;
    if p.rows != NO_LIST {
        row = step[p.rows + group.x];
    }
    prepare_norms(lane, row);
    for (var col = lane; col < p.cols; col += LANES) {
        outputs[group.x * p.cols + col] = normed(col);
    }
}
