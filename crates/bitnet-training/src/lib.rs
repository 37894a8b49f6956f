//! How are ternary weights learnt?
//!
//! `bitnet-training` trains the models the engine runs, of the families `bitnet` and `llama`, with
//! the engine's own arithmetic in the forward pass and straight-through gradients in the backward
//! pass.

#![forbid(unsafe_code)]

mod attention;
pub mod batch;
pub mod checkpoint;
pub mod data;
pub mod distill;
pub mod error;
pub mod export;
mod head;
mod linear;
mod matmul;
pub mod model;
pub mod optimizer;
pub mod recipe;
pub mod run;
pub mod schedule;
pub mod teacher;
pub mod tokenizer;
pub mod trainer;
mod vector;
mod weights;
mod worker;

pub use batch::Batch;
pub use error::{Error, Result};
pub use model::{Model, Parameter, ParameterKind, Precision};
pub use optimizer::AdamW;
pub use schedule::{Schedule, Shape};
pub use trainer::{StepStats, TrainOptions, Trainer};
