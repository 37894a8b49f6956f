//! Arrays of MLX with Rust ownership, and the operations this backend builds its graphs from.
//!
//! An operation makes a node of a graph; [`Ops::evaluate`] computes. Every call of the library goes
//! through this file or `library`. Knows shapes, not transformers.

use crate::ffi::{OptionalFloat, OptionalInt, RawArray, RawVector, dtype};
use crate::library::{Device, Mlx, device_error};
use bitnet_core::{Error, Result};
use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

/// An array, perhaps not computed yet. Clones are the same array.
pub(crate) struct Array {
    mlx: &'static Mlx,
    raw: RawArray,
}

// SAFETY: MLX counts references to arrays atomically, and an array is only changed by being
// evaluated, which `Ops::evaluate` does under the library's lock.
unsafe impl Send for Array {}
// SAFETY: as above; through `&Array` handles are copied and read.
unsafe impl Sync for Array {}

impl Clone for Array {
    fn clone(&self) -> Self {
        let mut raw = RawArray::NULL;
        // SAFETY: `self.raw` is live; a null handle is what the function fills in. It only counts a
        // reference, which cannot fail but for memory; then the handle stays null and every use of
        // it is an error that the library reports.
        unsafe { (self.mlx.functions.mlx_array_set)(&raw mut raw, self.raw) };
        Self { mlx: self.mlx, raw }
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's own and is freed once; freeing null is allowed.
        unsafe { (self.mlx.functions.mlx_array_free)(self.raw) };
    }
}

impl Array {
    /// Its shape.
    pub(crate) fn shape(&self) -> Vec<usize> {
        let f = &self.mlx.functions;
        // SAFETY: `raw` is live; the library returns as many sizes as the array has axes.
        let sizes = unsafe {
            let (shape, axes) = ((f.mlx_array_shape)(self.raw), (f.mlx_array_ndim)(self.raw));
            if shape.is_null() { &[][..] } else { std::slice::from_raw_parts(shape, axes) }
        };
        sizes.iter().map(|&size| size as usize).collect()
    }

    pub(crate) fn dtype(&self) -> c_int {
        // SAFETY: `raw` is live.
        unsafe { (self.mlx.functions.mlx_array_dtype)(self.raw) }
    }

    fn len(&self) -> usize {
        // SAFETY: `raw` is live.
        unsafe { (self.mlx.functions.mlx_array_size)(self.raw) }
    }

    fn is_contiguous(&self) -> bool {
        let mut contiguous = false;
        // SAFETY: `raw` is live.
        let status = unsafe {
            (self.mlx.functions._mlx_array_is_row_contiguous)(&raw mut contiguous, self.raw)
        };
        self.mlx.check(status, "_mlx_array_is_row_contiguous").is_ok() && contiguous
    }

    /// The words of an evaluated array of 32-bit integers.
    pub(crate) fn words(&self) -> Result<&[u32]> {
        let (pointer, len) = self.words_pointer()?;
        // SAFETY: the library's memory for the array, which lives as long as `self` and holds `len`
        // words without gaps; `words_mut` needs the only reference.
        Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
    }

    /// The words of an evaluated array that nothing else refers to, to write to.
    ///
    /// # Safety
    /// No other handle of this array and no unevaluated node refers to it.
    pub(crate) unsafe fn words_mut(&mut self) -> Result<&mut [u32]> {
        let (pointer, len) = self.words_pointer()?;
        // SAFETY: as in `words`; the caller vouches that nobody else reads. The memory is the
        // library's heap memory, writable for whoever owns the array.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer.cast_mut(), len) })
    }

    fn words_pointer(&self) -> Result<(*const u32, usize)> {
        if self.dtype() != dtype::U32 || !self.is_contiguous() {
            return Err(device_error("an array of words was expected"));
        }
        // SAFETY: `raw` is live and of this type; on arrays that were not evaluated the library
        // has no data, which is checked next.
        let pointer = unsafe { (self.mlx.functions.mlx_array_data_uint32)(self.raw) };
        match pointer.is_null() {
            true => Err(self.mlx.null_error("mlx_array_data_uint32")),
            false => Ok((pointer, self.len())),
        }
    }
}

