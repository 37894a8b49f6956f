//! Trains a byte-level BPE tokenizer and writes it as a Hugging Face folder, which the engine and
//! transformers read.
//!
//! Every byte is a token, so no text is unknown; `<|endoftext|>` is token 0 and ends documents. Counting
//! and merging are the work of the `tokenizers` crate. Memory holds the distinct words of the corpus.

use std::path::{Path, PathBuf};

use bitnet_quant::convert::NewFile;
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use crate::data::{DocumentReader, Item};
use crate::error::{Error, Result};

/// The token that ends a document unless another is chosen.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Bytes, and the token that ends a document: no vocabulary is smaller.
const LEAST_VOCABULARY: usize = 257;
/// Largest vocabulary worth training here.
const MOST_VOCABULARY: usize = 1 << 20;
/// Longest token, in characters: keeps ruled lines and the like out of the vocabulary.
const LONGEST_TOKEN: usize = 32;

type Bpe = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// What tokenizer to train.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerOptions {
    /// Tokens, bytes and the end of a document included.
    pub vocab_size: usize,
    /// Pairs seen less often are not merged.
    pub min_frequency: u64,
    /// Text of the token that ends a document; a line of it divides documents of plain text.
    pub end_of_text: String,
}

impl TokenizerOptions {
    /// A vocabulary of this size.
    pub fn new(vocab_size: usize) -> Self {
        Self { vocab_size, min_frequency: 2, end_of_text: END_OF_TEXT.into() }
    }
}

/// What was trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainedTokenizer {
    /// Tokens; fewer than asked for where the text has no more pairs to merge.
    pub vocab_size: usize,
    /// Bytes of text it was trained on.
    pub text_bytes: u64,
}

/// Trains a tokenizer on files and writes `tokenizer.json` and `tokenizer_config.json` into the folder
/// `out`. `progress` hears the bytes of text read and may return `false` to stop.
///
/// # Errors
/// A vocabulary out of range, files that cannot be read or hold no text, [`Error::Stopped`].
pub fn train_tokenizer(
    files: &[PathBuf],
    options: &TokenizerOptions,
    out: &Path,
    force: bool,
    progress: &mut (dyn FnMut(u64) -> bool + Send),
) -> Result<TrainedTokenizer> {
    let TokenizerOptions { vocab_size, min_frequency, ref end_of_text } = *options;
    if !(LEAST_VOCABULARY..=MOST_VOCABULARY).contains(&vocab_size) {
        let expected = format!("{LEAST_VOCABULARY} to {MOST_VOCABULARY} tokens");
        return Err(Error::input("vocab_size", expected, vocab_size));
    }
    if end_of_text.is_empty() {
        return Err(Error::input("end of text", "a text for the token", "none"));
    }
    // Known before the long work: what is in the way, and what cannot be read.
    let json = NewFile::create(&in_folder(out, "tokenizer.json")?, force)?;
    let settings = NewFile::create(&in_folder(out, "tokenizer_config.json")?, force)?;
    for file in files {
        DocumentReader::open(file, None)?;
    }
    let special = AddedToken::from(end_of_text.clone(), true);
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(min_frequency)
        .max_token_length(Some(LONGEST_TOKEN))
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![special])
        .build();
    let mut bpe: Bpe = TokenizerImpl::new(BPE::default());
    // Words as GPT-2 cuts them; no space is added to a text.
    let words = ByteLevel::new(false, true, true);
    bpe.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(words)));
    bpe.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())));

    let mut texts = Texts {
        files: files.iter(),
        reader: None,
        separator: end_of_text,
        queue: Vec::new(),
        read: 0,
        progress,
        error: None,
    };
    let trained = bpe.train(&mut trainer, &mut texts);
    let (text_bytes, error) = (texts.read, texts.error.take());
    if let Some(error) = error {
        return Err(error);
    }
    trained.map_err(|error| Error::input("tokenizer", "text to merge", error))?;
    if text_bytes == 0 {
        return Err(Error::input("training text", "some text", "none"));
    }
    write(&bpe, end_of_text, json, settings)?;
    Ok(TrainedTokenizer { vocab_size: bpe.get_vocab_size(true), text_bytes })
}

fn in_folder(folder: &Path, name: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, "create", error))?;
    Ok(folder.join(name))
}

fn write(bpe: &Bpe, end: &str, mut json: NewFile, mut settings: NewFile) -> Result<()> {
    let text = bpe.to_string(true).map_err(|error| Error::input("tokenizer", "JSON", error))?;
    json.write(text.as_bytes())?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "add_bos_token": false,
        "clean_up_tokenization_spaces": false,
    });
    settings.write(format!("{config:#}\n").as_bytes())?;
    json.commit()?;
    Ok(settings.commit()?)
}

