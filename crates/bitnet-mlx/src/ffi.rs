//! The part of mlx-c's interface that this crate calls: types, constants and a table of functions
//! filled at run time. Signatures are those of mlx-c 0.7 for MLX 0.32.2; knows no meaning.

use std::ffi::{c_char, c_int, c_void};

/// A handle of mlx-c: a pointer to an object of the library, or null for none yet.
macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name(pub(crate) *mut c_void);
    )*};
}

/// Handles that functions fill in.
macro_rules! results {
    ($($name:ident)*) => {$(
        impl $name {
            /// No object yet.
            pub(crate) const NULL: Self = Self(std::ptr::null_mut());
        }
    )*};
}

handles! {
    /// `mlx_array`
    RawArray;
    /// `mlx_vector_array`
    RawVector;
    /// `mlx_stream`
    RawStream;
    /// `mlx_device`
    RawDevice;
    /// `mlx_string`
    RawString;
    /// `mlx_closure`
    RawClosure;
    /// `mlx_device_info`
    RawDeviceInfo;
}

results! { RawArray RawVector RawStream RawClosure }

/// `mlx_optional_int`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct OptionalInt {
    pub(crate) value: c_int,
    pub(crate) has_value: bool,
}

/// `mlx_optional_float`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct OptionalFloat {
    pub(crate) value: f32,
    pub(crate) has_value: bool,
}

/// `mlx_dtype`, the members that are used.
pub(crate) mod dtype {
    use std::ffi::c_int;

    pub(crate) const U32: c_int = 3;
    pub(crate) const I8: c_int = 5;
    pub(crate) const I32: c_int = 7;
    pub(crate) const F16: c_int = 9;
    pub(crate) const F32: c_int = 10;
}

/// `mlx_compile_mode`: functions are traced, simplified and replayed.
pub(crate) const COMPILE_NO_FUSE: c_int = 2;
/// `mlx_compile_mode`: and what is computed number by number becomes kernels of their own.
pub(crate) const COMPILE_ENABLED: c_int = 3;

/// `mlx_device_type`
pub(crate) const DEVICE_CPU: c_int = 0;
/// `mlx_device_type`
pub(crate) const DEVICE_GPU: c_int = 1;

/// A handler of the library's errors.
pub(crate) type ErrorHandler = unsafe extern "C" fn(*const c_char, *mut c_void);
/// The body of a closure: `(results, arguments, payload)`.
pub(crate) type ClosureBody = unsafe extern "C" fn(*mut RawVector, RawVector, *mut c_void) -> c_int;
/// Drops what a handle pointed to.
pub(crate) type Destructor = unsafe extern "C" fn(*mut c_void);

macro_rules! functions {
    ($(fn $name:ident($($arg:ty),* $(,)?) $(-> $result:ty)?;)*) => {
        /// Every function this crate calls.
        #[derive(Clone, Copy)]
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($arg),*) $(-> $result)?,)*
        }

        impl Functions {
            /// Their names.
            #[cfg(test)]
            pub(crate) const NAMES: &[&str] = &[$(stringify!($name)),*];

            /// Looks every name up.
            ///
            /// # Safety
            /// `library` is mlx-c of the version these signatures belong to, or lacks one of the
            /// names; nothing is called.
            pub(crate) unsafe fn load(
                library: &libloading::Library,
            ) -> Result<Self, libloading::Error> {
                Ok(Self {$(
                    // SAFETY: the caller vouches for the signature behind the name.
                    $name: unsafe {
                        *library.get(concat!(stringify!($name), "\0").as_bytes())?
                    },
                )*})
            }
        }
    };
}