/// Numbers a kernel multiplies in groups of 2-bit codes.
pub(crate) struct Codes {
    /// `(rows, cols / 16)` words.
    pub(crate) words: Array,
    /// `(rows, cols / group)`
    pub(crate) scales: Array,
    /// `(rows, cols / group)`
    pub(crate) biases: Array,
    pub(crate) group: usize,
}

/// Which positions a row attends to.
pub(crate) enum Seen<'a> {
    All,
    /// The rows are the last positions, and each sees those before it and itself.
    Causal,
    /// Those of an array `(…, positions)` of booleans.
    Where(&'a Array),
}

/// The operations, on one stream.
#[derive(Clone)]
pub(crate) struct Ops {
    pub(crate) mlx: &'static Mlx,
    pub(crate) device: Arc<Device>,
}

/// Calls a function `(result, arguments…, stream)`.
macro_rules! node {
    ($ops:expr, $name:ident($($arg:expr),* $(,)?)) => {{
        let ops: &Ops = $ops;
        let mut out = Array { mlx: ops.mlx, raw: RawArray::NULL };
        // SAFETY: the table's signatures are those of the version that `Mlx::open` checked. Handles
        // belong to live `Array`s, pointers to live slices of the lengths passed beside them, and
        // the null handle of `out` is what the function fills in.
        let status = unsafe {
            (ops.mlx.functions.$name)(&raw mut out.raw, $($arg,)* ops.device.stream)
        };
        ops.mlx.check(status, stringify!($name)).map(|()| out)
    }};
}

/// Sizes as the library takes them.
fn sizes(values: &[usize]) -> Result<Vec<c_int>> {
    let fits = |&value: &usize| {
        c_int::try_from(value).map_err(|_| Error::invalid("shape", format!("{value} is too large")))
    };
    values.iter().map(fits).collect()
}

