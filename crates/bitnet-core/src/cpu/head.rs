//! Embedding tables and output heads: rows of floats, looked up by token or multiplied by all.
//!
//! A table keeps the bytes of its source where that has plain numbers, so that one mapped copy
//! serves as embedding and as head. Knows token ids as row numbers only.

use super::shortlist::{Rows, Shortlist, ShortlistScratch};
use crate::backend::TableRole;
use crate::error::{Error, Result};
use crate::kernels::{FloatMatrix, Kernels, WeightMemory};
use crate::noise::Noise;
use crate::threads::ThreadPool;
use crate::weights::{FloatRows, NormWeights};

/// Buffers of the head, to be used again.
#[derive(Debug, Default)]
pub(crate) struct HeadScratch {
    normed: Vec<f32>,
    shortlist: ShortlistScratch,
}

impl HeadScratch {
    /// Bytes held.
    pub(crate) fn memory_bytes(&self) -> u64 {
        4 * self.normed.capacity() as u64 + self.shortlist.memory_bytes()
    }
}

/// Which logits a step wants.
pub(crate) struct Wanted<'a> {
    /// Rows of the input.
    pub(crate) rows: &'a [usize],
    /// How many of the largest; all if none.
    pub(crate) n_best: Option<usize>,
    /// What is added before the largest are chosen, one for each row; empty for nothing.
    pub(crate) noise: &'a [Noise],
}

/// An embedding table `(vocab, hidden)`, which may serve as output head too.
pub struct CpuTable {
    matrix: FloatMatrix,
    shortlist: Option<Shortlist>,
}

impl CpuTable {
    /// Takes the source's bytes; a source without plain numbers is decoded to f16. A large output
    /// head gets an 8-bit copy that finds its best rows.
    ///
    /// # Errors
    /// As [`FloatMatrix::new`].
    pub fn new(
        source: &dyn FloatRows,
        role: TableRole,
        kernels: &Kernels,
        pool: &ThreadPool,
        memory: &mut WeightMemory,
    ) -> Result<Self> {
        let matrix = FloatMatrix::new(source, pool, memory)?;
        let shortlist = match role {
            TableRole::Embedding => None,
            TableRole::Head => Shortlist::new(&matrix, source.rounded(), kernels, pool, memory)?,
        };
        if shortlist.is_some() {
            source.release();
        }
        Ok(Self { matrix, shortlist })
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
        self.matrix.memory_bytes() + self.shortlist.as_ref().map_or(0, Shortlist::memory_bytes)
    }

    /// Bytes that [`CpuTable::logits`] reads, at least: of two copies, one.
    pub(crate) fn bytes_read(&self, n_best: Option<usize>) -> u64 {
        match (&self.shortlist, n_best) {
            (Some(list), Some(_)) => list.memory_bytes(),
            _ => self.matrix.memory_bytes(),
        }
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

    /// `out = norm(x[rows]) · tableᵀ`, `(rows, vocab)`. With `n_best`, only the logits of each row
    /// that are its largest after noise are sure to be there; others may be −∞.
    ///
    /// # Errors
    /// [`Error::Shape`] if `norm` or a row is not within `x` `(…, hidden)`.
    pub(crate) fn logits(
        &self,
        pool: &ThreadPool,
        kernels: &Kernels,
        x: &[f32],
        norm: &NormWeights,
        wanted: &Wanted<'_>,
        scratch: &mut HeadScratch,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (hidden, rows) = (self.hidden(), wanted.rows);
        if norm.weight.len() != hidden {
            return Err(Error::shape("norm before the head", hidden, norm.weight.len()));
        }
        let HeadScratch { normed, shortlist } = scratch;
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
        match (&self.shortlist, wanted.n_best) {
            (Some(list), Some(n)) => {
                let x = Rows { x: normed, noise: wanted.noise };
                list.logits(&self.matrix, pool, kernels, x, n, shortlist, out);
            }
            _ => self.matrix.project(pool, kernels, normed, rows.len(), out),
        }
        Ok(())
    }
}
