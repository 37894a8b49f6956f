//! Options that several commands share: which model, how the engine runs it, how text is sampled.
//!
//! Each group is one struct that a command flattens into its own arguments. A flag that is not given
//! changes nothing, so that defaults live in the engine alone.

mod engine;
mod sampling;

pub(crate) use engine::{DraftArg, EngineArgs, KvArg, ModelArg, as_usage, kernel_name};
pub(crate) use sampling::{SamplingArgs, fresh_seed};
