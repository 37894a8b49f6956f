//! How does a prompt become text?

pub mod options;
pub mod sampler;
pub mod stop;
