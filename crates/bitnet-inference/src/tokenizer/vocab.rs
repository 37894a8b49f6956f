//! What each token stands for, in bytes, and of what kind it is.

use super::error::TokenizerError;

/// Most token ids. The largest vocabularies have half a million; the table has a row for each.
pub(super) const MAX_TOKENS: usize = 1 << 22;
/// Longest token in bytes.
pub(super) const MAX_TOKEN_BYTES: usize = 1 << 14;

/// How a token takes part in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Kind {
    /// No token has this id.
    #[default]
    Unused,
    /// Stands for its bytes.
    Text,
    /// Steers the model: begins, ends or divides. Not part of the text that is shown.
    Control,
}

/// All tokens by id.
#[derive(Debug, Clone, Default)]
pub(super) struct Vocabulary {
    bytes: Vec<u8>,
    /// Where each token's bytes end; they begin where the previous token's end.
    ends: Vec<usize>,
    kinds: Vec<Kind>,
}

impl Vocabulary {
    /// The table of `tokens`: for each id its bytes and kind, in any order. A later entry of the
    /// same id replaces an earlier one.
    pub(super) fn new(tokens: Vec<(u32, Vec<u8>, Kind)>) -> Result<Self, TokenizerError> {
        let size = tokens.iter().map(|(id, ..)| *id as usize + 1).max().unwrap_or(0);
        if size > MAX_TOKENS {
            let expected = format!("ids below {MAX_TOKENS}");
            return Err(TokenizerError::invalid("vocabulary", expected, size - 1));
        }
        let mut rows = vec![(Vec::new(), Kind::Unused); size];
        for (id, bytes, kind) in tokens {
            if bytes.len() > MAX_TOKEN_BYTES {
                let what = format!("token {id}");
                let expected = format!("at most {MAX_TOKEN_BYTES} bytes");
                return Err(TokenizerError::invalid(what, expected, bytes.len()));
            }
            rows[id as usize] = (bytes, kind);
        }
        let mut vocabulary = Self::default();
        for (bytes, kind) in rows {
            vocabulary.bytes.extend(bytes);
            vocabulary.ends.push(vocabulary.bytes.len());
            vocabulary.kinds.push(kind);
        }
        Ok(vocabulary)
    }

    /// One more than the largest id.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; none for ids that are no token's.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |previous| self.ends[previous]);
        &self.bytes[start..end]
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or_default()
    }
}

/// The byte that a text like `<0x0A>` stands for.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_may_come_in_any_order_and_leave_holes() {
        let text = |id, text: &str| (id, text.as_bytes().to_vec(), Kind::Text);
        let vocabulary =
            Vocabulary::new(vec![text(3, "c"), text(0, "a"), (1, b"<s>".to_vec(), Kind::Control)])
                .unwrap();
        assert_eq!(vocabulary.len(), 4);
        assert_eq!(vocabulary.bytes(0), b"a");
        assert_eq!((vocabulary.bytes(1), vocabulary.kind(1)), (&b"<s>"[..], Kind::Control));
        assert_eq!((vocabulary.bytes(2), vocabulary.kind(2)), (&b""[..], Kind::Unused));
        assert_eq!(vocabulary.bytes(3), b"c");
        assert_eq!((vocabulary.bytes(4), vocabulary.kind(u32::MAX)), (&b""[..], Kind::Unused));
    }

    #[test]
    fn sizes_are_bounded() {
        Vocabulary::new(vec![(u32::MAX, Vec::new(), Kind::Text)]).unwrap_err();
        Vocabulary::new(vec![(0, vec![0; MAX_TOKEN_BYTES + 1], Kind::Text)]).unwrap_err();
    }

    #[test]
    fn byte_tokens_are_two_hexadecimal_digits() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xff>"), Some(255));
        for no in ["<0x-1>", "<0x+1>", "<0xZZ>", "<0x1>", "<0x001>", "<0xé>", "0x0A", "<0x", ""] {
            assert_eq!(byte_token(no), None, "{no}");
        }
    }
}
