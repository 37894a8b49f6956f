//! Reads documents from files: `.txt` (also `.md`), `.jsonl`, and both with `.xz` behind.
//!
//! Plain text comes in pieces, cut between lines, so that a book of any length passes through a
//! bounded buffer. In plain text a line that is the separator ends a document. A line of JSON is a
//! document, `{"text": …}`, or a conversation, `{"messages": [{"role": …, "content": …}]}`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bitnet_inference::Message;
use lzma_rust2::XzReader;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A piece of plain text grows to this before it is cut at the next good place.
const PIECE: usize = 64 << 10;
/// Where no good place comes, a piece is cut at the end of a line once it has this many bytes.
const LONGEST_PIECE: usize = 1 << 20;
/// The longest line read.
const LONGEST_LINE: u64 = 32 << 20;
/// Bytes read from a file at a time.
const BUFFER: usize = 256 << 10;

/// What comes out of a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// Text of a document.
    Text {
        /// The text, or the next part of it.
        text: String,
        /// Whether the document ends here.
        ends: bool,
    },
    /// A conversation.
    Chat(Vec<Message>),
}

/// What a file was, known once it has been read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of its text, unpacked; of JSON lines, the bytes of the texts in them.
    pub text_bytes: u64,
    /// Documents and conversations in it.
    pub documents: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    JsonLines,
}

/// Documents of one file, in order. An iterator that ends after its first error.
pub struct DocumentReader {
    path: PathBuf,
    format: Format,
    separator: Option<String>,
    source: Box<dyn BufRead + Send>,
    hash: Arc<Mutex<Hashed>>,
    line: Vec<u8>,
    line_number: u64,
    pending: String,
    in_document: bool,
    text_bytes: u64,
    documents: u64,
    done: bool,
}

#[derive(Deserialize)]
struct JsonLine {
    text: Option<String>,
    messages: Option<Vec<Message>>,
}

impl DocumentReader {
    /// Opens a file. A line that is `separator` divides documents of plain text.
    ///
    /// # Errors
    /// A file that cannot be opened, or whose name does not say what it is.
    pub fn open(path: impl AsRef<Path>, separator: Option<&str>) -> Result<Self> {
        let path = path.as_ref();
        let (format, _) = format_of(path)?;
        let (source, hash) = open_unpacked(path)?;
        Ok(Self {
            path: path.to_owned(),
            format,
            separator: separator.map(str::to_owned),
            source,
            hash,
            line: Vec::new(),
            line_number: 0,
            pending: String::new(),
            in_document: false,
            text_bytes: 0,
            documents: 0,
            done: false,
        })
    }

    /// What was seen; complete once the iterator has ended without an error.
    pub fn seen(&self) -> Seen {
        let hash = self.hash.lock().unwrap_or_else(PoisonError::into_inner);
        Seen {
            file_bytes: hash.bytes,
            text_bytes: self.text_bytes,
            documents: self.documents,
            sha256: hex(&hash.state.clone().finalize()),
        }
    }

    /// Bytes of text read so far.
    pub(super) fn seen_bytes(&self) -> u64 {
        self.text_bytes
    }

    fn next_item(&mut self) -> Result<Option<Item>> {
        match self.format {
            Format::Text => self.next_text(),
            Format::JsonLines => self.next_json(),
        }
    }

    fn next_text(&mut self) -> Result<Option<Item>> {
        while self.read_line()? {
            let line = self.line_text()?;
            let is_separator =
                self.separator.as_deref().is_some_and(|separator| line.trim_end() == separator);
            if is_separator {
                self.text_bytes += self.line.len() as u64;
                if let Some(item) = self.end_document() {
                    return Ok(Some(item));
                }
                continue;
            }
            let cut = match self.pending.len() {
                LONGEST_PIECE.. => Some(self.pending.len()),
                PIECE.. => seam(&self.pending, line),
                _ => None,
            };
            let line = line.to_owned();
            self.text_bytes += line.len() as u64;
            let rest = cut.map(|cut| self.pending.split_off(cut) + &line);
            if let Some(rest) = rest {
                self.in_document = true;
                let text = std::mem::replace(&mut self.pending, rest);
                return Ok(Some(Item::Text { text, ends: false }));
            }
            self.pending.push_str(&line);
        }
        Ok(self.end_document())
    }

    /// What is left of the document, without its last line break.
    fn end_document(&mut self) -> Option<Item> {
        let mut text = std::mem::take(&mut self.pending);
        let begun = std::mem::take(&mut self.in_document);
        if text.ends_with('\n') {
            text.truncate(text.len() - if text.ends_with("\r\n") { 2 } else { 1 });
        }
        if text.is_empty() && !begun {
            return None;
        }
        self.documents += 1;
        Some(Item::Text { text, ends: true })
    }

