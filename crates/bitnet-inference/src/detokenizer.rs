//! Token ids to text, one at a time.
//!
//! A token may end in the middle of a character: its bytes are held back until the character is
//! complete, or until it is certain that it never will be; then they become U+FFFD. What all
//! steps return together is the text of all tokens, however they are grouped.

use crate::tokenizer::Tokenizer;

/// Turns one stream of tokens into text.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// The beginning of a character: at most three bytes.
    held: Vec<u8>,
    /// How many leading spaces are not part of the text.
    strip: usize,
    show_control: bool,
}

impl Detokenizer {
    /// For a text from its first token. Where encoding puts a space before the first word, it is
    /// taken away again.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self {
            strip: tokenizer.strip_start(),
            tokenizer: tokenizer.clone(),
            held: Vec::new(),
            show_control: false,
        }
    }

    /// For tokens that continue a text: a leading space is part of it.
    pub fn continuing(tokenizer: &Tokenizer) -> Self {
        Self { strip: 0, ..Self::new(tokenizer) }
    }

    /// For the answer to a prompt: it continues the prompt's text, unless that ends with a control
    /// token, as a chat's does, or is empty.
    pub fn after(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        match prompt.last() {
            Some(&id) if !tokenizer.is_control(id) => Self::continuing(tokenizer),
            _ => Self::new(tokenizer),
        }
    }

    /// Gives control tokens their names as text instead of leaving them out.
    #[must_use]
    pub fn show_control(mut self) -> Self {
        self.show_control = true;
        self
    }

    /// The text that is certain after this token.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_control(id) && !self.show_control {
            return String::new();
        }
        let mut bytes = self.tokenizer.token_bytes(id);
        while self.strip > 0 && !bytes.is_empty() {
            match bytes.strip_prefix(b" ") {
                Some(rest) => {
                    bytes = rest;
                    self.strip -= 1;
                }
                None => self.strip = 0,
            }
        }
        self.held.extend_from_slice(bytes);
        self.take_certain()
    }

    /// Takes from the held bytes all whose characters are certain.
    fn take_certain(&mut self) -> String {
        let mut text = String::new();
        let mut taken = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            taken += chunk.valid().len();
            let broken = chunk.invalid();
            if broken.is_empty() {
                break;
            }
            // At the end of the bytes a beginning may still be completed.
            let is_last = taken + broken.len() == self.held.len();
            if is_last && std::str::from_utf8(broken).is_err_and(|e| e.error_len().is_none()) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            taken += broken.len();
        }
        self.held.drain(..taken);
        text
    }

    /// Ends the text: the beginning of a character that never came becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}
