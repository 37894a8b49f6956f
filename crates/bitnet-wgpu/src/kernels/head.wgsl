// One head of a query or key: its norm and its rotation, in workgroup memory.

const LANES: u32 = 64u;
const MAX_HEAD_DIM: u32 = 512u;

@group(0) @binding(0) var<storage, read> norm: array<f32>;   // (head_dim)
@group(0) @binding(1) var<storage, read> angles: array<f32>; // (rows, head_dim): cosines, sines

var<workgroup> head: array<f32, MAX_HEAD_DIM>;

// `head` holds bare numbers; all lanes come here together, after a barrier, and leave after one.
fn normalize(lane: u32) {
    var squares = 0.0;
    for (var i = lane; i < p.head_dim; i += LANES) {
        squares += head[i] * head[i];
    }
    let factor = 1.0 / sqrt(sum_lanes(lane, squares) / f32(p.head_dim) + p.eps);
    for (var i = lane; i < p.head_dim; i += LANES) {
        head[i] = head[i] * factor * norm[i];
    }
    workgroupBarrier();
}

fn rotate(lane: u32, row: u32) {
    let half = p.head_dim / 2u;
    let at = row * p.head_dim;
    for (var i = lane; i < half; i += LANES) {
        let cosine = angles[at + i];
        let sine = angles[at + half + i];
        let a = head[i];
        let b = head[i + half];
        head[i] = a * cosine - b * sine;
        head[i + half] = b * cosine + a * sine;
    }
    workgroupBarrier();
}
