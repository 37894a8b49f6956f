//! mlx-c opened at run time: found, checked for its version, and its errors caught.
//!
//! The library is opened once and stays: MLX keeps threads that could not outlive it. Knows how to
//! report failures, not what arrays are.

use crate::ffi::{DEVICE_CPU, DEVICE_GPU, Functions, RawDevice, RawStream, RawString};
use bitnet_core::{Error, Result};
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// The environment variable that names the library's file, instead of the usual places.
pub const LIBRARY_VARIABLE: &str = "BITNET_MLX_LIBRARY";

/// Versions of MLX whose interface the function table is written for and was tested with.
pub const SUPPORTED_VERSIONS: [&str; 1] = ["0.32.2"];

/// Where mlx-c is looked for, in this order; names without a folder go through the system's search.
const PLACES: [&str; 4] = if cfg!(target_os = "macos") {
    [
        "libmlxc.dylib",
        "/opt/homebrew/lib/libmlxc.dylib",
        "/usr/local/lib/libmlxc.dylib",
        "@executable_path/libmlxc.dylib",
    ]
} else {
    ["libmlxc.so", "/usr/local/lib/libmlxc.so", "/usr/lib/libmlxc.so", "/opt/mlx/lib/libmlxc.so"]
};

/// An opened library.
pub(crate) struct Mlx {
    pub(crate) functions: Functions,
    pub(crate) version: String,
    /// Held while graphs are evaluated or compiled: several engines may share the library, whose
    /// caches are not made for that.
    evaluation: Mutex<()>,
}

thread_local! {
    /// The last error the library reported on this thread.
    static LAST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps the message for [`Mlx::check`]; the library's own handler would end the process.
unsafe extern "C" fn keep_error(message: *const c_char, _: *mut c_void) {
    if message.is_null() {
        return;
    }
    // SAFETY: the library passes a C string that lives during the call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    let _ = LAST_ERROR.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = Some(text);
        }
    });
}

/// An error of this device.
pub(crate) fn device_error(reason: impl Into<String>) -> Error {
    Error::Device { device: "mlx".into(), reason: reason.into() }
}

