//! One file for each command: its arguments, its help, and what it does.

pub(crate) mod batch;
pub(crate) mod bench;
pub(crate) mod bench_serve;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod devices;
pub(crate) mod eval;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod quantize;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod tokenizer;
pub(crate) mod train;
