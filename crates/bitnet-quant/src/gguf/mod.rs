//! GGUF, the single-file format of llama.cpp and bitnet.cpp: metadata and tensors.
//!
//! [`GgufFile`] opens a file without copying it; [`GgufWriter`] writes one tensor at a time.
//! Architectures, tensor names and tokenizers mean something only in `load`, `names` and `text`,
//! which make a checkpoint of a file.

mod i2s_layout;
pub(crate) mod load;
pub mod metadata;
pub(crate) mod names;
pub mod read;
mod text;
pub mod types;
pub mod write;

pub use metadata::{Array, FromValue, Metadata, Value};
pub use types::{TensorInfo, TensorType};
pub use write::{GgufWriter, TensorSpec};

use crate::error::{Error, Result};
use crate::mapping::{FileBytes, open_mapped};
use crate::pack::{FloatTensor, I2sLayout, Packing, TernaryTensor};
use std::collections::HashMap;
use std::path::Path;

/// An open GGUF file: its header checked and in memory, its tensors where they were.
#[derive(Debug)]
pub struct GgufFile {
    name: String,
    bytes: FileBytes,
    header: read::Header,
    index: HashMap<String, usize>,
}

/// A matrix of either kind.
#[derive(Debug, Clone)]
pub enum Tensor {
    /// Ternary weights.
    Ternary(TernaryTensor),
    /// Anything else this crate decodes.
    Float(FloatTensor),
}

impl GgufFile {
    /// Maps a file and reads its header.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_bytes(open_mapped(path)?, path.display().to_string())
    }

    /// Reads the header of a file in memory; `name` is for messages.
    pub fn from_bytes(bytes: impl Into<FileBytes>, name: impl Into<String>) -> Result<Self> {
        let (bytes, name) = (bytes.into(), name.into());
        let header = read::read_header(&bytes).map_err(|error| error.in_file(&name))?;
        let names = header.tensors.iter().enumerate();
        let index = names.map(|(position, tensor)| (tensor.name.clone(), position)).collect();
        Ok(Self { name, bytes, header, index })
    }

    /// The layout of the I2_S tensors, if the trained weights of the feed-forward blocks give it
    /// away; nothing else in a file does. Reads a few megabytes at most.
    pub fn detect_i2s_layout(&self) -> Option<I2sLayout> {
        i2s_layout::detect(self)
    }

    /// Takes I2_S tensors to be laid out so. Without this they are taken as canonical.
    #[must_use]
    pub fn with_i2s_layout(mut self, layout: I2sLayout) -> Self {
        for tensor in &mut self.header.tensors {
            if let Some(Packing::I2S(current)) = &mut tensor.packing {
                *current = layout;
            }
        }
        self
    }

    /// The name errors give.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Offsets of tensors are multiples of this.
    pub fn alignment(&self) -> usize {
        self.header.alignment
    }

    /// All metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// All tensors, in the order of the header.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The value of a key that may be absent; an error if it has another type.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        self.metadata().get(key).map_err(|error| error.in_file(&self.name))
    }

    /// The value of a key that must be there.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.metadata().require(key).map_err(|error| error.in_file(&self.name))
    }

    /// Describes a tensor that may be absent.
    pub fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&position| &self.header.tensors[position])
    }

    /// Describes a tensor that must be there.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || Error::missing(format!("tensor {name}")).in_file(&self.name);
        self.find(name).ok_or_else(missing)
    }

    /// The bytes of a tensor of this file, without a copy.
    pub fn bytes(&self, tensor: &TensorInfo) -> FileBytes {
        self.bytes.slice(tensor.range.clone())
    }

    /// Reads a matrix. Ternary tensors are checked code by code, on the threads of rayon if large.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        self.read_tensor(info).map_err(|error| error.in_file(&self.name))
    }

    fn read_tensor(&self, info: &TensorInfo) -> Result<Tensor> {
        let what = format!("tensor {}", info.name);
        let (rows, cols) = info.matrix_shape();
        let bytes = self.bytes(info);
        if let Some(packing) = info.packing {
            return TernaryTensor::new(&what, packing, rows, cols, bytes).map(Tensor::Ternary);
        }
        match info.tensor_type.float_format() {
            Some(format) => FloatTensor::new(&what, format, rows, cols, bytes).map(Tensor::Float),
            None => Err(Error::unsupported(
                format!("type of {what}"),
                info.tensor_type,
                "I2_S, TQ1_0, TQ2_0, Q2_0, Q1_0, PQ2_0, PTQ1_0, F32, F16, BF16, Q8_0, Q4_0, Q4_1, \
                 Q5_0, Q5_1, Q4_K, Q5_K, Q6_K",
            )),
        }
    }
}
