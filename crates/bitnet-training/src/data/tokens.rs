//! Token files: a corpus tokenized once, then read in place.
//!
//! ```text
//! "BNTOKEN1" | u32 u32 u32 …        little-endian; bit 31: seen, but not to be predicted
//! ```
//!
//! The file is mapped, so a corpus larger than memory is no trouble. Beside it stands a JSON file with
//! what the corpus was: its files, their SHA-256, counts. A token file is found again by its sources
//! (path, length, time of change) and by the tokenizer, and made anew when one of them differs.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use bitnet_inference::tokenizer::{AddSpecial, EncodeOptions, Tokenizer};
use bitnet_inference::{ChatOptions, ChatTemplate, Message};
use bitnet_quant::convert::NewFile;
use bitnet_quant::mapping::{FileBytes, open_mapped};
use bitnet_quant::text::{TextAssets, TokenizerSource};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::text::{DocumentReader, Item, Seen, hex};
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"BNTOKEN1";
/// Marks a token the model sees and need not predict: what a user said.
const UNCOUNTED: u32 = 1 << 31;
/// Pieces of text tokenized together.
const PIECES: usize = 64;
/// Pieces are also tokenized once they have this many bytes together: lines of JSON may be long.
const PIECE_BYTES: u64 = 4 << 20;
/// A template may merge this many tokens at the border of two messages; more is another text.
const SEAM: usize = 8;

/// Makes tokens of documents and conversations.
pub struct Encoder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    eos: u32,
    /// Tells tokenizers apart.
    fingerprint: String,
}

impl Encoder {
    /// The tokenizer and the chat template of a model.
    ///
    /// # Errors
    /// A model without a tokenizer, or whose tokenizer has no token that ends a text.
    pub fn new(assets: &TextAssets) -> Result<Self> {
        let tokenizer = Tokenizer::from_assets(assets)
            .map_err(|error| Error::input("tokenizer", "one that can be read", error))?;
        let template = match &assets.chat_template {
            Some(source) => ChatTemplate::new(source, &assets.special_tokens)
                .map_err(|error| Error::input("chat template", "valid Jinja", error))?,
            None => ChatTemplate::plain(),
        };
        let eos = *tokenizer.eos_ids().first().ok_or_else(|| {
            Error::input("tokenizer", "a token that ends a text (eos_token)", "none")
        })?;
        let mut hash = Sha256::new();
        match &assets.tokenizer {
            Some(TokenizerSource::HuggingFace(json)) => hash.update(json),
            Some(TokenizerSource::Gguf(vocabulary)) => hash.update(format!("{vocabulary:?}")),
            None => {}
        }
        hash.update(format!("{:?} {:?} {eos}", assets.chat_template, assets.add_bos));
        Ok(Self { tokenizer, template, eos, fingerprint: hex(&hash.finalize()) })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tells tokenizers and chat templates apart.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Tokens of a text alone, with the token that ends it.
    pub fn document(&self, text: &str) -> Result<Vec<u32>> {
        self.text(text, true, true)
    }

    /// Tokens of a piece of a document.
    fn text(&self, text: &str, starts: bool, ends: bool) -> Result<Vec<u32>> {
        let options = if starts { EncodeOptions::PROMPT } else { EncodeOptions::TEXT };
        let mut ids = self.encode(text, options)?;
        if ends {
            ids.push(self.eos);
        }
        Ok(ids)
    }

    fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        debug_assert!(options.add != AddSpecial::Both, "documents are ended by their reader");
        self.tokenizer
            .encode(text, options)
            .map_err(|error| Error::input("training text", "text the tokenizer takes", error))
    }

    /// Tokens of a conversation, marked where they are not the assistant's.
    fn chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let render = |upto: usize, asks: bool| {
            let options = ChatOptions { add_generation_prompt: asks, ..ChatOptions::default() };
            let tokens = self.template.encode(&self.tokenizer, &messages[..upto], &options);
            tokens.map_err(|e| Error::input("conversation", "one the chat template takes", e))
        };
        let mut ids = render(messages.len(), false)?;
        let answered = messages.last().is_some_and(|message| message.role == "assistant");
        if answered && ids.last() != Some(&self.eos) {
            ids.push(self.eos);
        }
        let mut marked: Vec<u32> = ids.iter().map(|id| id | UNCOUNTED).collect();
        for (turn, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let start = shared(&render(turn, true)?, &ids)?;
            let end = match turn + 1 == messages.len() {
                true => ids.len(),
                false => shared(&render(turn + 1, false)?, &ids)?,
            };
            if start < end {
                marked[start..end].copy_from_slice(&ids[start..end]);
            }
        }
        Ok(marked)
    }
}