    fn next_json(&mut self) -> Result<Option<Item>> {
        while self.read_line()? {
            let line = self.line_text()?;
            if line.trim().is_empty() {
                continue;
            }
            let expected = "{\"text\": …} or {\"messages\": [{\"role\": …, \"content\": …}, …]}";
            let parsed: JsonLine = serde_json::from_str(line)
                .map_err(|error| self.invalid_line(expected, error.to_string()))?;
            let item = match (parsed.text, parsed.messages) {
                (Some(text), None) => {
                    self.text_bytes += text.len() as u64;
                    Item::Text { text, ends: true }
                }
                (None, Some(messages)) if messages.iter().any(|m| m.role == "assistant") => {
                    self.text_bytes += messages.iter().map(|m| m.content.len() as u64).sum::<u64>();
                    Item::Chat(messages)
                }
                (None, Some(_)) => {
                    let expected = "messages, one of them the assistant's";
                    return Err(self.invalid_line(expected, "none".into()));
                }
                (Some(_), Some(_)) => return Err(self.invalid_line(expected, "both".into())),
                (None, None) => return Err(self.invalid_line(expected, "neither".into())),
            };
            self.documents += 1;
            return Ok(Some(item));
        }
        Ok(None)
    }

    /// Reads the next line with its break; `false` at the end of the file.
    fn read_line(&mut self) -> Result<bool> {
        self.line.clear();
        let read = (&mut self.source).take(LONGEST_LINE).read_until(b'\n', &mut self.line);
        let read = read.map_err(|error| Error::io(&self.path, "read", error))?;
        self.line_number += 1;
        if read as u64 == LONGEST_LINE && !self.line.ends_with(b"\n") {
            let expected = format!("lines of at most {} MiB", LONGEST_LINE >> 20);
            return Err(self.invalid_line(&expected, "a longer one".into()));
        }
        Ok(read > 0)
    }

    fn line_text(&self) -> Result<&str> {
        std::str::from_utf8(&self.line).map_err(|error| {
            self.invalid_line("UTF-8", format!("an invalid byte at {}", error.valid_up_to()))
        })
    }

    fn invalid_line(&self, expected: &str, got: String) -> Error {
        let what = format!("{}, line {}", self.path.display(), self.line_number);
        Error::input(what, expected, got)
    }
}

impl Iterator for DocumentReader {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Result<Item>> {
        if self.done {
            return None;
        }
        let item = self.next_item().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}

/// Where a text may be cut near the border of two lines without any word of a tokenizer being cut:
/// between lines that both have something on them. A break of two bytes is one word to some
/// tokenizers, two to others, and belongs to the punctuation before it to others yet; so the cut is
/// before it, and only behind a letter or a digit.
fn seam(before: &str, after: &str) -> Option<usize> {
    let goes_on = after.chars().next().is_some_and(|c| !c.is_whitespace());
    let ends = |line: &str, good: fn(char) -> bool| line.chars().next_back().is_some_and(good);
    let cut = match (before.strip_suffix("\r\n"), before.strip_suffix('\n')) {
        (Some(line), _) if ends(line, char::is_alphanumeric) => line.len(),
        (None, Some(line)) if ends(line, |c| !c.is_whitespace()) => before.len(),
        _ => return None,
    };
    goes_on.then_some(cut)
}

/// The whole text of a plain file, `.xz` or not, for evaluation; without the lines that are `separator`.
///
/// # Errors
/// JSON lines; a file that cannot be read, is no UTF-8, or is longer than `limit` bytes.
pub fn open_text(path: impl AsRef<Path>, separator: &str, limit: u64) -> Result<String> {
    let path = path.as_ref();
    if let Ok((Format::JsonLines, _)) = format_of(path) {
        let what = path.display().to_string();
        return Err(Error::input(what, "plain text to measure on", "a file of JSON lines"));
    }
    let (source, _) = open_unpacked(path)?;
    let mut bytes = Vec::new();
    source
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(path, "read", error))?;
    if bytes.len() as u64 > limit {
        let expected = format!("at most {} MiB of text", limit >> 20);
        return Err(Error::input(path.display().to_string(), expected, "more"));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let got = format!("an invalid byte at {}", error.utf8_error().valid_up_to());
        Error::input(path.display().to_string(), "UTF-8 text", got)
    })?;
    let lines = text.split_inclusive('\n').filter(|line| line.trim_end() != separator);
    Ok(lines.collect())
}

fn format_of(path: &Path) -> Result<(Format, bool)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (name, packed) = match name.strip_suffix(".xz") {
        Some(name) => (name, true),
        None => (name.as_str(), false),
    };
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("txt" | "text" | "md") => Ok((Format::Text, packed)),
        Some("jsonl" | "ndjson") => Ok((Format::JsonLines, packed)),
        _ => Err(Error::input(
            "training data",
            "a file named .txt, .md or .jsonl, or one of these with .xz",
            path.display(),
        )),
    }
}

/// A text's bytes, and the hash of those that were read of its file.
type Unpacked = (Box<dyn BufRead + Send>, Arc<Mutex<Hashed>>);

