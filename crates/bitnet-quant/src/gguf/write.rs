//! Writes GGUF files, version 3, one tensor at a time.
//!
//! All tensors are described first, as the header comes first; then their bytes follow in the same
//! order. Nothing is kept in memory but the descriptions. What this writes, [`super::read`] reads:
//! the same limits are checked before a byte is written.

use super::metadata::{Array, Metadata, Value};
use super::read;
use super::types::TensorType;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Unique in its file, at most [`read::MAX_NAME_BYTES`] long.
    pub name: String,
    /// Outermost dimension first, one to [`read::MAX_DIMS`], none of them 0.
    pub shape: Vec<usize>,
    /// Number format. [`TensorType::Q2_0`] means ggml's blocks of 64.
    pub tensor_type: TensorType,
}

impl TensorSpec {
    /// Bytes of the tensor; an error if its shape does not suit its type.
    pub fn n_bytes(&self) -> Result<usize> {
        let what = format!("tensor {}", self.name);
        let block = (self.tensor_type == TensorType::Q2_0).then_some(read::Q2_0_BLOCKS[0]);
        self.tensor_type.bytes(&what, &self.shape, block)
    }
}

/// Bytes written between two reports of progress.
const CHUNK_BYTES: usize = 1 << 20;

/// Called with the bytes of tensor data written so far, and their number in the end.
type Progress<'a> = Box<dyn FnMut(u64, u64) + 'a>;

/// A file being written.
pub struct GgufWriter<'a, W> {
    out: W,
    path: PathBuf,
    alignment: usize,
    tensors: std::vec::IntoIter<(String, usize)>,
    done: u64,
    total: u64,
    progress: Option<Progress<'a>>,
}

impl<W> fmt::Debug for GgufWriter<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufWriter")
            .field("path", &self.path)
            .field("done", &self.done)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}

impl<'a, W: Write> GgufWriter<'a, W> {
    /// Writes the header to `out`. `path` is for messages.
    ///
    /// `general.alignment` in the metadata is obeyed.
    pub fn new(
        mut out: W,
        path: impl AsRef<Path>,
        metadata: &Metadata,
        tensors: &[TensorSpec],
    ) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let in_file = |error: Error| error.in_file(path.display());
        let alignment = read::alignment(metadata).map_err(in_file)?;
        let (header, lengths) = header(metadata, tensors, alignment).map_err(in_file)?;
        out.write_all(&header).map_err(|error| Error::io(&path, "write", error))?;
        let total = lengths.iter().map(|&(_, len)| len as u64).sum();
        let tensors = lengths.into_iter();
        Ok(Self { out, path, alignment, tensors, done: 0, total, progress: None })
    }

    /// Calls `progress` with the bytes written so far and their number in the end, as tensors are
    /// written.
    #[must_use]
    pub fn on_progress(mut self, progress: impl FnMut(u64, u64) + 'a) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Writes the next tensor, which must be `name`.
    pub fn write_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let in_file = |error: Error| error.in_file(self.path.display());
        match self.tensors.next() {
            Some((expected, len)) if expected == name => {
                if bytes.len() != len {
                    let what = format!("tensor {name}");
                    let expected = format!("{len} bytes");
                    return Err(in_file(Error::malformed(what, expected, bytes.len())));
                }
            }
            Some((expected, _)) => {
                return Err(in_file(Error::malformed("next tensor", expected, name)));
            }
            None => return Err(in_file(Error::malformed("next tensor", "the end", name))),
        }
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.write(chunk)?;
            self.done += chunk.len() as u64;
            if let Some(progress) = &mut self.progress {
                progress(self.done, self.total);
            }
        }
        let padding = bytes.len().next_multiple_of(self.alignment) - bytes.len();
        self.write(&[0; read::MAX_ALIGNMENT as usize][..padding])
    }

    /// Ends the file and gives the output back; an error if tensors are missing.
    pub fn finish(mut self) -> Result<W> {
        if let Some((name, _)) = self.tensors.next() {
            return Err(Error::missing(format!("tensor {name}")).in_file(self.path.display()));
        }
        self.out.flush().map_err(|error| Error::io(&self.path, "write", error))?;
        Ok(self.out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|error| Error::io(&self.path, "write", error))
    }
}

/// Each tensor's name and length.
type Lengths = Vec<(String, usize)>;

