//! Safetensors: an 8-byte length, a JSON header, then the tensors' bytes without gaps.
//!
//! ```text
//! u64 n | n bytes of JSON {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}} | data
//! ```
//!
//! Reading is the `safetensors` crate's work; this file bounds what it is given and says which
//! file was wrong. Writing streams, so that a model is never in memory whole. Knows no models.

use crate::error::{Error, Result};
use crate::mapping::FileBytes;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo};
use std::collections::HashMap;
use std::io::{self, Write};

/// Longest header accepted. Real ones have about 100 bytes a tensor.
const MAX_HEADER: u64 = 32 << 20;

/// A tensor as the file holds it.
#[derive(Debug, Clone)]
pub struct RawTensor {
    /// Number format.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian numbers, row-major; length = product of sizes × size of `dtype`.
    pub bytes: FileBytes,
}

/// The tensors of one file, by name, in the order of their data.
pub fn read(bytes: &FileBytes) -> Result<Vec<(String, RawTensor)>> {
    let len = bytes.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let len =
        len.ok_or_else(|| Error::malformed("file length", "at least 8 bytes", bytes.len()))?;
    if len > MAX_HEADER {
        return Err(Error::malformed("header length", format!("at most {MAX_HEADER} bytes"), len));
    }
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
    let data = bytes.slice(8 + header..);
    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let info = metadata.info(&name).ok_or_else(|| Error::missing(format!("tensor {name}")))?;
        let (start, end) = info.data_offsets;
        let bytes = data.slice(start..end); // inside: `read_metadata` checked that data ends the file
        tensors.push((name, RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes }));
    }
    Ok(tensors)
}

fn malformed(error: SafeTensorError) -> Error {
    match error {
        SafeTensorError::InvalidHeaderDeserialization(source) => source.into(),
        error => Error::malformed("header", "a safetensors header that covers the file", error),
    }
}

/// A tensor that will be written.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl Planned {
    /// Bytes of its data.
    pub fn byte_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Brings tensors into the order safetensors asks for: widest numbers first, so that all are
/// aligned, then by name.
pub fn sort(plan: &mut [Planned]) {
    plan.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
}

/// Writes length and header for tensors whose data will follow in this order.
pub fn write_header(out: &mut impl Write, plan: &[Planned]) -> io::Result<()> {
    let mut offset = 0;
    let infos = plan.iter().map(|tensor| {
        let data_offsets = (offset, offset + tensor.byte_len());
        offset = data_offsets.1;
        (
            tensor.name.clone(),
            TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets },
        )
    });
    // Transformers refuses files that do not say which framework laid the tensors out.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos.collect()).map_err(io::Error::other)?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    out.write_all(&(json.len() as u64).to_le_bytes())?;
    out.write_all(&json)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut plan = vec![
            Planned { name: "b".into(), dtype: Dtype::U8, shape: vec![3] },
            Planned { name: "a".into(), dtype: Dtype::F32, shape: vec![1, 2] },
        ];
        sort(&mut plan);
        let mut out = Vec::new();
        write_header(&mut out, &plan).unwrap();
        out.extend_from_slice(&[0, 0, 128, 63, 0, 0, 0, 192, 7, 8, 9]); // 1.0, −2.0 and 7, 8, 9
        out
    }

    #[test]
    fn what_is_written_is_read_back() {
        let tensors = read(&sample().into()).unwrap();
        let names: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t.dtype)).collect();
        assert_eq!(names, [("a", Dtype::F32), ("b", Dtype::U8)]);
        assert_eq!(tensors[0].1.shape, [1, 2]);
        assert_eq!(&tensors[1].1.bytes[..], [7, 8, 9]);
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = sample();
        for len in 0..whole.len() {
            assert!(read(&whole[..len].to_vec().into()).is_err(), "cut to {len} bytes");
        }
        assert!(read(&[&whole[..], &[0]].concat().into()).is_err(), "one byte too many");
    }

    #[test]
    fn lying_headers_are_refused() {
        let file = |header: &str, data: usize| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(header.as_bytes());
            bytes.resize(bytes.len() + data, 0);
            read(&bytes.into())
        };
        assert!(file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4).is_ok());
        for (lie, header) in [
            (
                "overlap",
                r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}"#,
            ),
            ("length", r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#),
            (
                "overflow",
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
            ),
            ("order", r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#),
            ("end", r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#),
            (
                "duplicate",
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#,
            ),
            ("dtype", r#"{"a":{"dtype":"I2_S","shape":[4],"data_offsets":[0,4]}}"#),
            ("negative", r#"{"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}"#),
            ("no JSON", "{"),
        ] {
            assert!(file(header, 4).is_err(), "{lie}");
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(file(&deep, 0).is_err(), "deep nesting");
        let huge = [u64::MAX.to_le_bytes(), [0; 8]].concat();
        assert!(read(&huge.into()).unwrap_err().to_string().contains("header length"));
    }
}
