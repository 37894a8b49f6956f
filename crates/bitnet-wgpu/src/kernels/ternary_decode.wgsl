// Ternary products for a few tokens: a workgroup reads eight rows of weights once, side by side, and
// each of its lanes every 64th word of them.

const LANES: u32 = 64u;
const ROWS: u32 = 8u;

fn partial_sums(first_row: u32, token: u32, lane: u32) -> array<i32, ROWS> {
    var sums: array<i32, ROWS>;
    for (var word = lane; word < p.words; word += LANES) {
        let x = codes[token * p.words + word];
        for (var r = 0u; r < ROWS; r++) {
            sums[r] += dot_word(weights[(first_row + r) * p.words + word], x);
        }
    }
    return sums;
}
