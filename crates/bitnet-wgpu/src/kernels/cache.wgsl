// Where a token's head is in a layer's cache: (blocks, heads that are here, block_tokens, words).

const POSITION: u32 = 0u; // of a row's entry in the step: its position,
const TABLE: u32 = 1u;    // and where the block table of its sequence starts

fn cache_word(table: u32, position: u32, cache_head: u32) -> u32 {
    let block = step[table + position / p.block_tokens];
    let slot = position % p.block_tokens;
    return ((block * p.cache_heads + cache_head) * p.block_tokens + slot) * p.head_words;
}
