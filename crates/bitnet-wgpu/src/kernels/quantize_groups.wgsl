// Norms and quantizes tokens whose codes are summed in groups of columns, one workgroup for each
// token, one lane for each group. Scales belong to groups or to whole tokens.
//
// codes: as for whole tokens. scales: (tokens, groups), the bits of a group's scale and its sum.

const LANES: u32 = 256u;

struct Params {
    cols: u32,
    norms: u32,
    eps0: f32,
    eps1: f32,
    words: u32,          // of a token
    n_groups: u32,
    group_words: u32,    // of four columns
    scale_of_token: u32, // 1: one scale for the token
}
var<immediate> p: Params;

@group(0) @binding(3) var<storage, read_write> codes: array<u32>;
@group(0) @binding(4) var<storage, read_write> scales: array<vec2<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let token = group.x;
    prepare_norms(lane, token);
    var token_bits = 0u;
    if p.scale_of_token == 1u {
        var most = 0u;
        for (var col = lane; col < p.cols; col += LANES) {
            most = max(most, magnitude(normed(col)));
        }
        token_bits = max_lanes_u32(lane, most);
    }
    for (var g = lane; g < p.n_groups; g += LANES) {
        let first = g * p.group_words;
        let end = min(first + p.group_words, p.words);
        var bits = token_bits;
        if p.scale_of_token == 0u {
            for (var col = 4u * first; col < min(4u * end, p.cols); col++) {
                bits = max(bits, magnitude(normed(col)));
            }
        }
        let finite = bits < INFINITE;
        let largest = largest_of(bits);
        let factor = 127.0 / largest;
        var sum = 0;
        for (var word = first; word < end; word++) {
            var packed = 0u;
            for (var i = 0u; i < 4u; i++) {
                let col = 4u * word + i;
                if finite && col < p.cols {
                    let q = code(normed(col), factor);
                    sum += q;
                    packed |= (bitcast<u32>(q) & 0xffu) << (8u * i);
                }
            }
            codes[token * p.words + word] = packed;
        }
        let scale = select(NAN, bitcast<u32>(largest / 127.0), finite);
        scales[token * p.n_groups + g] = vec2<u32>(scale, bitcast<u32>(sum));
    }
}
