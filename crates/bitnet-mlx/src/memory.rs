//! MLX's memory under the pool of bitnet-core: buffers are arrays of words that the host writes in
//! place and the device reads in place, since MLX knows unified memory only.

use crate::array::{Array, Ops};
use crate::ffi::dtype;
use bitnet_core::memory::{
    AccessPattern, BufferKind, Completion, CopySide, DeviceBufferHandle, DeviceMemory,
    EnhancedMemoryPool, GPUMemoryManager, MemoryProperties, system,
};
use bitnet_core::{Error, Result};

/// The pool of a backend.
pub(crate) type Pool = EnhancedMemoryPool<MlxMemory>;
/// The pool with its transfers.
pub(crate) type Memory = GPUMemoryManager<MlxMemory>;

/// Memory of MLX's device.
pub struct MlxMemory {
    ops: Ops,
    total_bytes: Option<u64>,
}

/// An evaluated array of words.
pub struct MlxStorage(Array);

/// Bytes of a word.
const WORD: u64 = 4;

impl MlxMemory {
    pub(crate) fn new(ops: Ops) -> Self {
        let total_bytes = ops.device.info().1.or_else(system::total_memory);
        Self { ops, total_bytes }
    }
}

impl MlxStorage {
    fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        // SAFETY: this storage owns the array's first handle. Others are made by `Placed`, which
        // keeps the region, and so this storage from being lent to anybody else, for as long as it
        // lives; steps are evaluated before their inputs are dropped.
        let words = unsafe { self.0.words_mut() }?;
        // SAFETY: words are bytes.
        Ok(unsafe { words.align_to_mut().1 })
    }
}

fn outside(len: usize, offset: u64, bytes: usize) -> Error {
    Error::shape("range of a buffer", format!("within {len} bytes"), format!("{bytes} at {offset}"))
}

impl DeviceMemory for MlxMemory {
    type Buffer = MlxStorage;

    fn name(&self) -> &str {
        "mlx"
    }

    fn properties(&self) -> MemoryProperties {
        MemoryProperties {
            unified: true,
            // An array has one shape and one owner.
            suballocates: false,
            alignment: 64,
            // Sizes are 32-bit numbers of words.
            max_buffer_bytes: i32::MAX as u64 * WORD / 64 * 64,
            total_bytes: self.total_bytes,
        }
    }

    fn allocate(&self, bytes: u64, _: BufferKind) -> Result<MlxStorage> {
        if self.total_bytes.is_some_and(|total| bytes > total) {
            return Err(Error::OutOfMemory { what: "MLX".into(), bytes });
        }
        let zeros = self.ops.zeros(&[(bytes / WORD) as usize], dtype::U32)?;
        let array = self.ops.contiguous(&zeros)?;
        self.ops.evaluate(&[&array])?;
        Ok(MlxStorage(array))
    }

    fn write(&self, to: &mut MlxStorage, offset: u64, bytes: &[u8]) -> Result<()> {
        let to = to.bytes_mut()?;
        let len = to.len();
        let start = usize::try_from(offset).map_err(|_| outside(len, offset, bytes.len()))?;
        let end = start.checked_add(bytes.len()).filter(|&end| end <= len);
        let end = end.ok_or_else(|| outside(len, offset, bytes.len()))?;
        to[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, from: &MlxStorage, offset: u64, out: &mut [u8]) -> Result<()> {
        // SAFETY: words are bytes.
        let from = unsafe { from.0.words()?.align_to::<u8>().1 };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(out.len()).filter(|&end| end <= from.len());
        let end = end.ok_or_else(|| outside(from.len(), offset, out.len()))?;
        out.copy_from_slice(&from[start..end]);
        Ok(())
    }

    fn copy(&self, _: CopySide<Self>, _: CopySide<Self>, _: u64) -> Result<Completion> {
        let reason = "a region with several owners cannot be written to";
        Err(crate::library::device_error(reason))
    }
}

/// A region of the pool as an array. The array is valid for as long as this lives.
pub(crate) struct Placed {
    array: Array,
    region: DeviceBufferHandle<MlxMemory>,
}

impl Placed {
    /// Lets `fill` write `words` words in place and shows them as numbers of type `dtype` with this
    /// shape.
    pub(crate) fn new(
        ops: &Ops,
        pool: &Pool,
        pattern: AccessPattern,
        words: usize,
        dtype: i32,
        shape: &[usize],
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Self> {
        let mut region = pool.take((words as u64).saturating_mul(WORD), pattern)?;
        let storage = region
            .buffer_mut()
            .ok_or_else(|| crate::library::device_error("a fresh region has several owners"))?;
        fill(&mut storage.bytes_mut()?[..words * WORD as usize]);
        let placed = Self::show(ops, region, words, dtype, shape)?;
        // A view that has been made is a constant where it is used, not a part of the graph.
        ops.evaluate(&[&placed.array])?;
        Ok(placed)
    }

    /// The first words of a region as numbers.
    fn show(
        ops: &Ops,
        region: DeviceBufferHandle<MlxMemory>,
        words: usize,
        dtype: i32,
        shape: &[usize],
    ) -> Result<Self> {
        let array = ops.slice_rows(&region.buffer().0, 0, words)?;
        let array = if dtype == dtype::U32 { array } else { ops.view(&array, dtype)? };
        let array = ops.reshape(&array, shape)?;
        Ok(Self { array, region })
    }

    /// As [`Placed::new`], for numbers.
    pub(crate) fn floats(ops: &Ops, pool: &Pool, values: &[f32], shape: &[usize]) -> Result<Self> {
        Self::new(ops, pool, AccessPattern::Weights, values.len(), dtype::F32, shape, |bytes| {
            for (out, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *out = value.to_ne_bytes();
            }
        })
    }

    /// The indices of a step, as `(values)` integers.
    pub(crate) fn indices(ops: &Ops, memory: &Memory, values: &[i32]) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let mut region = memory.pool().take(bytes.len() as u64, AccessPattern::Upload)?;
        memory.copy_to_gpu_async(&bytes, &mut region, 0)?.wait()?;
        Self::show(ops, region, values.len(), dtype::I32, &[values.len()])
    }

    pub(crate) fn array(&self) -> &Array {
        &self.array
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.region.bytes()
    }
}
