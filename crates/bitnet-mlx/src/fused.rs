//! Functions that MLX can compile into one kernel each: the quantization of activations and the gates
//! of the feed-forward block. Steps that are compiled as a whole (`program`) use their plain form.

use crate::array::{Array, Ops};
use crate::closure::Closure;
use bitnet_core::Result;
use bitnet_core::backend::Activation;

/// A function of arrays.
type Body = fn(&Ops, &[Array]) -> Result<Vec<Array>>;

/// `x` `(…, n)` → codes on the grid of 8-bit integers and what one unit is worth, `(…, 1)`.
fn quantize(ops: &Ops, args: &[Array]) -> Result<Vec<Array>> {
    let constant = |value: f32| ops.floats(&[value], &[]);
    let largest = ops.max_last(&ops.abs(&args[0])?)?;
    let largest = ops.maximum(&largest, &constant(1e-5)?)?;
    let factor = ops.divide(&constant(127.0)?, &largest)?;
    let codes = ops.round(&ops.multiply(&args[0], &factor)?)?;
    Ok(vec![codes, ops.divide(&largest, &constant(127.0)?)?])
}

/// `max(gate, 0)² · up`
fn relu2(ops: &Ops, args: &[Array]) -> Result<Vec<Array>> {
    let positive = ops.maximum(&args[0], &ops.floats(&[0.0], &[])?)?;
    Ok(vec![ops.multiply(&ops.square(&positive)?, &args[1])?])
}

/// `gate / (1 + e^−gate) · up`
fn silu(ops: &Ops, args: &[Array]) -> Result<Vec<Array>> {
    let gate = ops.multiply(&args[0], &ops.sigmoid(&args[0])?)?;
    Ok(vec![ops.multiply(&gate, &args[1])?])
}

/// The functions, compiled or not.
pub(crate) struct Fused {
    ops: Ops,
    compiled: Option<[Closure; 3]>,
}

impl Fused {
    /// Has the functions compiled if `compile`; MLX does the work when they are first applied.
    pub(crate) fn new(ops: &Ops, compile: bool) -> Result<Self> {
        let compiled = match compile {
            true => {
                let [quantize, relu2, silu] = [quantize as Body, relu2, silu].map(|body| {
                    Closure::new(ops, true, true, Box::new(move |ops, args| body(ops, &args)))
                });
                Some([quantize?, relu2?, silu?])
            }
            false => None,
        };
        Ok(Self { ops: ops.clone(), compiled })
    }

    fn call(&self, index: usize, body: Body, args: &[&Array]) -> Result<Vec<Array>> {
        match &self.compiled {
            Some(functions) => functions[index].apply(args),
            None => {
                let args: Vec<Array> = args.iter().map(|&array| array.clone()).collect();
                body(&self.ops, &args)
            }
        }
    }

    /// Activations `(…, n)` on the grid of 8-bit integers, and what one unit is worth `(…, 1)`.
    pub(crate) fn quantize(&self, x: &Array) -> Result<(Array, Array)> {
        let mut results = self.call(0, quantize, &[x])?.into_iter();
        match (results.next(), results.next()) {
            (Some(codes), Some(scale)) => Ok((codes, scale)),
            _ => Err(crate::library::device_error("quantize: too few results")),
        }
    }

    /// `activation(gate) · up`
    pub(crate) fn gate(&self, activation: Activation, gate: &Array, up: &Array) -> Result<Array> {
        let results = match activation {
            Activation::Relu2 => self.call(1, relu2, &[gate, up]),
            Activation::Silu => self.call(2, silu, &[gate, up]),
        };
        let first = results?.into_iter().next();
        first.ok_or_else(|| crate::library::device_error("gate: no result"))
    }
}
