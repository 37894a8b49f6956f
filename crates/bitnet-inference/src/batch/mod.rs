//! Many inputs through one model: fixed batches, batches that adapt, and a queue with workers.
//!
//! None of this schedules anything on the device: sequences share the model's steps because the
//! engine's own scheduler lets them. What stands here decides how many are in work at a time, so
//! that memory, latency and queues stay within what the caller allows. Results never depend on it.
//!
//! | type | for |
//! |---|---|
//! | [`BatchProcessor`] | a list of inputs, within a number and a memory bound |
//! | [`DynamicBatchProcessor`] | the same, with a batch size that follows memory and latency |
//! | [`ParallelInferenceProcessor`] | inputs that arrive one by one, from several threads, without end |

mod dynamic;
mod parallel;
mod processor;
mod task;

pub use dynamic::{BatchStatistics, DynamicBatchConfig, DynamicBatchProcessor};
pub use parallel::{
    Ordered, ParallelConfig, ParallelInferenceProcessor, ParallelStatistics, Pending, Shutdown,
};
pub use processor::BatchProcessor;
