//! Reads a SentencePiece `tokenizer.model`, which some checkpoints ship instead of
//! `tokenizer.json`. Of its protocol buffer only the pieces and one flag matter:
//!
//! ```text
//! ModelProto      field 1: SentencePiece, once for each token     field 3: NormalizerSpec
//! SentencePiece   field 1: text   field 2: f32 score   field 3: kind, as GGUF numbers them
//! NormalizerSpec  field 3: whether a space is put before the text (default: it is)
//! TrainerSpec     field 3 (of ModelProto: 2): kind of model, 2 is BPE
//! ```

use crate::error::{Error, Result};
use crate::text::GgufVocabulary;

/// What a field holds.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

/// Reads the vocabulary. Token ids are the positions of the pieces.
pub(super) fn read(bytes: &[u8]) -> Result<GgufVocabulary> {
    let mut vocabulary = GgufVocabulary { model: "llama".into(), ..Default::default() };
    let mut kind_of_model = 1; // unigram is the format's default
    fields(bytes, &mut |field, value| {
        match (field, value) {
            (1, Value::Bytes(piece)) => read_piece(piece, &mut vocabulary)?,
            (2, Value::Bytes(trainer)) => fields(trainer, &mut |field, value| {
                if let (3, Value::Number(kind)) = (field, value) {
                    kind_of_model = kind;
                }
                Ok(())
            })?,
            (3, Value::Bytes(normalizer)) => fields(normalizer, &mut |field, value| {
                if let (3, Value::Number(flag)) = (field, value) {
                    vocabulary.add_space_prefix = Some(flag != 0);
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    if vocabulary.tokens.is_empty() {
        return Err(Error::missing("a SentencePiece vocabulary"));
    }
    if kind_of_model != 2 {
        return Err(Error::unsupported("SentencePiece model type", kind_of_model, "2 (BPE)"));
    }
    Ok(vocabulary)
}

fn read_piece(piece: &[u8], vocabulary: &mut GgufVocabulary) -> Result<()> {
    let (mut text, mut score, mut kind) = (&[][..], 0.0, 1);
    fields(piece, &mut |field, value| {
        match (field, value) {
            (1, Value::Bytes(bytes)) => text = bytes,
            (2, Value::Fixed32(bytes)) => score = f32::from_le_bytes(bytes),
            (3, Value::Number(number)) => kind = number,
            _ => {}
        }
        Ok(())
    })?;
    let id = vocabulary.tokens.len();
    let text = std::str::from_utf8(text)
        .map_err(|e| Error::malformed(format!("text of piece {id}"), "UTF-8", e))?;
    let kind = match i32::try_from(kind) {
        Ok(kind @ 1..=6) => kind,
        _ => return Err(Error::malformed(format!("kind of piece {id}"), "1 to 6", kind)),
    };
    if kind == 2 && vocabulary.unk_token_id.is_none() {
        vocabulary.unk_token_id = u32::try_from(id).ok();
    }
    vocabulary.tokens.push(text.to_owned());
    vocabulary.scores.push(score);
    vocabulary.token_types.push(kind);
    Ok(())
}

/// Calls `each` for the fields of a message, in order.
fn fields<'a>(
    mut bytes: &'a [u8],
    each: &mut dyn FnMut(u64, Value<'a>) -> Result<()>,
) -> Result<()> {
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut bytes)?),
            1 => {
                take(&mut bytes, 8)?;
                continue; // no field that matters is 8 bytes wide
            }
            2 => {
                let len = varint(&mut bytes)?;
                Value::Bytes(take(&mut bytes, len)?)
            }
            5 => Value::Fixed32(take(&mut bytes, 4)?.try_into().expect("four bytes were taken")),
            other => return Err(Error::malformed("wire type", "0, 1, 2 or 5", other)),
        };
        each(tag >> 3, value)?;
    }
    Ok(())
}

fn take<'a>(bytes: &mut &'a [u8], len: u64) -> Result<&'a [u8]> {
    let split = usize::try_from(len).ok().and_then(|len| bytes.split_at_checked(len));
    let Some((taken, rest)) = split else {
        return Err(Error::malformed("length of a field", format!("at most {}", bytes.len()), len));
    };
    *bytes = rest;
    Ok(taken)
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(Error::malformed("number", "at most 10 bytes", "more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `<unk>` (kind 2), `▁a` with score −1.5, byte token `<0x0A>`; BPE; no space prefix.
    fn sample() -> Vec<u8> {
        let mut bytes = vec![0x0A, 9, 0x0A, 5];
        bytes.extend(b"<unk>");
        bytes.extend([0x18, 2]);
        bytes.extend([0x0A, 11, 0x0A, 4]);
        bytes.extend("▁a".as_bytes());
        bytes.push(0x15);
        bytes.extend((-1.5f32).to_le_bytes());
        bytes.extend([0x0A, 10, 0x0A, 6]);
        bytes.extend(b"<0x0A>");
        bytes.extend([0x18, 6]);
        bytes.extend([0x12, 2, 0x18, 2]); // trainer: model type 2
        bytes.extend([0x1A, 2, 0x18, 0]); // normalizer: no space prefix
        bytes
    }

    #[test]
    fn pieces_scores_and_kinds_are_read() {
        let vocabulary = read(&sample()).unwrap();
        assert_eq!(vocabulary.tokens, ["<unk>", "▁a", "<0x0A>"]);
        assert_eq!(vocabulary.scores, [0.0, -1.5, 0.0]);
        assert_eq!(vocabulary.token_types, [2, 1, 6]);
        assert_eq!((vocabulary.unk_token_id, vocabulary.add_space_prefix), (Some(0), Some(false)));
    }

    #[test]
    fn damage_is_an_error_not_a_panic() {
        let whole = sample();
        for len in 0..whole.len() {
            let _ = read(&whole[..len]); // a cut between fields may leave a readable file
            let mut flipped = whole.clone();
            for bit in 0..8 {
                flipped[len] ^= 1 << bit;
                let _ = read(&flipped);
            }
        }
        assert!(read(&[]).is_err());
        assert!(read(&[0xFF; 32]).unwrap_err().to_string().contains("number"));
        assert!(read(&[0x0A, 0xFF, 0xFF, 0xFF, 0x7F]).unwrap_err().to_string().contains("length"));
        let unigram = [&whole[..whole.len() - 8], &[0x12, 2, 0x18, 1]].concat();
        assert!(read(&unigram).unwrap_err().to_string().contains("SentencePiece model type 1"));
    }
}
