//! SentencePiece's BPE on a GGUF vocabulary: starts from characters and, as long as two neighbours
//! together are a token, merges the pair of highest score, the leftmost of equals.
//!
//! Characters without a token become their bytes. Takes text whose spaces are already visible.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// The vocabulary, ready for merging.
#[derive(Debug, Clone)]
pub(super) struct SentencePiece {
    /// Tokens that text can become, with their scores. Not control tokens, not bytes.
    pieces: HashMap<String, (u32, f32)>,
    /// Length of the longest piece in bytes.
    longest: usize,
    bytes: Box<[Option<u32>; 256]>,
    unknown: Option<u32>,
}

/// A run of the text that is one symbol for now; merged-away symbols have length 0.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    previous: usize,
    next: usize,
}

/// No neighbour.
const NONE: usize = usize::MAX;

/// A pair that can be merged, valid while its length is that of the two symbols together.
#[derive(Debug, Clone, Copy)]
struct Pair {
    score: f32,
    left: usize,
    len: usize,
}

impl Ord for Pair {
    /// The heap's greatest: highest score, then leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl SentencePiece {
    /// `pieces`: text, id and score of the tokens that text can become; of equal texts the first.
    /// `bytes`: ids of the byte tokens.
    pub(super) fn new(
        pieces: impl Iterator<Item = (String, u32, f32)>,
        bytes: [Option<u32>; 256],
        unknown: Option<u32>,
    ) -> Self {
        let mut map = HashMap::new();
        for (text, id, score) in pieces {
            map.entry(text).or_insert((id, score));
        }
        let longest = map.keys().map(String::len).max().unwrap_or(0);
        Self { pieces: map, longest, bytes: Box::new(bytes), unknown }
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.pieces.get(text).map(|piece| piece.0)
    }

    /// Appends the tokens of `text`. Characters that have neither token nor bytes become the
    /// unknown token, or nothing where there is none.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                len: c.len_utf8(),
                previous: i.checked_sub(1).unwrap_or(NONE),
                next: i + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut pairs = BinaryHeap::new();
        let offer = |symbols: &[Symbol], pairs: &mut BinaryHeap<Pair>, left: usize| {
            if left == NONE || symbols[left].next == NONE {
                return;
            }
            let (start, len) =
                (symbols[left].start, symbols[left].len + symbols[symbols[left].next].len);
            // Neighbours lie side by side in the text.
            let piece = (len <= self.longest).then(|| self.pieces.get(&text[start..start + len]));
            if let Some((_, score)) = piece.flatten() {
                pairs.push(Pair { score: *score, left, len });
            }
        };
        for left in 0..symbols.len() {
            offer(&symbols, &mut pairs, left);
        }
        while let Some(Pair { left, len, .. }) = pairs.pop() {
            let Symbol { len: left_len, next: right, .. } = symbols[left];
            if left_len == 0 || right == NONE || left_len + symbols[right].len != len {
                continue;
            }
            let after = symbols[right].next;
            symbols[right].len = 0;
            symbols[left].len = len;
            symbols[left].next = after;
            if after != NONE {
                symbols[after].previous = left;
            }
            offer(&symbols, &mut pairs, symbols[left].previous);
            offer(&symbols, &mut pairs, left);
        }
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            let piece = &text[symbol.start..symbol.start + symbol.len];
            match self.pieces.get(piece) {
                Some((id, _)) => out.push(*id),
                None => self.encode_bytes(piece, out),
            }
        }
    }

    fn encode_bytes(&self, piece: &str, out: &mut Vec<u32>) {
        let bytes = piece.bytes().map(|byte| self.bytes[byte as usize]);
        match bytes.collect::<Option<Vec<u32>>>() {
            Some(ids) => out.extend(ids),
            None => out.extend(self.unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model(pieces: &[(&str, f32)]) -> SentencePiece {
        let pieces = pieces.iter().enumerate();
        let mut bytes = [None; 256];
        (0..256).for_each(|byte| bytes[byte] = Some(1000 + byte as u32));
        SentencePiece::new(
            pieces.map(|(id, (text, score))| (text.to_string(), id as u32, *score)),
            bytes,
            None,
        )
    }

    fn encode(model: &SentencePiece, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        model.encode(text, &mut out);
        out
    }

    #[test]
    fn the_best_score_merges_first_and_the_leftmost_of_equals() {
        let model = model(&[("a", 0.0), ("b", 0.0), ("ab", -2.0), ("ba", -1.0), ("aba", -3.0)]);
        assert_eq!(encode(&model, "abab"), [4, 1]);
        assert_eq!(encode(&model, "aba"), [4]);
        let model = self::model(&[("a", 0.0), ("aa", -1.0)]);
        assert_eq!(encode(&model, "aaa"), [1, 0]);
    }

    #[test]
    fn a_character_may_only_occur_inside_tokens() {
        let model = model(&[("xy", -1.0)]);
        assert_eq!(encode(&model, "xyx"), [0, 1000 + u32::from(b'x')]);
        assert_eq!(encode(&model, "é"), [1000 + 0xC3, 1000 + 0xA9]);
        assert_eq!(encode(&model, ""), [0; 0]);
    }

    #[test]
    fn without_bytes_there_is_the_unknown_token_or_nothing() {
        let pieces = || [("a".to_owned(), 7, 0.0)].into_iter();
        let model = SentencePiece::new(pieces(), [None; 256], Some(9));
        assert_eq!(encode(&model, "aéa"), [7, 9, 7]);
        let model = SentencePiece::new(pieces(), [None; 256], None);
        assert_eq!(encode(&model, "aéa"), [7, 7]);
    }

    /// The definition: look at all neighbours, merge the best, begin again.
    fn naive(model: &SentencePiece, text: &str) -> Vec<u32> {
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for i in 1..symbols.len() {
                let joined = symbols[i - 1].clone() + &symbols[i];
                if let Some((_, score)) = model.pieces.get(&joined)
                    && best.is_none_or(|(best, _)| *score > best)
                {
                    best = Some((*score, i - 1));
                }
            }
            let Some((_, left)) = best else { break };
            let right = symbols.remove(left + 1);
            symbols[left] += &right;
        }
        let ids = symbols.iter().map(|symbol| match model.id(symbol) {
            Some(id) => vec![id],
            None => symbol.bytes().map(|byte| 1000 + u32::from(byte)).collect(),
        });
        ids.flatten().collect()
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            pieces in prop::collection::btree_map("[abé]{1,4}", -5..0_i32, 0..20),
            text in "[abé]{0,24}",
        ) {
            let pieces: Vec<(&str, f32)> =
                pieces.iter().map(|(text, score)| (text.as_str(), *score as f32)).collect();
            let model = model(&pieces);
            prop_assert_eq!(encode(&model, &text), naive(&model, &text));
        }
    }
}
