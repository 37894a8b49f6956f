//! Reads the header of a GGUF file: version 2 or 3, little-endian.
//!
//! The bytes are taken as hostile. Nothing is allocated before the bytes it would hold were seen to
//! be there, counts and the header as a whole are bounded, arithmetic is checked, and every lookup
//! is by hash, so that time and memory grow no faster than the header. Tensor data is located, not
//! looked at.

use super::metadata::{Array, Metadata, Value};
use super::types::{TensorInfo, TensorType};
use crate::error::{Error, Result};
use crate::pack::{Packing, q2_0};
use std::collections::HashSet;

/// The header must end within this many bytes; the largest vocabularies need a tenth of it.
pub const MAX_HEADER_BYTES: usize = 128 << 20;
/// Most metadata keys.
pub const MAX_KEYS: u64 = 1 << 16;
/// Most tensors.
pub const MAX_TENSORS: u64 = 1 << 20;
/// Longest key, in bytes.
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Longest tensor name, in bytes.
pub const MAX_NAME_BYTES: u64 = 64;
/// Most dimensions.
pub const MAX_DIMS: u32 = 4;
/// Largest alignment of tensor data.
pub const MAX_ALIGNMENT: u32 = 1 << 16;
/// How deep arrays may lie in arrays.
pub const MAX_ARRAY_DEPTH: u32 = 4;
/// Alignment of tensor data where `general.alignment` is absent.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// What stands before the tensor data.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) alignment: usize,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

/// A tensor as its description says, before its place is known to be in the file.
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    tensor_type: TensorType,
    offset: u64,
}

/// Reads the header of the file `bytes`.
pub(super) fn read_header(bytes: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { bytes: &bytes[..bytes.len().min(MAX_HEADER_BYTES)], position: 0 };
    let magic = cursor.take(4, "magic")?;
    if magic != b"GGUF" {
        return Err(Error::malformed("magic", "\"GGUF\"", format!("{:?}", magic.escape_ascii())));
    }
    let version = cursor.u32("version")?;
    if !(2..=3).contains(&version) {
        return Err(unsupported_version(version));
    }
    let n_tensors = cursor.count("number of tensors", MAX_TENSORS, TENSOR_MIN_BYTES)?;
    let n_keys = cursor.count("number of metadata keys", MAX_KEYS, KEY_MIN_BYTES)?;

    let mut metadata = Metadata::new();
    for _ in 0..n_keys {
        let key = cursor.name("key", MAX_KEY_BYTES)?;
        let value = cursor.value(&key)?;
        if metadata.value(&key).is_some() {
            return Err(Error::malformed(format!("key {key}"), "one value", "a second one"));
        }
        metadata.set(key, value);
    }
    let alignment = alignment(&metadata)?;

    let mut raw = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..n_tensors {
        let tensor = cursor.tensor()?;
        if !names.insert(tensor.name.clone()) {
            let what = format!("tensor {}", tensor.name);
            return Err(Error::malformed(what, "one description", "a second one"));
        }
        raw.push(tensor);
    }
    let data_start = cursor.position.next_multiple_of(alignment);
    let tensors = locate(raw, data_start, bytes.len(), alignment, &metadata)?;
    Ok(Header { version, alignment, metadata, tensors })
}

fn unsupported_version(version: u32) -> Error {
    // Small numbers of the other byte order have their bytes at the other end.
    let got = match version {
        v if v & 0xFFFF == 0 && v != 0 => format!("{} in big-endian order", v.swap_bytes()),
        v => v.to_string(),
    };
    Error::unsupported("GGUF version", got, "2 and 3, little-endian")
}

pub(super) fn alignment(metadata: &Metadata) -> Result<usize> {
    const KEY: &str = "general.alignment";
    match metadata.value(KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(value)) if value.is_power_of_two() && *value <= MAX_ALIGNMENT => {
            Ok(*value as usize)
        }
        Some(value) => Err(Error::malformed(
            format!("key {KEY}"),
            format!("u32, a power of two up to {MAX_ALIGNMENT}"),
            format!("{} {value}", value.type_name()),
        )),
    }
}

