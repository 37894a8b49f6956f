// A row of weights has one scale and a bias, a token has one scale.

@group(0) @binding(1) var<storage, read> row_scales: array<vec2<f32>>; // (rows): scale, bias

fn finish(row: u32, token: u32, sum: i32) {
    let of_token = scales[token];
    let of_row = row_scales[row];
    let trits = sum - bitcast<i32>(of_token.y);
    let y = f32(trits) * of_row.x * bitcast<f32>(of_token.x) + of_row.y;
    store(token * p.out_width + p.out_first + row, y);
}
