//! The CPU backend: the definition of correct for every device.

mod input;
pub mod linear;
pub mod math;
