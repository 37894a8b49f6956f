//! The CPU backend: the definition of correct for every device.

pub mod math;
