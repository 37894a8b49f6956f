// Norms and quantizes tokens with one scale and one sum each, one workgroup for each token.
//
// codes: (tokens, words), word w holds columns 4w … 4w + 3; columns beyond the last are 0.
// scales: (tokens), the bits of the scale and the sum of the codes.

const LANES: u32 = 256u;

struct Params {
    cols: u32,
    norms: u32,
    eps0: f32,
    eps1: f32,
    words: u32, // of a token
}
var<immediate> p: Params;

@group(0) @binding(3) var<storage, read_write> codes: array<u32>;
@group(0) @binding(4) var<storage, read_write> scales: array<vec2<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let token = group.x;
    prepare_norms(lane, token);
    var most = 0u;
    for (var col = lane; col < p.cols; col += LANES) {
        most = max(most, magnitude(normed(col)));
    }
    let bits = max_lanes_u32(lane, most);
    let finite = bits < INFINITE;
    let largest = largest_of(bits);
    let factor = 127.0 / largest;
    var sum = 0;
    for (var word = lane; word < p.words; word += LANES) {
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
    let total = sum_lanes_u32(lane, bitcast<u32>(sum));
    if lane == 0u {
        scales[token] = vec2<u32>(select(NAN, bitcast<u32>(largest / 127.0), finite), total);
    }
}