functions! {
    fn mlx_version(*mut RawString) -> c_int;
    fn mlx_string_new() -> RawString;
    fn mlx_string_data(RawString) -> *const c_char;
    fn mlx_string_free(RawString) -> c_int;
    fn mlx_set_error_handler(ErrorHandler, *mut c_void, Option<Destructor>);

    fn mlx_device_new_type(c_int, c_int) -> RawDevice;
    fn mlx_device_free(RawDevice) -> c_int;
    fn mlx_device_is_available(*mut bool, RawDevice) -> c_int;
    fn mlx_device_info_new() -> RawDeviceInfo;
    fn mlx_device_info_get(*mut RawDeviceInfo, RawDevice) -> c_int;
    fn mlx_device_info_free(RawDeviceInfo) -> c_int;
    fn mlx_device_info_has_key(*mut bool, RawDeviceInfo, *const c_char) -> c_int;
    fn mlx_device_info_is_string(*mut bool, RawDeviceInfo, *const c_char) -> c_int;
    fn mlx_device_info_get_string(*mut *const c_char, RawDeviceInfo, *const c_char) -> c_int;
    fn mlx_device_info_get_size(*mut usize, RawDeviceInfo, *const c_char) -> c_int;
    fn mlx_stream_new_thread_unsafe(RawDevice) -> RawStream;
    fn mlx_stream_free(RawStream) -> c_int;
    fn mlx_synchronize(RawStream) -> c_int;

    fn mlx_array_new_data(*const c_void, *const c_int, c_int, c_int) -> RawArray;
    fn mlx_array_set(*mut RawArray, RawArray) -> c_int;
    fn mlx_array_free(RawArray) -> c_int;
    fn mlx_array_ndim(RawArray) -> usize;
    fn mlx_array_shape(RawArray) -> *const c_int;
    fn mlx_array_size(RawArray) -> usize;
    fn mlx_array_dtype(RawArray) -> c_int;
    fn mlx_array_data_float32(RawArray) -> *const f32;
    fn mlx_array_data_uint32(RawArray) -> *const u32;
    fn _mlx_array_is_row_contiguous(*mut bool, RawArray) -> c_int;

    fn mlx_vector_array_new_data(*const RawArray, usize) -> RawVector;
    fn mlx_vector_array_free(RawVector) -> c_int;
    fn mlx_vector_array_size(RawVector) -> usize;
    fn mlx_vector_array_get(*mut RawArray, RawVector, usize) -> c_int;
    fn mlx_vector_array_set_data(*mut RawVector, *const RawArray, usize) -> c_int;
    fn mlx_eval(RawVector) -> c_int;

    fn mlx_closure_new_func_payload(
        ClosureBody, *mut c_void, Option<Destructor>,
    ) -> RawClosure;
    fn mlx_closure_apply(*mut RawVector, RawClosure, RawVector) -> c_int;
    fn mlx_closure_free(RawClosure) -> c_int;
    fn mlx_compile(*mut RawClosure, RawClosure, bool) -> c_int;
    fn mlx_set_compile_mode(c_int) -> c_int;

    fn mlx_abs(*mut RawArray, RawArray, RawStream) -> c_int;
    fn mlx_add(*mut RawArray, RawArray, RawArray, RawStream) -> c_int;
    fn mlx_arange(*mut RawArray, f64, f64, f64, c_int, RawStream) -> c_int;
    fn mlx_astype(*mut RawArray, RawArray, c_int, RawStream) -> c_int;
    fn mlx_concatenate_axis(*mut RawArray, RawVector, c_int, RawStream) -> c_int;
    fn mlx_contiguous(*mut RawArray, RawArray, bool, RawStream) -> c_int;
    fn mlx_divide(*mut RawArray, RawArray, RawArray, RawStream) -> c_int;
    fn mlx_less_equal(*mut RawArray, RawArray, RawArray, RawStream) -> c_int;
    fn mlx_matmul(*mut RawArray, RawArray, RawArray, RawStream) -> c_int;
    fn mlx_max_axis(*mut RawArray, RawArray, c_int, bool, RawStream) -> c_int;
    fn mlx_maximum(*mut RawArray, RawArray, RawArray, RawStream) -> c_int;
    fn mlx_multiply(*mut RawArray, RawArray, RawArray, RawStream) -> c_int;
    fn mlx_pad(
        *mut RawArray, RawArray, *const c_int, usize, *const c_int, usize, *const c_int, usize,
        RawArray, *const c_char, RawStream,
    ) -> c_int;
    fn mlx_quantized_matmul(
        *mut RawArray, RawArray, RawArray, RawArray, RawArray, bool, OptionalInt, OptionalInt,
        *const c_char, RawStream,
    ) -> c_int;
    fn mlx_reshape(*mut RawArray, RawArray, *const c_int, usize, RawStream) -> c_int;
    fn mlx_round(*mut RawArray, RawArray, c_int, RawStream) -> c_int;
    fn mlx_scatter_single(
        *mut RawArray, RawArray, RawArray, RawArray, c_int, RawStream,
    ) -> c_int;
    fn mlx_sigmoid(*mut RawArray, RawArray, RawStream) -> c_int;
    fn mlx_slice(
        *mut RawArray, RawArray, *const c_int, usize, *const c_int, usize, *const c_int, usize,
        RawStream,
    ) -> c_int;
    fn mlx_square(*mut RawArray, RawArray, RawStream) -> c_int;
    fn mlx_take_axis(*mut RawArray, RawArray, RawArray, c_int, RawStream) -> c_int;
    fn mlx_transpose_axes(*mut RawArray, RawArray, *const c_int, usize, RawStream) -> c_int;
    fn mlx_view(*mut RawArray, RawArray, c_int, RawStream) -> c_int;
    fn mlx_where(*mut RawArray, RawArray, RawArray, RawArray, RawStream) -> c_int;
    fn mlx_zeros(*mut RawArray, *const c_int, usize, c_int, RawStream) -> c_int;

    fn mlx_fast_rms_norm(*mut RawArray, RawArray, RawArray, f32, RawStream) -> c_int;
    fn mlx_fast_rope_dynamic(
        *mut RawArray, RawArray, c_int, bool, OptionalFloat, f32, RawArray, RawArray, RawStream,
    ) -> c_int;
    fn mlx_fast_scaled_dot_product_attention(
        *mut RawArray, RawArray, RawArray, RawArray, f32, *const c_char, RawArray, RawArray, bool,
        RawStream,
    ) -> c_int;
}
