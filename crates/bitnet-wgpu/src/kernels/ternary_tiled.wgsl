// Ternary products for many tokens: a workgroup computes 32 rows × 32 tokens, a lane 4 × 4 of them.
// Each step brings 64 columns of both into workgroup memory, the codes unpacked to bytes.

const TILE: u32 = 32u;
const STEP: u32 = 4u;           // words of 16 columns in a step
const STRIDE: u32 = 17u;        // words of 4 columns in a step, and one so that lanes use other banks

var<workgroup> tile_weights: array<u32, 544>; // (TILE, STRIDE)
var<workgroup> tile_codes: array<u32, 544>;   // (TILE, STRIDE)

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first_row = group.x * TILE;
    let first_token = group.y * TILE;
    let lane_row = lane % 8u;
    let lane_token = lane / 8u;
    var sums: array<vec4<i32>, 4>; // [token][row]
    for (var first_word = 0u; first_word < p.words; first_word += STEP) {
        for (var i = lane; i < TILE * STEP; i += 64u) {
            let member = i / STEP;
            let word = first_word + i % STEP;
            var packed = 0u;
            var x = vec4<u32>(0u);
            if word < p.words {
                packed = weights[(first_row + member) * p.words + word];
                if first_token + member < p.n_tokens {
                    x = codes[(first_token + member) * p.words + word];
                }
            }
            let at = member * STRIDE + (i % STEP) * 4u;
            for (var j = 0u; j < 4u; j++) {
                tile_weights[at + j] = (packed >> (2u * j)) & FIELD;
                tile_codes[at + j] = x[j];
            }
        }
        workgroupBarrier();
        for (var k = 0u; k < 16u; k++) {
            let w0 = tile_weights[lane_row * STRIDE + k];
            let w1 = tile_weights[(lane_row + 8u) * STRIDE + k];
            let w2 = tile_weights[(lane_row + 16u) * STRIDE + k];
            let w3 = tile_weights[(lane_row + 24u) * STRIDE + k];
            for (var t = 0u; t < 4u; t++) {
                let x = tile_codes[(lane_token + 8u * t) * STRIDE + k];
                sums[t] += vec4<i32>(
                    dot4I8Packed(w0, x), dot4I8Packed(w1, x), dot4I8Packed(w2, x), dot4I8Packed(w3, x),
                );
            }
        }
        workgroupBarrier();
    }
    for (var t = 0u; t < 4u; t++) {
        let token = first_token + lane_token + 8u * t;
        for (var r = 0u; r < 4u; r++) {
            let row = first_row + lane_row + 8u * r;
            if token < p.n_tokens && row < p.rows {
                finish(row, token, sums[t][r]);
            }
        }
    }
}
