//! The paged KV cache in arrays: `(slots, kv heads, features)` for each layer, keys and values apart.
//!
//! A slot is a position of a block. Arrays grow with the blocks in use, by doubling, so that a cache
//! with room for much takes little while it holds little. Storing replaces an array by one that
//! differs in the new slots; MLX writes them in place, for nobody else refers to the old one.

use crate::array::{Array, Ops};
use crate::ffi::dtype;
use bitnet_core::backend::{KvSpec, KvType};
use bitnet_core::{Error, Result};

/// What a backend keeps of one model's past.
pub(crate) struct MlxKv {
    spec: KvSpec,
    /// Blocks the arrays have room for.
    blocks: usize,
    /// Keys and values of each layer; `None` until something is stored.
    layers: Vec<[Option<Part>; 2]>,
}

/// Keys or values of a layer.
pub(crate) struct Part {
    /// `(slots, kv heads, features)`
    pub(crate) data: Array,
    /// `(slots, kv heads, 1)`: what a unit of 8-bit data is worth.
    pub(crate) scales: Option<Array>,
}

/// Blocks an array has room for at least.
const FEWEST_BLOCKS: usize = 8;

impl MlxKv {
    pub(crate) fn new(spec: KvSpec) -> Result<Self> {
        let KvSpec { n_layers, n_kv_heads, head_dim, block_tokens, n_blocks, .. } = spec;
        for (what, value) in [
            ("n_layers", n_layers),
            ("n_kv_heads", n_kv_heads),
            ("head_dim", head_dim),
            ("block_tokens", block_tokens),
            ("n_blocks", n_blocks),
        ] {
            if value == 0 {
                return Err(Error::invalid(format!("KV cache: {what}"), "0 is not positive"));
            }
        }
        let out_of_memory = || Error::OutOfMemory { what: "KV cache".into(), bytes: u64::MAX };
        // Slots are 32-bit numbers, and the sum of all bytes is an address.
        let slots = n_blocks.checked_mul(block_tokens).filter(|&n| i32::try_from(n).is_ok());
        slots.and_then(|_| Self::bytes_of(&spec)).ok_or_else(out_of_memory)?;
        let layers = (0..n_layers).map(|_| [None, None]).collect();
        Ok(Self { spec, blocks: 0, layers })
    }

    fn bytes_of(spec: &KvSpec) -> Option<u64> {
        let head = match spec.dtype {
            KvType::F32 => spec.head_dim.checked_mul(4)?,
            KvType::F16 => spec.head_dim.checked_mul(2)?,
            KvType::Q8 => spec.head_dim.checked_add(4)?,
        };
        [2, spec.n_layers, spec.block_tokens, spec.n_kv_heads, spec.n_blocks]
            .into_iter()
            .try_fold(head, |bytes, n| bytes.checked_mul(n))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .map(|bytes| bytes as u64)
    }

