// Writes keys (normalized and rotated) and values of the step's rows to the cache: one workgroup for
// each row and head, keys before values.

struct Params {
    head_dim: u32,
    normed: u32,
    eps: f32,
    n_heads: u32,      // of a row of keys
    first_head: u32,   // the first one that is in this part of the cache
    cache_heads: u32,  // how many are
    block_tokens: u32,
    head_words: u32,
    rows: u32,         // where the rows' entries start in the step
}
var<immediate> p: Params;

@group(0) @binding(2) var<storage, read> k: array<f32>; // (rows, n_heads · head_dim)
@group(0) @binding(3) var<storage, read> v: array<f32>; // (rows, n_heads · head_dim)
@group(0) @binding(4) var<storage, read> step: array<u32>;
@group(0) @binding(5) var<storage, read_write> keys: array<u32>;
@group(0) @binding(6) var<storage, read_write> values: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y;
    let is_key = group.x < p.cache_heads;
    let cache_head = group.x % p.cache_heads;
    let source = (row * p.n_heads + p.first_head + cache_head) * p.head_dim;
    for (var i = lane; i < p.head_dim; i += LANES) {
        if is_key {
            head[i] = k[source + i];
        } else {
            head[i] = v[source + i];
        }
    }
    workgroupBarrier();
    if is_key {
        if p.normed == 1u {
            normalize(lane);
        }
        rotate(lane, row);
    }
    let entry = p.rows + 2u * row;
    let to = cache_word(step[entry + TABLE], step[entry + POSITION], cache_head);
    prepare_words(lane);
    for (var word = lane; word < p.head_words; word += LANES) {
        let packed = head_word(word);
        if is_key {
            keys[to + word] = packed;
        } else {
            values[to + word] = packed;
        }
    }
}
