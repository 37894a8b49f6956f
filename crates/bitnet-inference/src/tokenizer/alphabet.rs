//! The byte alphabet of GPT-2: every byte has a printable character, so that a vocabulary of texts
//! can hold tokens that are no text.

/// First character of the 68 bytes that have no printable character of their own.
const SUBSTITUTES: u32 = 0x100;

/// Whether a byte stands for itself, as a Latin-1 character.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character of each byte.
const CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let mut substitute = SUBSTITUTES;
    let mut byte = 0;
    while byte < 256 {
        chars[byte] = if matches!(byte as u8, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            byte as u8 as char
        } else {
            substitute += 1;
            match char::from_u32(substitute - 1) {
                Some(c) => c,
                None => '\0',
            }
        };
        byte += 1;
    }
    chars
};

/// Appends the characters of `bytes`.
pub(crate) fn push_chars(bytes: &[u8], out: &mut String) {
    out.extend(bytes.iter().map(|&byte| CHARS[byte as usize]));
}

/// The bytes that `text` stands for; `None` if a character is not of the alphabet.
pub(super) fn bytes(text: &str) -> Option<Vec<u8>> {
    text.chars().map(byte).collect()
}

fn byte(c: char) -> Option<u8> {
    if let Ok(byte) = u8::try_from(c) {
        return is_printable(byte).then_some(byte);
    }
    let index = (c as u32).checked_sub(SUBSTITUTES)?;
    // The substituted bytes in order: 0–32, 127–160, 173.
    match index {
        0..=32 => Some(index as u8),
        33..=66 => Some((index - 33) as u8 + 127),
        67 => Some(173),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection() {
        for value in 0..=255_u8 {
            let mut text = String::new();
            push_chars(&[value], &mut text);
            assert_eq!(bytes(&text), Some(vec![value]));
        }
        assert_eq!(CHARS.iter().collect::<std::collections::HashSet<_>>().len(), 256);
    }

    #[test]
    fn well_known_characters() {
        let mut text = String::new();
        push_chars(" \n\té".as_bytes(), &mut text);
        assert_eq!(text, "ĠĊĉÃ©");
        assert_eq!(bytes("Ġhello"), Some(b" hello".to_vec()));
        for outside in ["a b", "日", "\u{144}", "\u{a0}", "\n"] {
            assert_eq!(bytes(outside), None);
        }
    }
}