/// How much of `part` begins `whole`, which should be all of it.
fn shared(part: &[u32], whole: &[u32]) -> Result<usize> {
    let same = part.iter().zip(whole).take_while(|(a, b)| a == b).count();
    match same + SEAM < part.len() {
        false => Ok(same),
        true => Err(Error::input(
            "chat template",
            "one that writes a conversation as the beginning of its continuation",
            "one that rewrites earlier messages, so that answers cannot be told from the rest",
        )),
    }
}

/// What a corpus was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensInfo {
    /// The files, in order.
    pub files: Vec<FileInfo>,
    /// Tokens, ends of documents included.
    pub tokens: u64,
    /// Tokens to be predicted: in conversations only those of the assistant.
    pub counted: u64,
    /// One more than the largest token id.
    pub ids_below: u32,
}

/// A file of a corpus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Its name, without folders.
    pub name: String,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of text in it.
    pub text_bytes: u64,
    /// Documents and conversations in it.
    pub documents: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

impl FileInfo {
    fn new(path: &Path, seen: Seen) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Seen { file_bytes, text_bytes, documents, sha256 } = seen;
        Self { name, file_bytes, text_bytes, documents, sha256 }
    }
}

/// The tokens of a corpus. Cloning it is cheap.
#[derive(Debug, Clone)]
pub struct Tokens {
    name: String,
    bytes: FileBytes,
    info: TokensInfo,
}

impl Tokens {
    /// Opens the token file of these sources in `folder`, or makes it. Plain text is divided by
    /// lines that are `separator`. `progress` hears the bytes of text read and may return `false` to
    /// stop.
    ///
    /// # Errors
    /// Sources that cannot be read or hold nothing; a full disk; [`Error::Stopped`].
    pub fn open_or_build(
        sources: &[PathBuf],
        separator: Option<&str>,
        encoder: &Encoder,
        folder: &Path,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Self> {
        let (name, key) = identify(sources, separator, encoder)?;
        let path = folder.join(format!("{key}.tokens"));
        let info_path = folder.join(format!("{key}.json"));
        if let Some(tokens) = Self::open(&name, &path, &info_path) {
            return Ok(tokens);
        }
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, "create", error))?;
        let info = build(sources, separator, encoder, &path, progress)?;
        if info.tokens == 0 {
            return Err(Error::input(name, "some text", "none"));
        }
        let mut file = NewFile::create(&info_path, true)?;
        file.write(&serde_json::to_vec_pretty(&info).map_err(Error::json)?)?;
        file.commit()?;
        Self::open(&name, &path, &info_path).ok_or_else(|| {
            let error = std::io::Error::other("the file changed while it was made");
            Error::io(&path, "read", error)
        })
    }

    /// A token file that is there and whole.
    fn open(name: &str, path: &Path, info_path: &Path) -> Option<Self> {
        let info: TokensInfo = serde_json::from_slice(&std::fs::read(info_path).ok()?).ok()?;
        let bytes = open_mapped(path).ok()?;
        let whole =
            bytes.starts_with(MAGIC) && (bytes.len() - MAGIC.len()) as u64 / 4 == info.tokens;
        whole.then(|| Self { name: name.to_owned(), bytes: bytes.slice(MAGIC.len()..), info })
    }

    /// What the corpus was.
    pub fn info(&self) -> &TokensInfo {
        &self.info
    }

    /// Its name for messages: that of its first file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.bytes.len() / 4
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the ids of `range` to `ids`, and for all but the first whether it counts to
    /// `counted`. Says whether any counts.
    pub(super) fn read(
        &self,
        range: Range<usize>,
        ids: &mut Vec<u32>,
        counted: &mut Vec<bool>,
    ) -> bool {
        let mut any = false;
        let stored = &self.bytes[range.start * 4..range.end * 4];
        for (i, bytes) in stored.chunks_exact(4).enumerate() {
            let stored = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            // The file may have been changed by others: an id stays inside what was checked.
            ids.push((stored & !UNCOUNTED).min(self.info.ids_below.saturating_sub(1)));
            if i > 0 {
                let counts = stored & UNCOUNTED == 0;
                any |= counts;
                counted.push(counts);
            }
        }
        any
    }

    /// Tokens that are in no file.
    #[cfg(test)]
    pub(super) fn in_memory(name: &str, ids: &[u32]) -> Self {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let counted = ids.iter().filter(|&&id| id & UNCOUNTED == 0).count() as u64;
        let ids_below = ids.iter().map(|id| (id & !UNCOUNTED) + 1).max().unwrap_or(0);
        let info = TokensInfo { files: Vec::new(), tokens: ids.len() as u64, counted, ids_below };
        Self { name: name.into(), bytes: bytes.into(), info }
    }
}

