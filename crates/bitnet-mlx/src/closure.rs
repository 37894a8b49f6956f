//! A function of arrays that MLX compiles: traced once for each list of shapes, then replayed.

use crate::array::{Array, Ops, Vector};
use crate::ffi::{COMPILE_ENABLED, COMPILE_NO_FUSE, RawClosure, RawVector};
use bitnet_core::Result;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;

/// A function of arrays, which builds a graph.
pub(crate) type Body = Box<dyn Fn(&Ops, Vec<Array>) -> Result<Vec<Array>> + Send>;

/// What a compiled function needs when it is traced.
struct Payload {
    ops: Ops,
    body: Body,
}

/// A compiled function.
pub(crate) struct Closure {
    ops: Ops,
    raw: RawClosure,
    fuse: bool,
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
    let Payload { ops, body } = unsafe { &*payload.cast::<Payload>() };
    // The list belongs to the library.
    let args = ManuallyDrop::new(Vector::from_raw(ops.mlx, args));
    let run = || -> Result<()> {
        let args = (0..args.len()).map(|i| args.get(i)).collect::<Result<Vec<_>>>()?;
        let arrays = body(ops, args)?;
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
    /// Has `body` compiled; MLX does the work when the function is first applied. A `shapeless`
    /// function is traced once for all shapes, which few operations allow; `fuse` makes kernels of what
    /// is computed number by number.
    pub(crate) fn new(ops: &Ops, shapeless: bool, fuse: bool, body: Body) -> Result<Self> {
        let f = &ops.mlx.functions;
        let payload = Box::into_raw(Box::new(Payload { ops: ops.clone(), body }));
        // SAFETY: both functions take the payload they are given here, which now belongs to the
        // closure.
        let plain =
            unsafe { (f.mlx_closure_new_func_payload)(trace, payload.cast(), Some(drop_payload)) };
        if plain.0.is_null() {
            return Err(ops.mlx.null_error("mlx_closure_new_func_payload"));
        }
        let plain = Self { ops: ops.clone(), raw: plain, fuse };
        let mut compiled = Self { ops: ops.clone(), raw: RawClosure::NULL, fuse };
        // SAFETY: `plain` is live; the null handle is what the function fills in.
        let status = unsafe { (f.mlx_compile)(&raw mut compiled.raw, plain.raw, shapeless) };
        ops.mlx.check(status, "mlx_compile").map(|()| compiled)
    }

    /// The results for `args`, as nodes of a graph.
    pub(crate) fn apply(&self, args: &[&Array]) -> Result<Vec<Array>> {
        let mlx = self.ops.mlx;
        let args = Vector::new(mlx, args)?;
        let mut results = RawVector::NULL;
        let status = {
            // The mode is the whole process's, and asked for when a function is traced.
            let _evaluation = mlx.evaluation();
            let mode = if self.fuse { COMPILE_ENABLED } else { COMPILE_NO_FUSE };
            // SAFETY: the mode is one of the library's.
            let status = unsafe { (mlx.functions.mlx_set_compile_mode)(mode) };
            mlx.check(status, "mlx_set_compile_mode")?;
            // SAFETY: closure and list are live; the null handle is what the function fills in.
            unsafe { (mlx.functions.mlx_closure_apply)(&raw mut results, self.raw, args.0) }
        };
        let results = Vector::from_raw(mlx, results);
        mlx.check(status, "mlx_closure_apply")?;
        (0..results.len()).map(|i| results.get(i)).collect()
    }
}

impl Drop for Closure {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's own and is freed once; freeing null is allowed.
        unsafe { (self.ops.mlx.functions.mlx_closure_free)(self.raw) };
    }
}
