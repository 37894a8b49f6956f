//! Finds stop strings in text that arrives in pieces.
//!
//! Text that may be the beginning of a stop string is held back until it is clear that it is not;
//! everything else is released at once. What is found does not depend on how the text was cut:
//! the stop string that is complete first ends the text, of several complete at once the longest.
//! Knows text only; tokens may end anywhere in it.

/// Watches one stream of text for stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    held: String,
    found: Option<usize>,
}

/// One stop string with the state of its Knuth–Morris–Pratt automaton.
#[derive(Debug, Clone)]
struct Stop {
    text: Vec<u8>,
    /// For each length of a matched beginning: its longest proper suffix that is a beginning too.
    fallback: Vec<usize>,
    /// How many bytes of the stop string the stream ends with.
    matched: usize,
}

impl StopMatcher {
    /// A matcher for these stop strings; empty ones are ignored.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let stops = stops.iter().map(AsRef::as_ref).map(Stop::new).collect();
        Self { stops, held: String::new(), found: None }
    }

    /// Takes the next piece of the stream and returns what is now known to belong to the text.
    /// After a stop string was found, nothing does.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        let start = self.held.len();
        self.held.push_str(piece);
        for end in start..self.held.len() {
            let byte = self.held.as_bytes()[end];
            let complete = self
                .stops
                .iter_mut()
                .enumerate()
                .filter_map(|(i, stop)| stop.step(byte).then_some((stop.text.len(), i)))
                // The longest; of equals the first.
                .max_by_key(|&(length, i)| (length, std::cmp::Reverse(i)));
            if let Some((length, i)) = complete {
                self.found = Some(i);
                self.held.truncate(end + 1 - length);
                return std::mem::take(&mut self.held);
            }
        }
        let undecided = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - undecided);
        std::mem::replace(&mut self.held, rest)
    }

    /// Index of the stop string that ended the text.
    pub fn found(&self) -> Option<usize> {
        self.found
    }

    /// Ends the stream: what was held back belongs to the text after all.
    pub fn finish(&mut self) -> String {
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        std::mem::take(&mut self.held)
    }
}

impl Stop {
    fn new(text: &str) -> Self {
        let text = text.as_bytes().to_vec();
        let mut fallback = vec![0; text.len() + 1];
        let mut length = 0;
        for end in 1..text.len() {
            while length > 0 && text[end] != text[length] {
                length = fallback[length];
            }
            if text[end] == text[length] {
                length += 1;
            }
            fallback[end + 1] = length;
        }
        Self { text, fallback, matched: 0 }
    }

    /// Reads one byte; true if the stop string is complete.
    fn step(&mut self, byte: u8) -> bool {
        if self.text.is_empty() {
            return false;
        }
        while self.matched > 0 && self.text[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        if self.text[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.text.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>) {
        let mut matcher = StopMatcher::new(stops);
        let mut out: Vec<String> = pieces.iter().map(|piece| matcher.push(piece)).collect();
        out.push(matcher.finish());
        (out, matcher.found())
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_removed() {
        let (out, found) = run(&["User:"], &["Hi", "\nUs", "er", ": more"]);
        assert_eq!((out.concat().as_str(), found), ("Hi\n", Some(0)));
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let (out, found) = run(&["<|end|>"], &["a <", "|en", "tirely", " <|"]);
        assert_eq!(out, ["a ", "", "<|entirely", " ", "<|"]);
        assert_eq!(found, None);
    }

    #[test]
    fn the_first_complete_stop_wins_and_the_longest_of_a_tie() {
        assert_eq!(run(&["abc", "b"], &["xabc"]), (vec!["xa".into(), "".into()], Some(1)));
        assert_eq!(run(&["b", "ab"], &["xab"]), (vec!["x".into(), "".into()], Some(1)));
        assert_eq!(run(&["ab", "ab"], &["ab"]).1, Some(0));
    }

    #[test]
    fn a_character_is_never_split() {
        // 'é' is c3 a9 and 'è' is c3 a8: they share a byte with the stop string's beginning.
        let (out, found) = run(&["né"], &["n", "è", "n", "é"]);
        assert_eq!((out.concat().as_str(), found), ("nè", Some(0)));
    }

    #[test]
    fn nothing_follows_a_stop() {
        let mut matcher = StopMatcher::new(&["."]);
        assert_eq!(matcher.push("a.b"), "a");
        assert_eq!(matcher.push("c"), "");
        assert_eq!(matcher.finish(), "");
        assert_eq!(matcher.found(), Some(0));
    }

    #[test]
    fn without_stop_strings_text_passes_through() {
        assert_eq!(run(&[], &["a", "b"]).0, ["a", "b", ""]);
        assert_eq!(run(&[""], &["a"]), (vec!["a".into(), "".into()], None));
    }

    /// The earliest end of a stop string and, among those that end there, the longest.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let ending = |(i, stop): (usize, &String)| {
                text.as_bytes()[..end].ends_with(stop.as_bytes()).then_some((stop.len(), i))
            };
            let best = stops.iter().enumerate().filter_map(ending);
            if let Some((length, i)) = best.max_by_key(|&(length, i)| (length, usize::MAX - i)) {
                return (text[..end - length].to_owned(), Some(i));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn equals_the_search_in_the_whole_text(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,5}", 0..8),
        ) {
            let (expected, found) = naive(&stops, &pieces.concat());
            let mut matcher = StopMatcher::new(&stops);
            let mut out = String::new();
            for piece in &pieces {
                out.push_str(&matcher.push(piece));
                // What is released early is never taken back.
                prop_assert!(expected.starts_with(&out));
            }
            out.push_str(&matcher.finish());
            prop_assert_eq!((out, matcher.found()), (expected, found));
        }
    }
}
