// Causal attention of one row and one head over its sequence's cache, a workgroup for each. The past
// is taken in tiles of 64 positions from the first one on, so that a result depends neither on the
// step it is computed in nor on what runs beside it.

const LANES: u32 = 64u;
const MAX_HEAD_DIM: u32 = 512u;
const LOWEST: f32 = -3.0e38;

struct Params {
    head_dim: u32,
    n_heads: u32,      // of queries, in a row
    group: u32,        // queries for each key
    first_head: u32,   // the first key head that is in this part of the cache
    cache_heads: u32,
    block_tokens: u32,
    head_words: u32,
    rows: u32,         // where the rows' entries start in the step
    scale: f32,        // of scores
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> q: array<f32>; // (rows, n_heads · head_dim)
@group(0) @binding(1) var<storage, read> step: array<u32>;
@group(0) @binding(2) var<storage, read> keys: array<u32>;
@group(0) @binding(3) var<storage, read> values: array<u32>;
@group(0) @binding(4) var<storage, read_write> outputs: array<f32>; // (rows, n_heads · head_dim)

var<workgroup> query: array<f32, MAX_HEAD_DIM>;
var<workgroup> sums: array<f32, MAX_HEAD_DIM>;
var<workgroup> weights: array<f32, LANES>;
var<workgroup> places: array<u32, LANES>;
var<workgroup> largest: array<f32, LANES>;

fn max_lanes(lane: u32, value: f32) -> f32 {
    largest[lane] = value;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half {
            largest[lane] = max(largest[lane], largest[lane + half]);
        }
        workgroupBarrier();
    }
    let result = largest[0];
    workgroupBarrier();
    return result;
}

fn score(at: u32) -> f32 {
    var sum = 0.0;
    for (var word = HEADER; word < p.head_words; word++) {
        let k = unpack_word(keys[at + word]);
        let i = (word - HEADER) * FEATURES;
        sum += k.x * query[i];
        if FEATURES > 1u {
            sum += k.y * query[i + 1u];
        }
        if FEATURES > 2u {
            sum += k.z * query[i + 2u];
            sum += k.w * query[i + 3u];
        }
    }
    if HEADER == 1u {
        sum *= bitcast<f32>(keys[at]);
    }
    return sum * p.scale;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y;
    let cache_head = group.x / p.group;
    let head = p.first_head * p.group + group.x;
    let at = (row * p.n_heads + head) * p.head_dim;
    for (var i = lane; i < MAX_HEAD_DIM; i += LANES) {
        if i < p.head_dim {
            query[i] = q[at + i];
        } else {
            query[i] = 0.0;
        }
        sums[i] = 0.0;
    }
    workgroupBarrier();
    let entry = p.rows + 2u * row;
    let position = step[entry + POSITION];
    let table = step[entry + TABLE];
    var most = LOWEST;
    var total = 0.0;
    for (var first = 0u; first <= position; first += LANES) {
        let here = first + lane;
        var mine = LOWEST;
        var place = 0u;
        if here <= position {
            place = cache_word(table, here, cache_head);
            mine = score(place);
        }
        let more = max(most, max_lanes(lane, mine));
        var weight = 0.0;
        if here <= position {
            weight = exp(mine - more);
        }
        var old = 0.0; // of the first tile nothing came before
        if first > 0u {
            old = exp(most - more);
        }
        total = total * old + sum_lanes(lane, weight);
        most = more;
        if HEADER == 1u && here <= position {
            weight *= bitcast<f32>(values[place]);
        }
        weights[lane] = weight;
        places[lane] = place;
        workgroupBarrier();
        let n = min(LANES, position - first + 1u);
        for (var word = HEADER + lane; word < p.head_words; word += LANES) {
            var sum = vec4<f32>(0.0);
            for (var j = 0u; j < n; j++) {
                sum += weights[j] * unpack_word(values[places[j] + word]);
            }
            let i = (word - HEADER) * FEATURES;
            for (var f = 0u; f < FEATURES; f++) {
                sums[i + f] = sums[i + f] * old + sum[f];
            }
        }
        workgroupBarrier();
    }
    for (var i = lane; i < p.head_dim; i += LANES) {
        outputs[at + i] = sums[i] / total;
    }
}