/// Finds the bytes of each tensor, all inside the file and none shared.
fn locate(
    raw: Vec<RawTensor>,
    data_start: usize,
    file_len: usize,
    alignment: usize,
    metadata: &Metadata,
) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::new();
    for RawTensor { name, shape, tensor_type, offset } in raw {
        let what = format!("tensor {name}");
        if tensor_type.0 == 39 && metadata.get("general.architecture")?.is_some_and(is_bitnet_cpp) {
            return Err(Error::unsupported(
                format!("type of {what}"),
                "39 (TL2 of bitnet.cpp, laid out for one machine)",
                "I2_S, TQ1_0, TQ2_0, Q2_0; convert the original checkpoint again",
            ));
        }
        let start = usize::try_from(offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset))
            .filter(|&start| start <= file_len)
            .ok_or_else(|| {
                let expected = format!("an offset inside the file of {file_len} bytes");
                Error::malformed(&what, expected, offset)
            })?;
        if !offset.is_multiple_of(alignment as u64) {
            let expected = format!("an offset divisible by {alignment}");
            return Err(Error::malformed(what, expected, offset));
        }
        // The length of Q2_0 follows from the neighbours; until then, the least it can be.
        let block = (tensor_type == TensorType::Q2_0).then_some(Q2_0_BLOCKS[1]);
        let block = if block.is_some_and(|(cols, _)| !divides(cols, &shape)) {
            Some(Q2_0_BLOCKS[0])
        } else {
            block
        };
        let len = tensor_type.bytes(&what, &shape, block)?;
        let range = start..start.saturating_add(len);
        let packing = tensor_type.packing();
        tensors.push(TensorInfo { name, shape, tensor_type, packing, range });
    }

    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_unstable_by_key(|&index| (tensors[index].range.start, tensors[index].range.end));
    resolve_q2_0(&mut tensors, &order, file_len, alignment)?;
    for (position, &index) in order.iter().enumerate() {
        let tensor = &tensors[index];
        let next = order.get(position + 1).map(|&next| &tensors[next]);
        let end = next.map_or(file_len, |next| next.range.start);
        if tensor.range.end > end {
            let place = match next {
                Some(next) => format!("before tensor {}", next.name),
                None => "before the end of the file".to_owned(),
            };
            return Err(Error::malformed(
                format!(
                    "tensor {}, shape {:?} in {}",
                    tensor.name, tensor.shape, tensor.tensor_type
                ),
                format!("{} bytes {place}", tensor.range.len()),
                end - tensor.range.start,
            ));
        }
    }
    Ok(tensors)
}

fn is_bitnet_cpp(architecture: &str) -> bool {
    architecture.starts_with("bitnet")
}

/// Columns and bytes of the two blocks that share the id of Q2_0: ggml's, and PrismML's before it.
pub(super) const Q2_0_BLOCKS: [(usize, usize); 2] =
    [(q2_0::COLS, q2_0::BYTES), (q2_0::COLS_G128, q2_0::BYTES_G128)];

fn divides(block_cols: usize, shape: &[usize]) -> bool {
    shape.last().is_some_and(|cols| cols.is_multiple_of(block_cols))
}

/// Finds out which block the Q2_0 tensors of a file have: the one with which every such tensor
/// ends where the next tensor starts. `order` sorts the tensors by place.
fn resolve_q2_0(
    tensors: &mut [TensorInfo],
    order: &[usize],
    file_len: usize,
    alignment: usize,
) -> Result<()> {
    let mut possible = [true; 2];
    let mut first = None;
    for (position, &index) in order.iter().enumerate() {
        let tensor = &tensors[index];
        if tensor.tensor_type != TensorType::Q2_0 {
            continue;
        }
        first.get_or_insert(index);
        let next = order.get(position + 1).map(|&next| tensors[next].range.start);
        let room = next.unwrap_or(file_len) - tensor.range.start;
        for (possible, block) in possible.iter_mut().zip(Q2_0_BLOCKS) {
            let len = tensor.tensor_type.bytes("", &tensor.shape, Some(block)).ok();
            *possible &= len.is_some_and(|len| {
                // Nothing need follow the last tensor, not even padding.
                len.checked_next_multiple_of(alignment) == Some(room)
                    || (next.is_none() && len == room)
            });
        }
    }
    let Some(first) = first else { return Ok(()) };
    // A file so small that padding hides the difference is taken as ggml's.
    let Some(chosen) = possible.iter().position(|&possible| possible) else {
        return Err(Error::malformed(
            format!("tensor {} and others in Q2_0", tensors[first].name),
            "as much room as blocks of 64 or of 128 weights need",
            "neither",
        ));
    };
    for tensor in tensors.iter_mut().filter(|tensor| tensor.tensor_type == TensorType::Q2_0) {
        let len =
            tensor.tensor_type.bytes(&tensor.name, &tensor.shape, Some(Q2_0_BLOCKS[chosen]))?;
        tensor.range.end = tensor.range.start.saturating_add(len);
        tensor.packing = Some([Packing::Q2_0, Packing::Q2_0G128][chosen]);
    }
    Ok(())
}

/// Bytes of the shortest key with its value: length, one letter, type, one byte.
const KEY_MIN_BYTES: usize = 8 + 1 + 4 + 1;
/// Bytes of the shortest tensor description: length, one letter, dimensions, type, offset.
const TENSOR_MIN_BYTES: usize = 8 + 1 + 4 + 8 + 4 + 8;