impl Mlx {
    /// The library of this process, opened at the first call.
    pub(crate) fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<Mlx>> = OnceLock::new();
        LIBRARY.get_or_init(Self::find).as_ref().map_err(Clone::clone)
    }

    fn find() -> Result<Self> {
        if let Some(path) = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
            return Self::open(Path::new(&path));
        }
        let mut reasons = Vec::new();
        for place in PLACES {
            match Self::open(Path::new(place)) {
                Ok(mlx) => return Ok(mlx),
                // A library that is there but cannot be used says more than absent ones.
                Err(error) if Path::new(place).is_absolute() && Path::new(place).exists() => {
                    return Err(error);
                }
                Err(error) => reasons.push(error),
            }
        }
        let first = reasons.first().map(ToString::to_string).unwrap_or_default();
        Err(device_error(format!(
            "mlx-c was not found ({LIBRARY_VARIABLE} can name its file); {first}"
        )))
    }

    /// Opens the library at `path` and checks that it is one whose interface is known.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let path: PathBuf = path.into();
        let shown = path.display().to_string();
        // SAFETY: the file's initializers run. It is the file the user named, or the one the
        // system's search finds under the library's own name, as for any program linked with it.
        let library = unsafe { libloading::Library::new(&path) }
            .map_err(|e| device_error(format!("{shown} cannot be opened: {e}")))?;
        // SAFETY: nothing is called; what another library has under these names is found out by
        // its version below, before anything else is called.
        let functions = unsafe { Functions::load(&library) }
            .map_err(|e| device_error(format!("{shown} is not the mlx-c that fits: {e}")))?;
        let version = Self::read_version(&functions)
            .ok_or_else(|| device_error(format!("{shown} does not tell its version")))?;
        if !SUPPORTED_VERSIONS.contains(&version.as_str()) {
            let wanted = SUPPORTED_VERSIONS.join(" or ");
            return Err(device_error(format!("{shown} has MLX {version}, but {wanted} is needed")));
        }
        // SAFETY: the handler has the signature of the version checked above, needs no data, and is
        // a function of this program, which lives as long as the process.
        unsafe { (functions.mlx_set_error_handler)(keep_error, std::ptr::null_mut(), None) };
        // MLX has threads of its own that run its code until the process ends.
        std::mem::forget(library);
        Ok(Self { functions, version, evaluation: Mutex::new(()) })
    }

    /// The three functions used here have had these signatures since the library has had versions.
    fn read_version(functions: &Functions) -> Option<String> {
        // SAFETY: makes an empty string object, given to `mlx_version` and freed below.
        let mut string: RawString = unsafe { (functions.mlx_string_new)() };
        // SAFETY: `string` is the object made above.
        let status = unsafe { (functions.mlx_version)(&raw mut string) };
        // SAFETY: as above; the text lives until the object is freed.
        let text = unsafe { (functions.mlx_string_data)(string) };
        let version = (status == 0 && !text.is_null()).then(|| {
            // SAFETY: the library's strings are C strings.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        });
        // SAFETY: freed once, and not used again.
        unsafe { (functions.mlx_string_free)(string) };
        version
    }

    /// The result of a call of `what`, with the message the library left if it failed.
    pub(crate) fn check(&self, status: c_int, what: &str) -> Result<()> {
        let message = LAST_ERROR.take();
        match status {
            0 => Ok(()),
            _ => {
                let message = message.unwrap_or_else(|| format!("status {status}"));
                Err(device_error(format!("{what}: {message}")))
            }
        }
    }

    /// A failure of a call that tells by a null result.
    pub(crate) fn null_error(&self, what: &str) -> Error {
        let message = LAST_ERROR.take().unwrap_or_else(|| "no result".into());
        device_error(format!("{what}: {message}"))
    }

    /// To be held while graphs are evaluated or compiled, and while streams come and go.
    pub(crate) fn evaluation(&self) -> MutexGuard<'_, ()> {
        self.evaluation.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A device of MLX and a stream on it; freed on drop.
pub(crate) struct Device {
    mlx: &'static Mlx,
    raw: RawDevice,
    pub(crate) stream: RawStream,
    pub(crate) is_gpu: bool,
}

// SAFETY: the stream was made to be used from any thread, one at a time, which `&mut` on the
// backend that owns this sees to; the device is a plain value.
unsafe impl Send for Device {}
// SAFETY: as above; shared references only read the handles.
unsafe impl Sync for Device {}

impl Device {
    /// The GPU if MLX has one here, else the CPU.
    pub(crate) fn best(mlx: &'static Mlx) -> Result<Self> {
        let f = &mlx.functions;
        for kind in [DEVICE_GPU, DEVICE_CPU] {
            // SAFETY: a device is a pair of numbers; whether it exists is asked next.
            let raw = unsafe { (f.mlx_device_new_type)(kind, 0) };
            if raw.0.is_null() {
                return Err(mlx.null_error("mlx_device_new_type"));
            }
            let mut available = false;
            // SAFETY: `raw` is the device made above.
            let status = unsafe { (f.mlx_device_is_available)(&raw mut available, raw) };
            mlx.check(status, "mlx_device_is_available")?;
            let device = Self { mlx, raw, stream: RawStream::NULL, is_gpu: kind == DEVICE_GPU };
            if available {
                return device.with_stream();
            }
        }
        Err(device_error("MLX has no device here"))
    }

    fn with_stream(mut self) -> Result<Self> {
        // MLX keeps these streams in a table for all threads that it does not lock, and looks each
        // up while it evaluates.
        let _alone = self.mlx.evaluation();
        // SAFETY: the device exists and is available.
        self.stream = unsafe { (self.mlx.functions.mlx_stream_new_thread_unsafe)(self.raw) };
        match self.stream.0.is_null() {
            true => Err(self.mlx.null_error("mlx_stream_new_thread_unsafe")),
            false => Ok(self),
        }
    }

    /// What the hardware calls itself, and bytes of its memory, where MLX tells.
    pub(crate) fn info(&self) -> (Option<String>, Option<u64>) {
        let f = &self.mlx.functions;
        // SAFETY: makes an empty object, filled and freed below.
        let mut info = unsafe { (f.mlx_device_info_new)() };
        // SAFETY: `info` and `raw` are live.
        let status = unsafe { (f.mlx_device_info_get)(&raw mut info, self.raw) };
        if self.mlx.check(status, "mlx_device_info_get").is_err() {
            return (None, None);
        }
        let has = |key: &CStr, string: bool| {
            let (mut exists, mut is_string) = (false, false);
            // SAFETY: `info` is live, the key is a C string, the results are ours.
            unsafe {
                (f.mlx_device_info_has_key)(&raw mut exists, info, key.as_ptr());
                if exists {
                    (f.mlx_device_info_is_string)(&raw mut is_string, info, key.as_ptr());
                }
            }
            exists && is_string == string
        };
        let name = has(c"device_name", true).then(|| {
            let mut text = std::ptr::null();
            // SAFETY: the key exists and is a string; the text lives as long as `info`.
            unsafe {
                (f.mlx_device_info_get_string)(&raw mut text, info, c"device_name".as_ptr());
                (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        });
        let memory = has(c"memory_size", false).then(|| {
            let mut bytes = 0usize;
            // SAFETY: the key exists and is a number.
            unsafe { (f.mlx_device_info_get_size)(&raw mut bytes, info, c"memory_size".as_ptr()) };
            bytes as u64
        });
        // SAFETY: freed once, and not used again.
        unsafe { (f.mlx_device_info_free)(info) };
        LAST_ERROR.take();
        (name.flatten(), memory)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let f = &self.mlx.functions;
        let _alone = self.mlx.evaluation();
        // SAFETY: both were made by this library and are freed once; what was asked of the stream
        // is done before it goes.
        unsafe {
            if !self.stream.0.is_null() {
                (f.mlx_synchronize)(self.stream);
                (f.mlx_stream_free)(self.stream);
            }
            (f.mlx_device_free)(self.raw);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(path: &str) -> String {
        match Mlx::open(Path::new(path)) {
            Err(Error::Device { device, reason }) if device == "mlx" => reason,
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("{path} was taken for mlx-c"),
        }
    }

    #[test]
    fn what_is_not_mlx_is_an_error() {
        assert!(reason("/nonexistent/libmlxc.so").contains("cannot be opened"));
        assert!(reason(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).contains("opened"));
        // A real library without the names.
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        assert!(reason("libm.so.6").contains("not the mlx-c that fits"));
    }

    /// A library with every name, but of another version: nothing but its version is asked for.
    #[test]
    #[ignore = "needs a C compiler: scripts/test-mlx.sh"]
    fn another_version_is_an_error() {
        let folder = std::env::temp_dir().join(format!("bitnet-mlx-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, library) = (folder.join("other.c"), folder.join("libother.so"));
        let mut text = String::from(
            "typedef struct { void* p; } s;\n\
             s mlx_string_new(void) { s x = {0}; return x; }\n\
             int mlx_version(s* x) { return 0; }\n\
             const char* mlx_string_data(s x) { return \"9.9.9\"; }\n\
             int mlx_string_free(s x) { return 0; }\n",
        );
        let written = ["mlx_string_new", "mlx_version", "mlx_string_data", "mlx_string_free"];
        for name in Functions::NAMES.iter().filter(|name| !written.contains(name)) {
            text += &format!("int {name}(void) {{ *(volatile int*)0 = 0; return 0; }}\n");
        }
        std::fs::write(&source, text).unwrap();
        let status = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-w", "-o"])
            .args([&library, &source])
            .status();
        assert!(status.unwrap().success());
        let reason = reason(library.to_str().unwrap());
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(reason.contains("has MLX 9.9.9, but 0.32.2 is needed"), "{reason}");
    }
}