    /// Bytes of the whole cache; what no block used yet takes none.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        Self::bytes_of(&self.spec).unwrap_or(u64::MAX)
    }

    pub(crate) fn spec(&self) -> KvSpec {
        self.spec
    }

    /// Checks that a layer exists.
    pub(crate) fn check_layer(&self, layer: usize) -> Result<()> {
        match layer < self.spec.n_layers {
            true => Ok(()),
            false => {
                let reason = format!("{layer} of a cache of {}", self.spec.n_layers);
                Err(Error::invalid("layer", reason))
            }
        }
    }

    /// Makes room for blocks up to `highest` in a layer. Shapes are those of the current number of
    /// blocks afterwards.
    pub(crate) fn reserve(&mut self, ops: &Ops, layer: usize, highest: u32) -> Result<()> {
        let needed = highest as usize + 1;
        if needed > self.blocks {
            let doubled = needed.next_power_of_two().max(FEWEST_BLOCKS);
            self.blocks = doubled.min(self.spec.n_blocks);
        }
        let slots = self.blocks * self.spec.block_tokens;
        let (heads, dim) = (self.spec.n_kv_heads, self.spec.head_dim);
        let dtype = match self.spec.dtype {
            KvType::F32 => dtype::F32,
            KvType::F16 => dtype::F16,
            KvType::Q8 => dtype::I8,
        };
        for part in &mut self.layers[layer] {
            let grown = |old: Option<Array>, dim: usize, dtype| -> Result<Array> {
                let Some(old) = old else {
                    return ops.contiguous(&ops.zeros(&[slots, heads, dim], dtype)?);
                };
                match old.shape()[0] {
                    there if there == slots => Ok(old),
                    there => {
                        let more = ops.zeros(&[slots - there, heads, dim], dtype)?;
                        ops.concatenate_rows(&[&old, &more])
                    }
                }
            };
            let (data, scales) = match part.take() {
                Some(Part { data, scales }) => (Some(data), scales),
                None => (None, None),
            };
            let data = grown(data, dim, dtype)?;
            let scales = match self.spec.dtype {
                KvType::Q8 => Some(grown(scales, 1, dtype::F32)?),
                KvType::F32 | KvType::F16 => None,
            };
            *part = Some(Part { data, scales });
        }
        Ok(())
    }

    /// Checks that a layer holds something, with room for blocks up to `highest`.
    pub(crate) fn check_held(&self, layer: usize, highest: u32) -> Result<()> {
        self.check_layer(layer)?;
        for part in &self.layers[layer] {
            let Some(Part { data, .. }) = part else {
                let reason = format!("nothing was stored in layer {layer}");
                return Err(Error::invalid("KV cache", reason));
            };
            if highest as usize >= data.shape()[0] / self.spec.block_tokens {
                let reason = format!("layer {layer} holds nothing in block {highest}");
                return Err(Error::invalid("KV cache", reason));
            }
        }
        Ok(())
    }

    /// Hands out keys and values of a layer, so that nobody else refers to them.
    pub(crate) fn take(&mut self, layer: usize) -> Result<[Part; 2]> {
        match std::mem::take(&mut self.layers[layer]) {
            [Some(keys), Some(values)] => Ok([keys, values]),
            _ => Err(Error::invalid("KV cache", format!("layer {layer} is not there"))),
        }
    }

    /// Takes back what [`take`](Self::take) handed out.
    pub(crate) fn put(&mut self, layer: usize, parts: [Part; 2]) {
        self.layers[layer] = parts.map(Some);
    }
}

impl Part {
    /// What it consists of.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        std::iter::once(&self.data).chain(&self.scales)
    }

    /// With `x` `(tokens, kv heads, features)` in `slots` `(tokens)`.
    pub(crate) fn store(self, ops: &Ops, slots: &Array, x: &Array) -> Result<Self> {
        let updates = |x: &Array| {
            let shape = x.shape();
            ops.reshape(x, &[shape[0], 1, shape[1], shape[2]])
        };
        let Self { data, scales } = self;
        let Some(scales) = scales else {
            let x = match data.dtype() {
                dtype::F32 => x.clone(),
                other => ops.cast(x, other)?,
            };
            return Ok(Self { data: ops.scatter_rows(data, slots, &updates(&x)?)?, scales: None });
        };
        let largest = ops.max_last(&ops.abs(x)?)?;
        // A head of zeros has no scale; any will do.
        let least = ops.floats(&[f32::MIN_POSITIVE * 128.0], &[])?;
        let unit = ops.divide(&ops.maximum(&largest, &least)?, &ops.floats(&[127.0], &[])?)?;
        let codes = ops.round(&ops.divide(x, &unit)?)?;
        let codes = ops.cast(&codes, dtype::I8)?;
        Ok(Self {
            data: ops.scatter_rows(data, slots, &updates(&codes)?)?,
            scales: Some(ops.scatter_rows(scales, slots, &updates(&unit)?)?),
        })
    }

    /// What is in `blocks` of `block_tokens` slots, the first `positions` of it or all, in f32: `(1, kv
    /// heads, positions, features)`.
    pub(crate) fn gather(
        &self,
        ops: &Ops,
        block_tokens: usize,
        blocks: &Array,
        positions: Option<usize>,
    ) -> Result<Array> {
        let rows = |array: &Array| -> Result<Array> {
            let shape = array.shape();
            let (slots, heads, width) = (shape[0], shape[1], shape[2]);
            let paged = ops.reshape(array, &[slots / block_tokens, block_tokens, heads, width])?;
            let taken = ops.take_rows(&paged, blocks)?;
            let all = taken.shape()[0] * block_tokens;
            let flat = ops.reshape(&taken, &[all, heads, width])?;
            match positions {
                Some(positions) => ops.cast(&ops.slice_rows(&flat, 0, positions)?, dtype::F32),
                None => ops.cast(&flat, dtype::F32),
            }
        };
        let mut x = rows(&self.data)?;
        if let Some(scales) = &self.scales {
            x = ops.multiply(&x, &rows(scales)?)?;
        }
        let x = ops.transpose(&x, &[1, 0, 2])?;
        let shape = x.shape();
        ops.reshape(&x, &[1, shape[0], shape[1], shape[2]])
    }
}
