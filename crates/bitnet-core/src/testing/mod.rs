//! The conformance suite: what a backend must compute, checked against plain definitions in f64.
//!
//! A backend is done when [`conformance`] passes. Integer parts must be exact; float parts lie
//! within tolerances derived from the sizes and the formats, written where they are used, which
//! leave each device its own order of summation. What must not depend on the composition of a
//! batch is compared bit for bit. The suite talks to a backend through its contract alone.

mod attention;
mod inputs;
mod projections;
mod tables;

use crate::backend::{Backend, Batch, SequenceSlice, TableRole};
use crate::weights::FloatType;
use inputs::Floats;
use std::sync::Arc;

/// Runs every check on backends from `make`; returns all results in order, so that those of two
/// configurations can be compared bit for bit.
///
/// # Panics
/// If the backend does not do what its contract says.
pub fn conformance<B: Backend>(make: impl Fn() -> B) -> Vec<f32> {
    let mut record = Vec::new();
    tables::embedding_copies_rows(&make, &mut record);
    tables::logits_are_dot_products(&make, &mut record);
    tables::reading_normalizes(&make, &mut record);
    projections::ternary_products_are_exact(&make, &mut record);
    projections::ternary_projections(&make, &mut record);
    projections::float_projections(&make, &mut record);
    projections::accumulation_and_gates(&make, &mut record);
    projections::a_row_is_alone(&make);
    attention::attention_matches_the_definition(&make, &mut record);
    attention::the_partition_of_a_sequence_does_not_matter(&make, &mut record);
    attention::memory_is_accounted_for(&make);
    record
}

/// A step of `rows` single-token sequences with tokens `0..rows`, all logits wanted: for the
/// operations that know no positions.
fn rows_batch(rows: usize) -> Batch {
    Batch {
        tokens: (0..rows as u32).collect(),
        sequences: (0..rows)
            .map(|row| SequenceSlice {
                rows: row..row + 1,
                first_position: 0,
                blocks: vec![row as u32],
            })
            .collect(),
        logit_rows: (0..rows).collect(),
        ..Batch::default()
    }
}

/// A buffer with these rows `(rows, width)`, brought to the device as embeddings of the tokens
/// `0..rows` of the current step.
fn upload<B: Backend>(backend: &mut B, x: &[f32], width: usize) -> B::Buffer {
    let rows = x.len() / width;
    let source = Floats::new(rows, width, x.to_vec(), Some(FloatType::F32));
    let table = backend.table(Arc::new(source), TableRole::Head).expect("a table of f32 rows");
    let mut buffer = backend.buffer(rows, width).expect("a small buffer");
    backend.embed(&table, &mut buffer).expect("tokens are rows of the table");
    buffer
}

/// The step's rows of a buffer.
fn download<B: Backend>(backend: &mut B, buffer: &B::Buffer) -> Vec<f32> {
    let mut out = vec![f32::NAN; 3];
    backend.read(buffer, None, &mut out).expect("a buffer can be read");
    out
}

/// Asserts that `got` is within `tolerance` of `want`.
fn assert_close(got: f32, want: f64, tolerance: f64, what: &dyn Fn() -> String) {
    let error = (f64::from(got) - want).abs();
    assert!(error <= tolerance, "{}: {got} for {want}, off by {error:e} > {tolerance:e}", what());
}

/// Half the distance of 1 to the next f32: the relative error of one rounding.
const ROUNDING: f64 = (f32::EPSILON / 2.0) as f64;
