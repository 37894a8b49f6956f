//! The face of a loaded model towards the engine: run a batch, say what it costs.
//!
//! [`InferenceBackend`] hides which device a [`Decoder`](crate::decoder::Decoder) lives on, so that
//! the scheduler and the worker are written once.

use bitnet_core::backend::{Batch, DeviceInfo, KvSpec, MemoryUsage};

/// What a step reads and computes, so that its time can be held against the machine's limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepCost {
    /// Bytes of the layers' weights as they lie on the device; every step reads them once.
    pub layer_bytes: u64,
    /// 8-bit multiply-accumulates in ternary projections, for each token of a step.
    pub ternary_macs: u64,
}

/// A model on a device.
///
/// A row's logits are a function of its own sequence alone: whatever else is in the batch, they are
/// the same to the last bit (on the CPU).
pub trait InferenceBackend: Send + Sync {
    /// Runs one step. Afterwards `logits` holds `(batch.logit_rows.len(), vocab_size)`, row-major.
    ///
    /// The caller guarantees that token ids are below the vocabulary size, that positions are below
    /// the maximum the model was loaded for, and that block tables cover them.
    fn execute_batch(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> bitnet_core::Result<()>;

    /// Runs one step and returns the residual stream of every row: after the embedding, after each
    /// layer, the last one after the final norm. `(layers + 1)` times `(tokens, hidden_size)`.
    fn hidden_states(&mut self, batch: &Batch) -> bitnet_core::Result<Vec<Vec<f32>>>;

    /// Runs one step and leaves the last of [`hidden_states`](Self::hidden_states) in `states`:
    /// `(tokens, hidden_size)` after the final norm.
    fn final_states(&mut self, batch: &Batch, states: &mut Vec<f32>) -> bitnet_core::Result<()> {
        *states = self.hidden_states(batch)?.pop().unwrap_or_default();
        Ok(())
    }

    /// Shape of the paged KV cache.
    fn kv_spec(&self) -> KvSpec;

    /// What a step reads and computes besides the KV cache and the head; zeros if not known.
    fn step_cost(&self) -> StepCost {
        StepCost::default()
    }

    /// Bytes of the output head that a step with logits reads, at least; see [`Batch::n_best`].
    /// Zero if not known.
    fn head_bytes(&self, n_best: Option<usize>) -> u64 {
        let _ = n_best;
        0
    }

    /// The device it runs on.
    fn device(&self) -> DeviceInfo;

    /// Bytes it holds there.
    fn get_memory_usage(&self) -> MemoryUsage;
}
