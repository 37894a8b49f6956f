fn prepare_words(lane: u32) {}

fn head_word(word: u32) -> u32 {
    var pair = vec2<f32>(head[2u * word], 0.0);
    if 2u * word + 1u < p.head_dim {
        pair.y = head[2u * word + 1u];
    }
    return pack2x16float(pair);
}
