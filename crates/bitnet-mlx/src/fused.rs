//! Functions that MLX compiles into one kernel each, where it can: the quantization of activations
//! and the gates of the feed-forward block.
//!
//! On a GPU MLX's compiler is part of the library. On Linux it calls a C++ compiler at run time, so
//! there it is used on request only; the same graphs are then built node by node.

use crate::array::{Array, Ops, Vector};
use crate::ffi::{RawClosure, RawVector};
use bitnet_core::Result;
use bitnet_core::backend::Activation;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;

/// A function of arrays.
type Body = fn(&Ops, &[Array]) -> Result<Vec<Array>>;

/// What a compiled function needs when it is traced.
struct Payload {
    ops: Ops,
    body: Body,
    n_args: usize,
}

/// A compiled function.
struct Closure {
    ops: Ops,
    raw: RawClosure,
}

// SAFETY: the library's closure owns its payload, which is `Send`, and is applied under the
// library's lock.
unsafe impl Send for Closure {}
// SAFETY: as above.
unsafe impl Sync for Closure {}

/// Builds the graph of a function when MLX traces it.
unsafe extern "C" fn trace(
    results: *mut RawVector,
    args: RawVector,
    payload: *mut c_void,
) -> c_int {
    // SAFETY: the payload is the one `Closure::new` handed over with this function, and lives as
    // long as the closure.
    let payload = unsafe { &*payload.cast::<Payload>() };
    let Payload { ops, body, n_args } = payload;
    // The list belongs to the library.
    let args = ManuallyDrop::new(Vector::from_raw(ops.mlx, args));
    let run = || -> Result<()> {
        let args = (0..*n_args).map(|i| args.get(i)).collect::<Result<Vec<_>>>()?;
        let arrays = body(ops, &args)?;
        // SAFETY: the library passes a live list to put the results into.
        unsafe { Vector::fill(ops.mlx, results, &arrays) }
    };
    c_int::from(run().is_err())
}

/// Drops a payload.
unsafe extern "C" fn drop_payload(payload: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `Closure::new`; the library calls this once.
    drop(unsafe { Box::from_raw(payload.cast::<Payload>()) });
}

impl Closure {
    fn new(ops: &Ops, n_args: usize, body: Body) -> Result<Self> {
        let f = &ops.mlx.functions;
        let payload = Box::into_raw(Box::new(Payload { ops: ops.clone(), body, n_args }));
        // SAFETY: both functions take the payload they are given here, which now belongs to the
        // closure.
        let plain =
            unsafe { (f.mlx_closure_new_func_payload)(trace, payload.cast(), Some(drop_payload)) };
        if plain.0.is_null() {
            return Err(ops.mlx.null_error("mlx_closure_new_func_payload"));
        }
        let plain = Self { ops: ops.clone(), raw: plain };
        let mut compiled = Self { ops: ops.clone(), raw: RawClosure::NULL };
        // Any number of rows without compiling again.
        let shapeless = true;
        // SAFETY: `plain` is live; the null handle is what the function fills in.
        let status = unsafe { (f.mlx_compile)(&raw mut compiled.raw, plain.raw, shapeless) };
        ops.mlx.check(status, "mlx_compile").map(|()| compiled)
    }

    fn apply(&self, args: &[&Array], n_results: usize) -> Result<Vec<Array>> {
        let mlx = self.ops.mlx;
        let args = Vector::new(mlx, args)?;
        let mut results = RawVector::NULL;
        let status = {
            let _evaluation = mlx.evaluation();
            // SAFETY: closure and list are live; the null handle is what the function fills in.
            unsafe { (mlx.functions.mlx_closure_apply)(&raw mut results, self.raw, args.0) }
        };
        let results = Vector::from_raw(mlx, results);
        mlx.check(status, "mlx_closure_apply")?;
        (0..n_results).map(|i| results.get(i)).collect()
    }
}

impl Drop for Closure {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's own and is freed once; freeing null is allowed.
        unsafe { (self.ops.mlx.functions.mlx_closure_free)(self.raw) };
    }
}

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
    /// Compiles the functions if `compile`; MLX does the work when they are first applied.
    pub(crate) fn new(ops: &Ops, compile: bool) -> Result<Self> {
        let compiled = match compile {
            true => Some([
                Closure::new(ops, 1, quantize)?,
                Closure::new(ops, 2, relu2)?,
                Closure::new(ops, 2, silu)?,
            ]),
            false => None,
        };
        Ok(Self { ops: ops.clone(), compiled })
    }

    pub(crate) fn is_compiled(&self) -> bool {
        self.compiled.is_some()
    }

    fn call(
        &self,
        index: usize,
        body: Body,
        args: &[&Array],
        n_results: usize,
    ) -> Result<Vec<Array>> {
        match &self.compiled {
            Some(functions) => functions[index].apply(args, n_results),
            None => {
                let args: Vec<Array> = args.iter().map(|&array| array.clone()).collect();
                body(&self.ops, &args)
            }
        }
    }

    /// Activations `(…, n)` on the grid of 8-bit integers, and what one unit is worth `(…, 1)`.
    pub(crate) fn quantize(&self, x: &Array) -> Result<(Array, Array)> {
        let mut results = self.call(0, quantize, &[x], 2)?.into_iter();
        match (results.next(), results.next()) {
            (Some(codes), Some(scale)) => Ok((codes, scale)),
            _ => Err(crate::library::device_error("quantize: too few results")),
        }
    }

    /// `activation(gate) · up`
    pub(crate) fn gate(&self, activation: Activation, gate: &Array, up: &Array) -> Result<Array> {
        let results = match activation {
            Activation::Relu2 => self.call(1, relu2, &[gate, up], 1),
            Activation::Silu => self.call(2, silu, &[gate, up], 1),
        };
        let first = results?.into_iter().next();
        first.ok_or_else(|| crate::library::device_error("gate: no result"))
    }
}
