//! The Metal kernels on the CPU: their text, compiled by clang++ with a stand-in for Metal's standard
//! library, runs under the same host code as on a Mac.
//!
//! Needs a clang++ of version 15 or later, so these tests are run on request:
//! `scripts/test-metal.sh`. `BITNET_CLANG` names the compiler. What this shows is the logic of the
//! kernels and of everything above them; not that Apple's compiler accepts the text, nor speed.
#![cfg(unix)]

mod conformance;
mod faults;
mod glue;
mod model;
mod oracle;
mod simulator;