impl Ops {
    /// A copy of `values` with this shape.
    pub(crate) fn floats(&self, values: &[f32], shape: &[usize]) -> Result<Array> {
        if shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size)) != Some(values.len()) {
            let got = format!("{} numbers", values.len());
            return Err(Error::shape("array", format!("{shape:?}"), got));
        }
        let shape = sizes(shape)?;
        let data = values.as_ptr().cast::<c_void>();
        let (axes, dtype) = (shape.len() as c_int, dtype::F32);
        // SAFETY: `values` holds as many numbers of this type as the shape says; they are copied.
        let raw =
            unsafe { (self.mlx.functions.mlx_array_new_data)(data, shape.as_ptr(), axes, dtype) };
        match raw.0.is_null() {
            true => Err(self.mlx.null_error("mlx_array_new_data")),
            false => Ok(Array { mlx: self.mlx, raw }),
        }
    }

    pub(crate) fn zeros(&self, shape: &[usize], dtype: c_int) -> Result<Array> {
        let shape = sizes(shape)?;
        node!(self, mlx_zeros(shape.as_ptr(), shape.len(), dtype))
    }

    /// Computes these arrays and all they depend on; one submission.
    pub(crate) fn evaluate(&self, arrays: &[&Array]) -> Result<()> {
        let vector = Vector::new(self.mlx, arrays)?;
        let _evaluation = self.mlx.evaluation();
        // SAFETY: the vector is live.
        let status = unsafe { (self.mlx.functions.mlx_eval)(vector.0) };
        self.mlx.check(status, "mlx_eval")
    }

    /// Copies an evaluated array of f32 without gaps to the host.
    pub(crate) fn copy_out(&self, array: &Array, out: &mut Vec<f32>) -> Result<()> {
        if array.dtype() != dtype::F32 || !array.is_contiguous() {
            return Err(device_error("an array of f32 without gaps was expected"));
        }
        // SAFETY: the array is live and evaluated; if it has no data the result is checked.
        let data = unsafe { (self.mlx.functions.mlx_array_data_float32)(array.raw) };
        if data.is_null() && array.len() > 0 {
            return Err(self.mlx.null_error("mlx_array_data_float32"));
        }
        out.clear();
        if array.len() > 0 {
            // SAFETY: the data of a live array without gaps: as many numbers as it has elements.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(data, array.len()) });
        }
        Ok(())
    }

    /// An array without gaps in memory.
    pub(crate) fn contiguous(&self, a: &Array) -> Result<Array> {
        node!(self, mlx_contiguous(a.raw, false))
    }

    pub(crate) fn abs(&self, a: &Array) -> Result<Array> {
        node!(self, mlx_abs(a.raw))
    }

    pub(crate) fn add(&self, a: &Array, b: &Array) -> Result<Array> {
        node!(self, mlx_add(a.raw, b.raw))
    }

    pub(crate) fn multiply(&self, a: &Array, b: &Array) -> Result<Array> {
        node!(self, mlx_multiply(a.raw, b.raw))
    }

    pub(crate) fn divide(&self, a: &Array, b: &Array) -> Result<Array> {
        node!(self, mlx_divide(a.raw, b.raw))
    }

    pub(crate) fn maximum(&self, a: &Array, b: &Array) -> Result<Array> {
        node!(self, mlx_maximum(a.raw, b.raw))
    }

    pub(crate) fn matmul(&self, a: &Array, b: &Array) -> Result<Array> {
        node!(self, mlx_matmul(a.raw, b.raw))
    }

    pub(crate) fn square(&self, a: &Array) -> Result<Array> {
        node!(self, mlx_square(a.raw))
    }

    pub(crate) fn sigmoid(&self, a: &Array) -> Result<Array> {
        node!(self, mlx_sigmoid(a.raw))
    }

    /// Rounds to the nearest integer, ties to even.
    pub(crate) fn round(&self, a: &Array) -> Result<Array> {
        node!(self, mlx_round(a.raw, 0))
    }

    /// The largest along the last axis, which stays with size 1.
    pub(crate) fn max_last(&self, a: &Array) -> Result<Array> {
        node!(self, mlx_max_axis(a.raw, -1, true))
    }

    pub(crate) fn cast(&self, a: &Array, dtype: c_int) -> Result<Array> {
        node!(self, mlx_astype(a.raw, dtype))
    }

    /// The same bytes as numbers of another type; the last axis changes with the size.
    pub(crate) fn view(&self, a: &Array, dtype: c_int) -> Result<Array> {
        node!(self, mlx_view(a.raw, dtype))
    }

    pub(crate) fn reshape(&self, a: &Array, shape: &[usize]) -> Result<Array> {
        let shape = sizes(shape)?;
        node!(self, mlx_reshape(a.raw, shape.as_ptr(), shape.len()))
    }

    pub(crate) fn transpose(&self, a: &Array, axes: &[usize]) -> Result<Array> {
        let axes = sizes(axes)?;
        node!(self, mlx_transpose_axes(a.raw, axes.as_ptr(), axes.len()))
    }

    /// Elements `start..end` of the first axis.
    pub(crate) fn slice_rows(&self, a: &Array, start: usize, end: usize) -> Result<Array> {
        let mut stop = a.shape();
        let mut begin = vec![0; stop.len()];
        if let (Some(begin), Some(stop)) = (begin.first_mut(), stop.first_mut()) {
            (*begin, *stop) = (start, end);
        }
        let steps = sizes(&vec![1; stop.len()])?;
        let (begin, stop) = (sizes(&begin)?, sizes(&stop)?);
        node!(
            self,
            mlx_slice(
                a.raw,
                begin.as_ptr(),
                begin.len(),
                stop.as_ptr(),
                stop.len(),
                steps.as_ptr(),
                steps.len()
            )
        )
    }

    /// Appends zeros to the last axis until it has `size` elements.
    pub(crate) fn pad_last(&self, a: &Array, size: usize) -> Result<Array> {
        let shape = a.shape();
        let Some(&last) = shape.last() else { return Ok(a.clone()) };
        if last >= size {
            return Ok(a.clone());
        }
        let (axis, low, high) = (sizes(&[shape.len() - 1])?, sizes(&[0])?, sizes(&[size - last])?);
        let zero = self.floats(&[0.0], &[])?;
        let (axis, low, high) = (axis.as_ptr(), low.as_ptr(), high.as_ptr());
        node!(self, mlx_pad(a.raw, axis, 1, low, 1, high, 1, zero.raw, c"constant".as_ptr()))
    }

    pub(crate) fn concatenate_rows(&self, arrays: &[&Array]) -> Result<Array> {
        let vector = Vector::new(self.mlx, arrays)?;
        node!(self, mlx_concatenate_axis(vector.0, 0))
    }

    /// Elements `indices` of the first axis. The caller has checked the indices.
    pub(crate) fn take_rows(&self, a: &Array, indices: &Array) -> Result<Array> {
        node!(self, mlx_take_axis(a.raw, indices.raw, 0))
    }

    /// `a` with elements `indices` of its first axis replaced; in place if nothing else refers to
    /// `a`, which is why it is taken over. `updates` is `(indices, 1, …)`. The caller has checked
    /// the indices.
    pub(crate) fn scatter_rows(&self, a: Array, indices: &Array, updates: &Array) -> Result<Array> {
        node!(self, mlx_scatter_single(a.raw, indices.raw, updates.raw, 0))
    }

    /// `x · codesᵀ`: `x` is `(…, cols)`.
    pub(crate) fn quantized_matmul(&self, x: &Array, codes: &Codes) -> Result<Array> {
        let group = OptionalInt { value: codes.group as c_int, has_value: true };
        let bits = OptionalInt { value: 2, has_value: true };
        let (words, scales, biases) = (codes.words.raw, codes.scales.raw, codes.biases.raw);
        let mode = c"affine".as_ptr();
        node!(self, mlx_quantized_matmul(x.raw, words, scales, biases, true, group, bits, mode))
    }

    pub(crate) fn rms_norm(&self, x: &Array, weight: &Array, eps: f32) -> Result<Array> {
        node!(self, mlx_fast_rms_norm(x.raw, weight.raw, eps))
    }

    /// Rotates the pairs `(i, i + dim/2)` of `x` `(rows, heads, 1, dim)` by `offsets[row] /
    /// periods[i]`.
    pub(crate) fn rope(
        &self,
        x: &Array,
        dim: usize,
        offsets: &Array,
        periods: &Array,
    ) -> Result<Array> {
        let base = OptionalFloat { value: 0.0, has_value: false };
        let dim = dim as c_int;
        node!(self, mlx_fast_rope_dynamic(x.raw, dim, false, base, 1.0, offsets.raw, periods.raw))
    }

    /// `0, 1, … n − 1` as 32-bit integers.
    pub(crate) fn count(&self, n: usize) -> Result<Array> {
        node!(self, mlx_arange(0.0, n as f64, 1.0, dtype::I32))
    }

    pub(crate) fn less_equal(&self, a: &Array, b: &Array) -> Result<Array> {
        node!(self, mlx_less_equal(a.raw, b.raw))
    }

    /// `a` where `condition` holds, `b` elsewhere.
    pub(crate) fn choose(&self, condition: &Array, a: &Array, b: &Array) -> Result<Array> {
        node!(self, mlx_where(condition.raw, a.raw, b.raw))
    }

    /// Attention of `q` `(1, heads, rows, dim)` to `k` and `v` `(1, kv_heads, positions, dim)`.
    pub(crate) fn attention(
        &self,
        q: &Array,
        k: &Array,
        v: &Array,
        scale: f32,
        seen: Seen<'_>,
    ) -> Result<Array> {
        let none = RawArray::NULL;
        let (mode, mask): (&CStr, _) = match seen {
            Seen::All => (c"", none),
            Seen::Causal => (c"causal", none),
            Seen::Where(mask) => (c"array", mask.raw),
        };
        node!(
            self,
            mlx_fast_scaled_dot_product_attention(
                q.raw,
                k.raw,
                v.raw,
                scale,
                mode.as_ptr(),
                mask,
                none,
                false
            )
        )
    }
}

