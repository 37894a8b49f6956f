var<private> largest: f32;

fn prepare_words(lane: u32) {
    var most = 0u;
    for (var i = lane; i < p.head_dim; i += LANES) {
        most = max(most, bitcast<u32>(head[i]) & 0x7fffffffu);
    }
    // A head of nothing but zeros has codes 0 under any scale.
    largest = max(bitcast<f32>(max_lanes_u32(lane, most)), 1e-30);
}

fn head_word(word: u32) -> u32 {
    if word == 0u {
        return bitcast<u32>(largest / 127.0);
    }
    var packed = 0u;
    for (var i = 0u; i < 4u; i++) {
        let feature = 4u * (word - 1u) + i;
        if feature < p.head_dim {
            let q = clamp(i32(round(head[feature] * (127.0 / largest))), -127, 127);
            packed |= (bitcast<u32>(q) & 0xffu) << (8u * i);
        }
    }
    return packed;
}