/// The bytes of a file, unpacked if it is `.xz`, and the hash of those that were read.
fn open_unpacked(path: &Path) -> Result<Unpacked> {
    let file = File::open(path).map_err(|error| Error::io(path, "open", error))?;
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Err(Error::input("training data", "a file", format!("folder {}", path.display())));
    }
    let hash = Arc::new(Mutex::new(Hashed { state: Sha256::new(), bytes: 0 }));
    let source = Hashing { source: file, hash: hash.clone() };
    let source = BufReader::with_capacity(BUFFER, source);
    let packed = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("xz"));
    Ok(match packed {
        // Several streams one after another are one file to xz.
        true => (Box::new(BufReader::with_capacity(BUFFER, XzReader::new(source, true))), hash),
        false => (Box::new(source), hash),
    })
}

struct Hashed {
    state: Sha256,
    bytes: u64,
}

/// Hashes what passes.
struct Hashing {
    source: File,
    hash: Arc<Mutex<Hashed>>,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        let mut hash = self.hash.lock().unwrap_or_else(PoisonError::into_inner);
        hash.state.update(&buffer[..read]);
        hash.bytes += read as u64;
        Ok(read)
    }
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: &[u8]) -> (Result<Vec<Item>>, Seen) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let mut reader = DocumentReader::open(&path, Some("<|end|>")).unwrap();
        let items = reader.by_ref().collect();
        (items, reader.seen())
    }

    fn text(text: &str, ends: bool) -> Item {
        Item::Text { text: text.into(), ends }
    }

    #[test]
    fn separators_divide_documents() {
        let (items, seen) = read("a.txt", b"one\ntwo\n<|end|>\n<|end|>\nthree");
        assert_eq!(items.unwrap(), [text("one\ntwo", true), text("three", true)]);
        assert_eq!((seen.documents, seen.text_bytes, seen.file_bytes), (2, 29, 29));
        let expected = hex(&Sha256::digest(b"one\ntwo\n<|end|>\n<|end|>\nthree"));
        assert_eq!(seen.sha256, expected);
    }

    #[test]
    fn long_documents_come_in_pieces_that_add_up() {
        let book: String = (0..20_000).map(|i| format!("Line {i} of a long book.\n")).collect();
        let (items, seen) = read("book.txt", book.as_bytes());
        let items = items.unwrap();
        assert!(items.len() > 3, "{} pieces", items.len());
        let mut whole = String::new();
        for (i, item) in items.iter().enumerate() {
            let Item::Text { text, ends } = item else { panic!("text") };
            assert_eq!(*ends, i == items.len() - 1);
            assert!(text.len() <= LONGEST_PIECE + 100);
            whole.push_str(text);
        }
        assert_eq!(whole, book.trim_end());
        assert_eq!(seen.documents, 1);
    }

    #[test]
    fn lines_of_json_are_texts_or_conversations() {
        let lines = "{\"text\": \"a\\nb\"}\n\n{\"messages\": [{\"role\": \"assistant\", \"content\": \"hi\"}]}\n";
        let (items, seen) = read("a.jsonl", lines.as_bytes());
        assert_eq!(
            items.unwrap(),
            [text("a\nb", true), Item::Chat(vec![Message::assistant("hi")])]
        );
        assert_eq!((seen.documents, seen.text_bytes), (2, 5));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (name, bytes, expected) in [
            ("a.txt", &b"fine\n\xff\n"[..], "a.txt, line 2: expected UTF-8"),
            ("a.jsonl", b"{\"text\": \"a\"}\n{\"txt\": 1}\n", "a.jsonl, line 2: expected"),
            ("a.jsonl", b"not json\n", "a.jsonl, line 1: expected"),
            ("a.jsonl", b"{\"messages\": []}\n", "got none"),
            ("a.txt.xz", b"not packed", "cannot read"),
        ] {
            let (items, _) = read(name, bytes);
            let error = items.expect_err(name).to_string();
            assert!(error.contains(expected), "{error} should say {expected}");
        }
        let error = DocumentReader::open("book.pdf", None).err().unwrap().to_string();
        assert!(error.contains("a file named .txt"), "{error}");
    }

    #[test]
    fn packed_text_is_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt.xz");
        let mut packed = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default());
        std::io::Write::write_all(packed.as_mut().unwrap(), b"one\n<|end|>\ntwo\n").unwrap();
        std::fs::write(&path, packed.unwrap().finish().unwrap()).unwrap();
        let reader = DocumentReader::open(&path, Some("<|end|>")).unwrap();
        let items: Result<Vec<Item>> = reader.collect();
        assert_eq!(items.unwrap(), [text("one", true), text("two", true)]);
        assert_eq!(open_text(&path, "<|end|>", 100).unwrap(), "one\ntwo\n");
        assert!(open_text(&path, "", 5).is_err());
        let error = open_text("held-out.jsonl", "", 5).unwrap_err().to_string();
        assert_eq!(
            error,
            "held-out.jsonl: expected plain text to measure on, got a file of JSON lines"
        );
    }
}