/// A name for people, and one for the token file.
fn identify(
    sources: &[PathBuf],
    separator: Option<&str>,
    encoder: &Encoder,
) -> Result<(String, String)> {
    let first = sources.first();
    let first = first.ok_or_else(|| Error::input("corpus", "at least one file", "none"))?;
    let mut hash = Sha256::new();
    hash.update(format!("{} {separator:?}", encoder.fingerprint));
    for path in sources {
        let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, "open", error))?;
        let absolute = std::path::absolute(path).map_err(|error| Error::io(path, "open", error))?;
        let changed =
            metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        hash.update(format!("\0{} {} {changed:?}", absolute.display(), metadata.len()));
    }
    let name = first.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = name.split('.').next().unwrap_or_default().to_owned();
    let key = hex(&hash.finalize());
    Ok((name, format!("{stem}-{}", &key[..16])))
}

fn build(
    sources: &[PathBuf],
    separator: Option<&str>,
    encoder: &Encoder,
    path: &Path,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<TokensInfo> {
    let mut file = NewFile::create(path, true)?;
    file.write(MAGIC)?;
    let mut info = TokensInfo { files: Vec::new(), tokens: 0, counted: 0, ids_below: 0 };
    let mut read = 0;
    for source in sources {
        let mut reader = DocumentReader::open(source, separator)?;
        let mut starts = true;
        loop {
            let items = next_pieces(&mut reader, PIECE_BYTES)?;
            if items.is_empty() {
                break;
            }
            let pieces: Vec<(bool, Item)> = items
                .into_iter()
                .map(|item| {
                    let first = std::mem::replace(
                        &mut starts,
                        !matches!(item, Item::Text { ends: false, .. }),
                    );
                    (first, item)
                })
                .collect();
            let encoded: Vec<Vec<u32>> = pieces
                .par_iter()
                .map(|(first, item)| match item {
                    Item::Text { text, ends } => encoder.text(text, *first, *ends),
                    Item::Chat(messages) => encoder.chat(messages),
                })
                .collect::<Result<_>>()?;
            for ids in &encoded {
                info.tokens += ids.len() as u64;
                for &id in ids {
                    info.counted += u64::from(id & UNCOUNTED == 0);
                    info.ids_below = info.ids_below.max((id & !UNCOUNTED) + 1);
                    file.writer()
                        .write_all(&id.to_le_bytes())
                        .map_err(|error| Error::io(path, "write", error))?;
                }
            }
            if !progress(read + reader.seen_bytes()) {
                return Err(Error::Stopped);
            }
        }
        let seen = reader.seen();
        read += seen.text_bytes;
        info.files.push(FileInfo::new(source, seen));
    }
    file.commit()?;
    Ok(info)
}

/// The next pieces of a file: [`PIECES`], or fewer with `enough` bytes.
fn next_pieces(reader: &mut DocumentReader, enough: u64) -> Result<Vec<Item>> {
    let (begun, mut items) = (reader.seen_bytes(), Vec::new());
    while items.len() < PIECES && reader.seen_bytes() - begun < enough {
        match reader.next().transpose()? {
            Some(item) => items.push(item),
            None => break,
        }
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_inference::builtin;

    fn encoder() -> Encoder {
        Encoder::new(builtin::checkpoint().unwrap().text()).unwrap()
    }

    fn all(tokens: &Tokens) -> (Vec<u32>, Vec<bool>) {
        let (mut ids, mut counted) = (Vec::new(), Vec::new());
        tokens.read(0..tokens.len(), &mut ids, &mut counted);
        (ids, counted)
    }

    #[test]
    fn a_corpus_is_made_once_and_again_when_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("tales.txt");
        std::fs::write(&source, "Once upon a time.\n<|endoftext|>\nThe end.\n").unwrap();
        let encoder = encoder();
        let eos = encoder.eos;
        let mut calls = 0;
        let mut open = || {
            let sources = [source.clone()];
            let cache = folder.path().join("tokens");
            Tokens::open_or_build(&sources, Some("<|endoftext|>"), &encoder, &cache, &mut |_| {
                calls += 1;
                true
            })
            .unwrap()
        };
        let tokens = open();
        let mut expected = encoder.document("Once upon a time.").unwrap();
        expected.extend(encoder.document("The end.").unwrap());
        assert_eq!(all(&tokens).0, expected);
        assert_eq!(expected.iter().filter(|&&id| id == eos).count(), 2);
        assert_eq!(
            (tokens.info().files[0].documents, tokens.info().counted),
            (2, tokens.info().tokens)
        );
        open();
        std::fs::write(&source, "Another text.").unwrap();
        assert_eq!(all(&open()).0, encoder.document("Another text.").unwrap());
        assert_eq!(calls, 2, "the second time it was found");
    }

    #[test]
    fn pieces_of_a_long_document_are_tokenized_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("book.txt");
        let book: String = (0..9000)
            .map(|i| {
                format!("\"Line {i},\" he said.  And so\ton it went.{}", ["\n", "\n\n"][i % 2])
            })
            .collect();
        let encoder = encoder();
        assert!(book.len() > 5 * (64 << 10));
        // Between lines that end with a letter, other systems' line breaks are a good place too.
        let windows: String = (0..12_000)
            .map(|i| format!("\"Line {i},\" he said\r\n{}", ["and so it went.\r\n", ""][i % 2]))
            .collect();
        for book in [book, windows] {
            std::fs::write(&source, &book).unwrap();
            let mut reader = DocumentReader::open(&source, None).unwrap();
            assert!(next_pieces(&mut reader, u64::MAX).unwrap().len() > 4);
            let sources = std::slice::from_ref(&source);
            let tokens =
                Tokens::open_or_build(sources, None, &encoder, folder.path(), &mut |_| true)
                    .unwrap();
            // The last line break of a document is not part of it.
            let text = book.strip_suffix('\n').unwrap();
            let text = text.strip_suffix('\r').unwrap_or(text);
            assert!(all(&tokens).0 == encoder.document(text).unwrap());
        }
    }

    #[test]
    fn few_long_pieces_are_held_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("long.jsonl");
        let line = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(200));
        std::fs::write(&source, line.repeat(100)).unwrap();
        let mut reader = DocumentReader::open(&source, None).unwrap();
        assert_eq!(next_pieces(&mut reader, 2500).unwrap().len(), 3);
        assert_eq!(next_pieces(&mut reader, u64::MAX).unwrap().len(), PIECES);
        assert_eq!(next_pieces(&mut reader, u64::MAX).unwrap().len(), 100 - PIECES - 3);
        assert!(next_pieces(&mut reader, u64::MAX).unwrap().is_empty());
    }

    #[test]
    fn only_answers_of_a_conversation_count() {
        let encoder = encoder();
        let messages = [
            Message::user("What is red?"),
            Message::assistant("A rose."),
            Message::user("And blue?"),
            Message::assistant("The sea."),
        ];
        let marked = encoder.chat(&messages).unwrap();
        let decode = |counts: bool| {
            let ids = marked.iter().filter(|&&id| (id & UNCOUNTED == 0) == counts);
            let ids: Vec<u32> = ids.map(|id| id & !UNCOUNTED).collect();
            encoder.tokenizer.decode(&ids, true)
        };
        assert_eq!(decode(true), " A rose.\n The sea.\n<|endoftext|>");
        assert_eq!(decode(false), "User: What is red?\nAssistant:User: And blue?\nAssistant:");
    }

    #[test]
    fn stopping_leaves_no_token_file() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("a.txt");
        std::fs::write(&source, "some text").unwrap();
        let cache = folder.path().join("tokens");
        let stopped =
            Tokens::open_or_build(&[source], None, &encoder(), &cache, &mut |_| false).unwrap_err();
        assert!(matches!(stopped, Error::Stopped));
        assert_eq!(std::fs::read_dir(cache).unwrap().count(), 0);
    }
}