/// A list of arrays; freed on drop.
pub(crate) struct Vector(pub(crate) RawVector, &'static Mlx);

impl Vector {
    pub(crate) fn new(mlx: &'static Mlx, arrays: &[&Array]) -> Result<Self> {
        let handles: Vec<RawArray> = arrays.iter().map(|array| array.raw).collect();
        // SAFETY: the handles are live; the library counts references of its own.
        let raw =
            unsafe { (mlx.functions.mlx_vector_array_new_data)(handles.as_ptr(), handles.len()) };
        match raw.0.is_null() {
            true => Err(mlx.null_error("mlx_vector_array_new_data")),
            false => Ok(Self(raw, mlx)),
        }
    }

    /// Takes over a list the library made.
    pub(crate) fn from_raw(mlx: &'static Mlx, raw: RawVector) -> Self {
        Self(raw, mlx)
    }

    /// Element `index`.
    pub(crate) fn get(&self, index: usize) -> Result<Array> {
        let mut out = Array { mlx: self.1, raw: RawArray::NULL };
        // SAFETY: the vector is live; the library checks the index.
        let status =
            unsafe { (self.1.functions.mlx_vector_array_get)(&raw mut out.raw, self.0, index) };
        self.1.check(status, "mlx_vector_array_get").map(|()| out)
    }

    /// How many arrays it has.
    pub(crate) fn len(&self) -> usize {
        // SAFETY: the vector is live.
        unsafe { (self.1.functions.mlx_vector_array_size)(self.0) }
    }

    /// Makes `arrays` the content of a list that belongs to the library.
    ///
    /// # Safety
    /// `list` points to a live handle of a list, or one that is null.
    pub(crate) unsafe fn fill(
        mlx: &'static Mlx,
        list: *mut RawVector,
        arrays: &[Array],
    ) -> Result<()> {
        let handles: Vec<RawArray> = arrays.iter().map(|array| array.raw).collect();
        // SAFETY: the caller vouches for `list`; the handles are live.
        let status = unsafe {
            (mlx.functions.mlx_vector_array_set_data)(list, handles.as_ptr(), handles.len())
        };
        mlx.check(status, "mlx_vector_array_set_data")
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // SAFETY: the list is this value's own and is freed once.
        unsafe { (self.1.functions.mlx_vector_array_free)(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn ops() -> Ops {
        let mlx = Mlx::get().unwrap();
        Ops { mlx, device: Arc::new(Device::best(mlx).unwrap()) }
    }

    #[test]
    #[ignore = "needs mlx-c: scripts/test-mlx.sh"]
    fn failures_of_the_library_are_errors() {
        let ops = ops();
        let array = ops.floats(&[1.0, 2.0, 3.0], &[3]).unwrap();
        match ops.reshape(&array, &[2, 2]).err() {
            Some(Error::Device { device, reason }) => {
                assert_eq!(device, "mlx");
                assert!(reason.contains("reshape"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        let wide = ops.floats(&[0.0; 8], &[2, 4]).unwrap();
        assert!(ops.matmul(&wide, &wide).is_err());
        assert!(ops.floats(&[1.0], &[2]).is_err());
        assert!(ops.zeros(&[usize::MAX], dtype::F32).is_err());
        // And the library goes on.
        let sum = ops.add(&array, &array).unwrap();
        ops.evaluate(&[&sum]).unwrap();
        let mut out = Vec::new();
        ops.copy_out(&sum, &mut out).unwrap();
        assert_eq!(out, [2.0, 4.0, 6.0]);
        assert!(sum.words().is_err(), "these are not words");
    }

    #[test]
    #[ignore = "needs mlx-c: scripts/test-mlx.sh"]
    fn updates_are_made_in_place_where_nobody_else_looks() {
        let ops = ops();
        let slots = ops.contiguous(&ops.zeros(&[4, 1, 2], dtype::F32).unwrap()).unwrap();
        ops.evaluate(&[&slots]).unwrap();
        let address = |array: &Array| {
            // SAFETY: the array is live and evaluated; the address is only compared.
            unsafe { (ops.mlx.functions.mlx_array_data_float32)(array.raw) }
        };
        let before = address(&slots);
        let index = ops.cast(&ops.floats(&[2.0], &[1]).unwrap(), dtype::I32).unwrap();
        let update = ops.floats(&[5.0, 6.0], &[1, 1, 1, 2]).unwrap();
        let slots = ops.scatter_rows(slots, &index, &update).unwrap();
        ops.evaluate(&[&slots]).unwrap();
        assert_eq!(address(&slots), before, "the cache was not copied");
        let mut out = Vec::new();
        ops.copy_out(&slots, &mut out).unwrap();
        assert_eq!(out, [0.0, 0.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0]);
    }
}