/// The texts of all files, one after another. Ends at the first error and keeps it.
struct Texts<'a> {
    files: std::slice::Iter<'a, PathBuf>,
    reader: Option<DocumentReader>,
    separator: &'a str,
    /// Texts of a conversation, last first.
    queue: Vec<String>,
    read: u64,
    progress: &'a mut (dyn FnMut(u64) -> bool + Send),
    error: Option<Error>,
}

impl Texts<'_> {
    fn next_text(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(text) = self.queue.pop() {
                self.read += text.len() as u64;
                return match (self.progress)(self.read) {
                    true => Ok(Some(text)),
                    false => Err(Error::Stopped),
                };
            }
            let Some(reader) = &mut self.reader else {
                let Some(file) = self.files.next() else { return Ok(None) };
                self.reader = Some(DocumentReader::open(file, Some(self.separator))?);
                continue;
            };
            match reader.next().transpose()? {
                None => self.reader = None,
                Some(Item::Text { text, .. }) => self.queue.push(text),
                Some(Item::Chat(messages)) => {
                    self.queue.extend(messages.into_iter().rev().map(|message| message.content));
                }
            }
        }
    }
}

impl Iterator for Texts<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        if self.error.is_some() {
            return None;
        }
        self.next_text().unwrap_or_else(|error| {
            self.error = Some(error);
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Encoder;
    use bitnet_inference::tokenizer::EncodeOptions;
    use bitnet_quant::text::TextAssets;

    fn corpus(folder: &Path) -> PathBuf {
        let path = folder.join("tales.txt");
        let tale =
            |i: u32| format!("The {i}th fox said: \"Where is the hen?\"\nNo hen answered.\n");
        let tales: Vec<String> = (0..200).map(tale).collect();
        std::fs::write(&path, tales.join("<|endoftext|>\n")).unwrap();
        path
    }

    #[test]
    fn the_engine_reads_what_was_trained() {
        let folder = tempfile::tempdir().unwrap();
        let (files, out) = ([corpus(folder.path())], folder.path().join("tok"));
        let mut heard = 0;
        let options = TokenizerOptions::new(300);
        let trained = train_tokenizer(&files, &options, &out, false, &mut |bytes| {
            heard = bytes;
            true
        })
        .unwrap();
        assert_eq!((trained.vocab_size, trained.text_bytes), (300, heard));
        let assets = TextAssets::from_folder(&out).unwrap();
        let encoder = Encoder::new(&assets).unwrap();
        let tokenizer = encoder.tokenizer();
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos_ids()), (300, &[0][..]));
        let text = "The fox said, and no hen: naïve 狐!\n\n  <|endoftext|>";
        let ids = tokenizer.encode(text, EncodeOptions::TEXT).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), text);
        assert!(!ids.contains(&0), "what a text says is text");
        let known = tokenizer.encode(" fox said", EncodeOptions::TEXT).unwrap();
        assert!(known.len() <= 3, "{known:?}");
        // The same files give the same tokenizer.
        let again = folder.path().join("again");
        train_tokenizer(&files, &options, &again, false, &mut |_| true).unwrap();
        let read = |folder: &Path| std::fs::read(folder.join("tokenizer.json")).unwrap();
        assert_eq!(read(&out), read(&again));
    }

    #[test]
    fn nothing_is_replaced_or_left_half_done() {
        let folder = tempfile::tempdir().unwrap();
        let (files, out) = ([corpus(folder.path())], folder.path().join("tok"));
        let options = TokenizerOptions::new(300);
        let stopped = train_tokenizer(&files, &options, &out, false, &mut |_| false).unwrap_err();
        assert!(matches!(stopped, Error::Stopped));
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
        train_tokenizer(&files, &options, &out, false, &mut |_| true).unwrap();
        let error = train_tokenizer(&files, &options, &out, false, &mut |_| true).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
        train_tokenizer(&files, &options, &out, true, &mut |_| true).unwrap();
    }

    #[test]
    fn nonsense_is_refused_before_any_work() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("tok");
        let train = |files: &[PathBuf], size| {
            let options = TokenizerOptions::new(size);
            train_tokenizer(files, &options, &out, true, &mut |_| true).unwrap_err().to_string()
        };
        let corpus = corpus(folder.path());
        assert!(train(&[corpus], 100).contains("vocab_size: expected 257 to"));
        assert!(train(&["gone.txt".into()], 300).contains("gone.txt: cannot open"));
        assert!(train(&[], 300).contains("expected some text"));
    }
}
