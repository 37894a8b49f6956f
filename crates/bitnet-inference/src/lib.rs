//! How does a prompt become text?
//!
//! `bitnet-inference` opens a model file, brings it onto a device, and generates: tokens join and
//! leave the model's steps as they come, share what they have in common, and every request gets the
//! tokens it would get alone.
//!
//! ```
//! use bitnet_inference::{GenerationOptions, InferenceEngine};
//!
//! let engine = InferenceEngine::builder().build_blocking()?;
//! let model = engine.load_model_blocking("builtin")?;
//! for chunk in engine.stream(&model, "Once upon a time", &GenerationOptions::default().max_tokens(10))? {
//!     print!("{}", chunk?.text);
//! }
//! # Ok::<(), bitnet_inference::InferenceError>(())
//! ```
//!
//! The modules in the order of the data: [`engine`] → `tokenizer` → `request` → `scheduler` →
//! `worker` → [`decoder`] (on a [`Backend`](bitnet_core::backend::Backend)) → `sampler` →
//! `detokenizer` → [`stream`].
#![forbid(unsafe_code)]

pub mod backend;
pub mod batch;
pub mod bench;
pub mod builder;
pub mod builtin;
mod cache;
pub mod chat_template;
pub mod config;
pub mod decoder;
pub mod detokenizer;
pub mod device;
mod draft;
pub mod embed;
pub mod engine;
pub mod error;
pub mod eval;
pub mod grammar;
pub mod input;
mod kv_blocks;
pub mod model;
pub mod options;
pub mod request;
pub mod sampler;
mod scheduler;
mod score;
mod sequence;
mod smart;
pub mod source;
mod speculate;
pub mod stop;
pub mod stream;
pub mod synthetic;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tokenizer;
mod wait;
mod worker;

pub use batch::{
    BatchProcessor, DynamicBatchProcessor, ParallelConfig, ParallelInferenceProcessor,
};
pub use bitnet_core::backend::KvType;
pub use builder::InferenceEngineBuilder;
pub use builtin::BUILTIN_MODEL;
pub use chat_template::{ChatOptions, ChatTemplate, Message};
pub use config::{EngineConfig, MemorySize, OptimizationLevel};
pub use device::{Device, InferenceContext, is_metal_available, is_mlx_available};
pub use embed::{Embedding, Pooling};
pub use engine::InferenceEngine;
pub use error::{InferenceError, ModelError};
pub use grammar::Grammar;
pub use input::{InferenceInput, InferenceOutput};
pub use model::{Model, ModelStats};
pub use options::GenerationOptions;
pub use request::{FinishReason, GeneratedToken, RequestContext, Usage};
pub use stream::{Chunk, Generation, TokenStream};
