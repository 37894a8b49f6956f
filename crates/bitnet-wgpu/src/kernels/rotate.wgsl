// Normalizes and rotates the heads of queries in place, one workgroup for each head and row.

struct Params {
    head_dim: u32,
    normed: u32, // 1: heads are normalized
    eps: f32,
    n_heads: u32,
}
var<immediate> p: Params;

@group(0) @binding(2) var<storage, read_write> heads: array<f32>; // (rows, n_heads · head_dim)

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.n_heads + group.x) * p.head_dim;
    for (var i = lane; i < p.head_dim; i += LANES) {
        head[i] = heads[at + i];
    }
    workgroupBarrier();
    if p.normed == 1u {
        normalize(lane);
    }
    rotate(lane, group.y);
    for (var i = lane; i < p.head_dim; i += LANES) {
        heads[at + i] = head[i];
    }
}