/// A position in the header.
struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        match self.bytes[self.position..].get(..len) {
            Some(bytes) => {
                self.position += len;
                Ok(bytes)
            }
            None => Err(self.too_long(what, format!("{len} bytes"))),
        }
    }

    fn too_long(&self, what: &str, expected: String) -> Error {
        let limit =
            if self.bytes.len() == MAX_HEADER_BYTES { " of the header's limit" } else { "" };
        let got = format!("{} bytes up to the end{limit}", self.remaining());
        Error::malformed(format!("{what} at byte {}", self.position), expected, got)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things that take at least `min_bytes` each, all of them still to come.
    fn count(&mut self, what: &str, max: u64, min_bytes: usize) -> Result<usize> {
        let count = self.u64(what)?;
        if count > max {
            return Err(Error::malformed(what, format!("at most {max}"), count));
        }
        match usize::try_from(count) {
            Ok(count) if count <= self.remaining() / min_bytes => Ok(count),
            _ => Err(self.too_long(what, format!("room for {count}"))),
        }
    }

    fn string(&mut self, what: &str, max: u64) -> Result<String> {
        let len = self.count(what, max, 1)?;
        let start = self.position;
        let bytes = self.take(len, what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| {
            Error::malformed(format!("{what} at byte {start}"), "UTF-8", "other bytes")
        })
    }

    /// A string that stands in messages: not empty, no control characters.
    fn name(&mut self, what: &str, max: u64) -> Result<String> {
        let name = self.string(what, max)?;
        if name.is_empty() || name.chars().any(char::is_control) {
            let what = format!("{what} before byte {}", self.position);
            return Err(Error::malformed(what, "a printable name", format!("{name:?}")));
        }
        Ok(name)
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let what = format!("key {key}");
        let what = what.as_str();
        Ok(match self.u32(what)? {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(what)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => Value::Bool(to_bool(self.array(what)?, what)?),
            8 => Value::String(self.string(what, u64::MAX)?),
            9 => Value::Array(self.values(what, 1)?),
            10 => Value::U64(u64::from_le_bytes(self.array(what)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            id => return Err(Error::malformed(what, "a value type from 0 to 12", id)),
        })
    }

    fn values(&mut self, what: &str, depth: u32) -> Result<Array> {
        if depth > MAX_ARRAY_DEPTH {
            let expected = format!("arrays at most {MAX_ARRAY_DEPTH} deep");
            return Err(Error::malformed(what, expected, "deeper ones"));
        }
        Ok(match self.u32(what)? {
            0 => Array::U8(self.numbers(what, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(what, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(what, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(what, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(what, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(what, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(what, f32::from_le_bytes)?),
            7 => {
                let len = self.count(what, u64::MAX, 1)?;
                let bytes = self.take(len, what)?.iter();
                Array::Bool(bytes.map(|&byte| to_bool([byte], what)).collect::<Result<_>>()?)
            }
            8 => Array::String(self.many(what, 8, |cursor| cursor.string(what, u64::MAX))?),
            9 => Array::Array(self.many(what, 12, |cursor| cursor.values(what, depth + 1))?),
            10 => Array::U64(self.numbers(what, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(what, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(what, f64::from_le_bytes)?),
            id => return Err(Error::malformed(what, "an element type from 0 to 12", id)),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        what: &str,
        from_le_bytes: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let len = self.count(what, u64::MAX, N)?;
        let bytes = self.take(len * N, what)?.as_chunks::<N>().0;
        Ok(bytes.iter().map(|&bytes| from_le_bytes(bytes)).collect())
    }

    fn many<T>(
        &mut self,
        what: &str,
        min_bytes: usize,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let len = self.count(what, u64::MAX, min_bytes)?;
        // Grows as the elements are read: a promise of many costs nothing until it is kept.
        let mut values = Vec::new();
        for _ in 0..len {
            values.push(read(self)?);
        }
        Ok(values)
    }

    fn tensor(&mut self) -> Result<RawTensor> {
        let name = self.name("tensor name", MAX_NAME_BYTES)?;
        let what = format!("tensor {name}");
        let what = what.as_str();
        let n_dims = self.u32(what)?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            let expected = format!("1 to {MAX_DIMS} dimensions");
            return Err(Error::malformed(what, expected, n_dims));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let dim = self.u64(what)?;
            match usize::try_from(dim) {
                Ok(size) if size > 0 => shape.push(size),
                _ => return Err(Error::malformed(what, "dimensions of at least 1", dim)),
            }
        }
        shape.reverse();
        let tensor_type = TensorType(self.u32(what)?);
        let offset = self.u64(what)?;
        Ok(RawTensor { name, shape, tensor_type, offset })
    }
}

fn to_bool([byte]: [u8; 1], what: &str) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::malformed(what, "a bool, 0 or 1", byte)),
    }
}
