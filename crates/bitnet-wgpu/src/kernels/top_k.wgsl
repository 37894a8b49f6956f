// The largest of each 4096 numbers of a row, largest first, smaller index first among equals: a
// workgroup for each piece. Run again on its own results until a row has one piece.
//
// Numbers are ordered by their bits, NaN above infinity, so that none goes unnoticed.

const LANES: u32 = 256u;
const EACH: u32 = 16u; // numbers of a lane

struct Params {
    n: u32,        // numbers of a row
    k: u32,        // wanted of each piece
    n_pieces: u32,
}
var<immediate> p: Params;

@group(0) @binding(1) var<storage, read_write> best: array<vec2<u32>>; // (rows, n_pieces, k): bits, index

var<workgroup> top_keys: array<u32, LANES>;
var<workgroup> top_items: array<u32, LANES>;

// Above 0 for every number; 0 is below all.
fn order(bits: u32) -> u32 {
    if (bits & 0x80000000u) != 0u {
        return max(~bits, 1u);
    }
    return bits | 0x80000000u;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let start = group.x * LANES * EACH;
    let count = min(p.n - start, LANES * EACH);
    let row = group.y * p.n + start;
    let into = (group.y * p.n_pieces + group.x) * p.k;
    var taken = 0u; // a bit for each number of this lane
    for (var round = 0u; round < p.k; round++) {
        var key = 0u;
        var item = 0xffffffffu;
        for (var i = 0u; i < EACH; i++) {
            let at = i * LANES + lane;
            if at < count && (taken & (1u << i)) == 0u {
                let candidate = order(number(row + at));
                if candidate > key {
                    key = candidate;
                    item = at;
                }
            }
        }
        top_keys[lane] = key;
        top_items[lane] = item;
        workgroupBarrier();
        for (var half = LANES / 2u; half > 0u; half >>= 1u) {
            if lane < half {
                let other = top_keys[lane + half];
                let other_item = top_items[lane + half];
                if other > top_keys[lane]
                    || (other == top_keys[lane] && other_item < top_items[lane]) {
                    top_keys[lane] = other;
                    top_items[lane] = other_item;
                }
            }
            workgroupBarrier();
        }
        let winner = top_items[0];
        workgroupBarrier();
        if winner == 0xffffffffu {
            // Fewer numbers than wanted: what is left says that it is none.
            if lane == 0u {
                best[into + round] = vec2<u32>(0xff800000u, 0xffffffffu);
            }
        } else if winner % LANES == lane {
            taken |= 1u << (winner / LANES);
            best[into + round] = vec2<u32>(number(row + winner), index(start + winner, row + winner));
        }
    }
}
