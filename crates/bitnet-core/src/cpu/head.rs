//! Embedding tables and output heads: rows of floats, looked up by token or multiplied by all.
//!
//! A table keeps the bytes of its source where that has plain numbers, so that one mapped copy
//! serves as embedding and as head. Knows token ids as row numbers only.

use crate::error::{Error, Result};
use crate::kernels::{FloatMatrix, Kernels, WeightMemory};
use crate::threads::ThreadPool;
use crate::weights::{FloatRows, NormWeights};

/// An embedding table `(vocab, hidden)`, which may serve as output head too.
pub struct CpuTable {
    matrix: FloatMatrix,
}

impl CpuTable {
    /// Takes the source's bytes; a source without plain numbers is decoded to f16.
    ///
    /// # Errors
    /// As [`FloatMatrix::new`].
    pub fn new(
        source: &dyn FloatRows,
        pool: &ThreadPool,
        memory: &mut WeightMemory,
    ) -> Result<Self> {
        Ok(Self { matrix: FloatMatrix::new(source, pool, memory)? })
    }

    /// Rows.
    pub fn vocab(&self) -> usize {
        self.matrix.rows()
    }

    /// Features of a row.
    pub fn hidden(&self) -> usize {
        self.matrix.cols()
    }

    /// Bytes held, mapped ones included.
    pub fn memory_bytes(&self) -> u64 {
        self.matrix.memory_bytes()
    }

    /// `x[i] = table[tokens[i]]`, `x` `(tokens, hidden)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` has another size, [`Error::Invalid`] for a token outside the table.
    pub fn embed(&self, tokens: &[u32], x: &mut [f32]) -> Result<()> {
        let hidden = self.hidden();
        if x.len() != tokens.len() * hidden {
            let want = format!("{} rows of {hidden}", tokens.len());
            return Err(Error::shape("embeddings", want, x.len()));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.vocab()) {
            let reason = format!("{token} of a vocabulary of {}", self.vocab());
            return Err(Error::invalid("token", reason));
        }
        for (&token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            self.matrix.decode_row(token as usize, x);
        }
        Ok(())
    }

    /// `out = norm(x[rows]) · tableᵀ`, `(rows, vocab)`; `normed` is a buffer to reuse.
    ///
    /// # Errors
    /// [`Error::Shape`] if `norm` or a row is not within `x` `(…, hidden)`.
    pub fn logits(
        &self,
        pool: &ThreadPool,
        kernels: &Kernels,
        x: &[f32],
        rows: &[usize],
        norm: &NormWeights,
        normed: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let hidden = self.hidden();
        if norm.weight.len() != hidden {
            return Err(Error::shape("norm before the head", hidden, norm.weight.len()));
        }
        normed.resize(rows.len() * hidden, 0.0);
        for (&row, normed) in rows.iter().zip(normed.chunks_exact_mut(hidden)) {
            match row.checked_mul(hidden).and_then(|at| x.get(at..)?.get(..hidden)) {
                Some(x) => kernels.norm(x, norm, normed),
                None => {
                    let want = format!("at least {} rows of {hidden}", row.saturating_add(1));
                    return Err(Error::shape("input of the head", want, x.len()));
                }
            }
        }
        let len = rows.len().saturating_mul(self.vocab());
        let out_of_memory =
            |_| Error::OutOfMemory { what: "logits".into(), bytes: (len as u64).saturating_mul(4) };
        out.try_reserve(len.saturating_sub(out.len())).map_err(out_of_memory)?;
        out.resize(len, 0.0);
        self.matrix.project(pool, kernels, normed, rows.len(), out);
        Ok(())
    }
}
