//! The smallest work of all: one ternary product, for the cost that does not come from bytes.

use std::time::{Duration, Instant};

use bitnet_core::backend::{Backend, Batch, SequenceSlice, TableRole};
use bitnet_core::cpu::CpuBackend;
use bitnet_quant::config::ModelConfig;

use super::Sample;
use crate::error::{InferenceError, Result};
use crate::source::WeightSource;
use crate::synthetic::{SyntheticModel, SyntheticShape};

/// How many products of a `size × size` ternary layer with one vector a single thread computes in
/// a second: quantizing the input and rescaling the output included, through the same operation
/// the decoder uses.
///
/// # Errors
/// A kernel this CPU does not have.
pub fn products_per_second(
    size: usize,
    kernel: Option<&str>,
    repetitions: usize,
) -> Result<Sample> {
    measure(size, kernel, repetitions, Duration::from_millis(200))
}

fn measure(
    size: usize,
    kernel: Option<&str>,
    repetitions: usize,
    each: Duration,
) -> Result<Sample> {
    let device = |e| InferenceError::device("a ternary product", e);
    let config = ModelConfig {
        hidden_size: size,
        num_attention_heads: 1,
        head_dim: size,
        vocab_size: 1,
        ..SyntheticShape::Bitnet2B4T.config()
    };
    let source = SyntheticModel::new(config, 0);
    let mut backend = CpuBackend::new(Some(1), kernel).map_err(device)?;
    let linear =
        backend.linear(&source.linear("model.layers.0.self_attn.q_proj")?).map_err(device)?;
    let table =
        backend.table(source.table("model.embed_tokens")?, TableRole::Embedding).map_err(device)?;
    let mut x = backend.buffer(1, size).map_err(device)?;
    let mut y = backend.buffer(1, size).map_err(device)?;
    let slice = SequenceSlice { rows: 0..1, first_position: 0, blocks: vec![0] };
    let batch = Batch { tokens: vec![0], sequences: vec![slice], ..Batch::default() };
    backend.begin(&batch).map_err(device)?;
    backend.embed(&table, &mut x).map_err(device)?;

    let mut products = |n: usize| -> Result<()> {
        for _ in 0..n {
            backend.project(&x, None, &[&linear], &mut [&mut y]).map_err(device)?;
        }
        Ok(())
    };
    // Enough at a time that looking at the clock costs nothing.
    const BUNCH: usize = 100;
    let mut rates = Vec::with_capacity(repetitions);
    for repetition in 0..=repetitions {
        let started = Instant::now();
        let mut n = 0;
        while started.elapsed() < each {
            products(BUNCH)?;
            n += BUNCH;
        }
        if repetition > 0 {
            rates.push(n as f64 / started.elapsed().as_secs_f64());
        }
    }
    let mut result = Vec::new();
    backend.read(&y, None, &mut result).map_err(device)?;
    backend.finish().map_err(device)?;
    if result.iter().any(|x| !x.is_finite()) || result.iter().all(|&x| x == 0.0) {
        return Err(InferenceError::model_lacks("a ternary product", "its result is not a vector"));
    }
    Ok(Sample::new(rates))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_counted() {
        let sample = measure(256, None, 2, Duration::from_millis(5)).unwrap();
        assert_eq!(sample.values().len(), 2);
        assert!(sample.mean() > 100.0, "{sample:?}");
        assert!(measure(256, Some("none"), 1, Duration::ZERO).is_err());
    }
}
