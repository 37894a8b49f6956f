fn prepare_words(lane: u32) {}

fn head_word(word: u32) -> u32 {
    return bitcast<u32>(head[word]);
}