/// The bytes before the tensor data, and what is to follow.
fn header(
    metadata: &Metadata,
    tensors: &[TensorSpec],
    alignment: usize,
) -> Result<(Vec<u8>, Lengths)> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    put_count(&mut bytes, "number of tensors", tensors.len(), read::MAX_TENSORS)?;
    let entries = metadata.entries();
    put_count(&mut bytes, "number of metadata keys", entries.len(), read::MAX_KEYS)?;
    for (key, value) in entries {
        put_name(&mut bytes, "key", key, read::MAX_KEY_BYTES)?;
        put_value(&mut bytes, key, value)?;
    }
    let mut names = HashSet::new();
    let mut lengths = Vec::with_capacity(tensors.len());
    let mut offset = 0u64;
    for spec in tensors {
        let what = format!("tensor {}", spec.name);
        if !names.insert(&spec.name) {
            return Err(Error::malformed(what, "one description", "a second one"));
        }
        put_name(&mut bytes, "tensor name", &spec.name, read::MAX_NAME_BYTES)?;
        let n_dims = spec.shape.len();
        if n_dims == 0 || n_dims > read::MAX_DIMS as usize || spec.shape.contains(&0) {
            let expected = format!("1 to {} dimensions, none of them 0", read::MAX_DIMS);
            return Err(Error::malformed(what, expected, format!("{:?}", spec.shape)));
        }
        bytes.extend((n_dims as u32).to_le_bytes());
        for &dim in spec.shape.iter().rev() {
            bytes.extend((dim as u64).to_le_bytes());
        }
        bytes.extend(spec.tensor_type.0.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        let len = spec.n_bytes()?;
        offset = (len as u64)
            .checked_next_multiple_of(alignment as u64)
            .and_then(|padded| offset.checked_add(padded))
            .ok_or_else(|| Error::malformed(what, "a file of less than 2⁶⁴ bytes", "more"))?;
        lengths.push((spec.name.clone(), len));
    }
    if bytes.len() > read::MAX_HEADER_BYTES {
        let expected = format!("at most {} bytes", read::MAX_HEADER_BYTES);
        return Err(Error::malformed("header", expected, bytes.len()));
    }
    bytes.resize(bytes.len().next_multiple_of(alignment), 0);
    Ok((bytes, lengths))
}

fn put_count(bytes: &mut Vec<u8>, what: &str, count: usize, max: u64) -> Result<()> {
    if count as u64 > max {
        return Err(Error::malformed(what, format!("at most {max}"), count));
    }
    bytes.extend((count as u64).to_le_bytes());
    Ok(())
}

fn put_name(bytes: &mut Vec<u8>, what: &str, name: &str, max: u64) -> Result<()> {
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(Error::malformed(what, "a printable name", format!("{name:?}")));
    }
    put_count(bytes, &format!("length of {what} {name}"), name.len(), max)?;
    bytes.extend(name.as_bytes());
    Ok(())
}

fn put_string(bytes: &mut Vec<u8>, string: &str) {
    bytes.extend((string.len() as u64).to_le_bytes());
    bytes.extend(string.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, key: &str, value: &Value) -> Result<()> {
    bytes.extend(value.type_id().to_le_bytes());
    match value {
        Value::U8(value) => bytes.extend(value.to_le_bytes()),
        Value::I8(value) => bytes.extend(value.to_le_bytes()),
        Value::U16(value) => bytes.extend(value.to_le_bytes()),
        Value::I16(value) => bytes.extend(value.to_le_bytes()),
        Value::U32(value) => bytes.extend(value.to_le_bytes()),
        Value::I32(value) => bytes.extend(value.to_le_bytes()),
        Value::F32(value) => bytes.extend(value.to_le_bytes()),
        Value::Bool(value) => bytes.push((*value).into()),
        Value::String(value) => put_string(bytes, value),
        Value::Array(array) => put_array(bytes, key, array, 1)?,
        Value::U64(value) => bytes.extend(value.to_le_bytes()),
        Value::I64(value) => bytes.extend(value.to_le_bytes()),
        Value::F64(value) => bytes.extend(value.to_le_bytes()),
    }
    Ok(())
}

fn put_array(bytes: &mut Vec<u8>, key: &str, array: &Array, depth: u32) -> Result<()> {
    if depth > read::MAX_ARRAY_DEPTH {
        let expected = format!("arrays at most {} deep", read::MAX_ARRAY_DEPTH);
        return Err(Error::malformed(format!("key {key}"), expected, "deeper ones"));
    }
    bytes.extend(array.type_id().to_le_bytes());
    bytes.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(values) => bytes.extend(values),
        Array::I8(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U16(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I16(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::Bool(values) => bytes.extend(values.iter().map(|&value| u8::from(value))),
        Array::String(values) => values.iter().for_each(|value| put_string(bytes, value)),
        Array::Array(values) => {
            for value in values {
                put_array(bytes, key, value, depth + 1)?;
            }
        }
        Array::U64(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I64(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F64(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
    Ok(())
}
