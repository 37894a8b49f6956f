//! The kernels' text as a library for the CPU, and a [`Driver`] that runs it.
//!
//! Dispatches are recorded and run when they are submitted, as on a device, and those that may run
//! beside each other in an order that a seed chooses. Buffers end at pages nobody may touch, so that
//! a kernel that leaves one does not go unseen. See `harness/` for what a threadgroup is.

use super::glue;
use bitnet_core::memory::{
    BufferKind, Completion, CopySide, DeviceBufferHandle, DeviceMemory, MemoryProperties,
};
use bitnet_core::{Error, Result};
use bitnet_metal::{Dispatch, Driver, Kernel, MetalBackend, SOURCES};
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// What `harness/launch.hpp` calls `Launch`.
#[repr(C)]
struct Launch {
    kernel: *const c_char,
    buffers: *const *mut c_void,
    lengths: *const u64,
    n_buffers: u32,
    threadgroup_bytes: u32,
    groups: [u32; 3],
    threads: u32,
    seed: u32,
}

type Allocate = unsafe extern "C" fn(usize) -> *mut c_void;
type Release = unsafe extern "C" fn(*mut c_void, usize);
type Run = unsafe extern "C" fn(*const Launch) -> *const c_char;

/// Kernels compiled for the CPU.
pub(crate) struct Library {
    allocate: Allocate,
    release: Release,
    run: Run,
    /// Where the functions are; closed after the last of them was called.
    _library: libloading::Library,
}

/// How float products and sums are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Floats {
    /// As the text asks for: each operation rounds.
    Exact,
    /// Products fused with sums wherever the compiler can: what a Metal compiler that ignores the
    /// text's wish may do.
    Fused,
}

/// The compiler: `BITNET_CLANG`, or the first of the usual names that is there.
fn compiler() -> Result<String, String> {
    let named = std::env::var("BITNET_CLANG").ok();
    let usual = ["clang++-19", "clang++-20", "clang++-18", "clang++-17", "clang++-16", "clang++"];
    let candidates = named.into_iter().chain(usual.map(String::from));
    for name in candidates {
        let mut words = name.split(' ');
        let program = words.next().unwrap_or_default();
        if Command::new(program).args(words).arg("--version").output().is_ok() {
            return Ok(name);
        }
    }
    Err("no clang++ 15 or later: install one, or name it in BITNET_CLANG".into())
}

impl Library {
    /// Compiles kernels given as `(file name, text)`.
    pub(crate) fn compile(sources: &[(&str, String)], floats: Floats) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let path = folder.path();
        let write = |name: &str, text: &str| {
            std::fs::write(path.join(name), text).map_err(|e| e.to_string())
        };
        let mut program = String::from("#include \"launch.hpp\"\n");
        for (name, text) in sources {
            write(name, &glue::without_attributes(text))?;
            program += &format!("#include \"{name}\"\n");
        }
        program += "namespace simulator {\nstatic inline uint3 group_position() {\n  return \
                    uint3{position.group[0], position.group[1], position.group[2]};\n}\n}\n";
        let texts: Vec<String> = sources.iter().map(|(_, text)| text.clone()).collect();
        program += &glue::calls(&texts);
        write("simulator.cpp", &program)?;
        let harness = Path::new(env!("CARGO_MANIFEST_DIR")).join("harness");
        let compiler = compiler()?;
        let mut words = compiler.split(' ');
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).args(["-std=c++17", "-O2", "-fsigned-char", "-fPIC", "-shared"]);
        match floats {
            Floats::Exact => command.arg("-ffp-contract=off"),
            Floats::Fused => command.arg("-ffp-contract=fast"),
        };
        if floats == Floats::Fused && cfg!(target_arch = "x86_64") {
            command.arg("-mfma");
        }
        let library = path.join("kernels.so");
        command.arg("-I").arg(&harness).arg("-I").arg(path);
        command.arg(path.join("simulator.cpp")).arg("-o").arg(&library);
        let output = command.output().map_err(|e| format!("{compiler}: {e}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        // SAFETY: the library was just made of the harness; loading it runs nothing but the
        // initialization of its variables.
        let library = unsafe { libloading::Library::new(&library) }.map_err(|e| e.to_string())?;
        let error = |e: libloading::Error| e.to_string();
        // SAFETY: `harness/launch.hpp` and `glue` define functions of these names and types; the
        // pointers are kept no longer than the library.
        unsafe {
            Ok(Self {
                allocate: *library.get::<Allocate>(b"bitnet_metal_allocate").map_err(error)?,
                release: *library.get::<Release>(b"bitnet_metal_release").map_err(error)?,
                run: *library.get::<Run>(b"bitnet_metal_run").map_err(error)?,
                _library: library,
            })
        }
    }

    /// The kernels as they are, compiled once.
    pub(crate) fn kernels() -> Arc<Self> {
        static LIBRARY: OnceLock<Arc<Library>> = OnceLock::new();
        let compile = || {
            let library = Self::compile(&sources(), Floats::Exact).expect("the kernels compile");
            Arc::new(library)
        };
        LIBRARY.get_or_init(compile).clone()
    }
}

/// The kernels' text.
pub(crate) fn sources() -> Vec<(&'static str, String)> {
    SOURCES.iter().map(|&(name, text)| (name, text.to_owned())).collect()
}

/// What the host handed over and what it wrote and read, in bytes, on the simulated device.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) submissions: AtomicU64,
    pub(crate) written: AtomicU64,
    pub(crate) read: AtomicU64,
}

/// Memory as Metal gives it: zeroed, reached by both sides.
#[derive(Clone)]
pub(crate) struct SimulatorMemory(Arc<Library>, Arc<Traffic>);

/// A buffer of the simulator.
pub(crate) struct SimulatorBuffer {
    start: *mut u8,
    bytes: usize,
    library: Arc<Library>,
}

// SAFETY: the memory belongs to no thread; it is written through `&mut` or by the driver's submission,
// which holds the driver exclusively.
unsafe impl Send for SimulatorBuffer {}
// SAFETY: as above.
unsafe impl Sync for SimulatorBuffer {}

impl Drop for SimulatorBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by the same library with the same size.
        unsafe { (self.library.release)(self.start.cast(), self.bytes) };
    }
}

impl DeviceMemory for SimulatorMemory {
    type Buffer = SimulatorBuffer;

    fn name(&self) -> &str {
        "metal"
    }

    fn properties(&self) -> MemoryProperties {
        MemoryProperties {
            unified: true,
            suballocates: false,
            alignment: 16,
            max_buffer_bytes: 1 << 40,
            total_bytes: None,
        }
    }

    fn allocate(&self, bytes: u64, _: BufferKind) -> Result<SimulatorBuffer> {
        // SAFETY: any size may be asked for.
        let start = unsafe { (self.0.allocate)(bytes as usize) };
        match start.is_null() {
            true => Err(Error::OutOfMemory { what: "simulator".into(), bytes }),
            false => Ok(SimulatorBuffer {
                start: start.cast(),
                bytes: bytes as usize,
                library: self.0.clone(),
            }),
        }
    }

    fn write(&self, to: &mut SimulatorBuffer, offset: u64, bytes: &[u8]) -> Result<()> {
        check(to, offset, bytes.len())?;
        self.1.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        // SAFETY: within the buffer, which is borrowed mutably; nothing runs while the host writes.
        unsafe {
            to.start.add(offset as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        Ok(())
    }

    fn read(&self, from: &SimulatorBuffer, offset: u64, out: &mut [u8]) -> Result<()> {
        check(from, offset, out.len())?;
        self.1.read.fetch_add(out.len() as u64, Ordering::Relaxed);
        // SAFETY: within the buffer; kernels run only inside `submit`.
        unsafe {
            from.start.add(offset as usize).copy_to_nonoverlapping(out.as_mut_ptr(), out.len());
        }
        Ok(())
    }

    fn copy(&self, from: CopySide<Self>, to: CopySide<Self>, bytes: u64) -> Result<Completion> {
        check(&from.buffer, from.offset, bytes as usize)?;
        check(&to.buffer, to.offset, bytes as usize)?;
        // SAFETY: within both buffers; a copy within one buffer may overlap.
        unsafe {
            let source = from.buffer.start.add(from.offset as usize);
            to.buffer.start.add(to.offset as usize).copy_from(source, bytes as usize);
        }
        Ok(Completion::done(Ok(())))
    }
}

fn check(buffer: &SimulatorBuffer, offset: u64, bytes: usize) -> Result<()> {
    match (offset as usize).checked_add(bytes).is_some_and(|end| end <= buffer.bytes) {
        true => Ok(()),
        false => Err(Error::shape("range of a buffer", buffer.bytes, offset as usize + bytes)),
    }
}

/// A recorded dispatch.
struct Recorded {
    kernel: Kernel,
    buffers: Vec<DeviceBufferHandle<SimulatorMemory>>,
    constants: Vec<u8>,
    groups: [u32; 3],
    shared_bytes: u32,
    beside: bool,
}

/// Runs kernels on the CPU when they are submitted.
pub(crate) struct Simulator {
    memory: SimulatorMemory,
    recorded: Vec<Recorded>,
    seed: u32,
    lost: Arc<AtomicBool>,
}

impl Simulator {
    /// `seed` chooses the schedule: 0 ascending, 1 descending, others shuffled.
    pub(crate) fn new(library: Arc<Library>, seed: u32) -> Self {
        let memory = SimulatorMemory(library, Arc::default());
        Self { memory, recorded: Vec::new(), seed, lost: Arc::default() }
    }

    /// A way to lose the device: from then on what is submitted ends as on a device that was removed.
    pub(crate) fn loss(&self) -> impl Fn() + use<> {
        let lost = self.lost.clone();
        move || lost.store(true, Ordering::Relaxed)
    }

    /// Counts what goes over to the device and back from now on.
    pub(crate) fn traffic(&self) -> Arc<Traffic> {
        self.memory.1.clone()
    }

    fn run(&self, dispatch: &Recorded) -> Result<()> {
        let failed = |reason: &str| Error::Device {
            device: "metal".into(),
            reason: format!("{}: {reason}", dispatch.kernel.name()),
        };
        let mut constants = dispatch.constants.clone();
        let mut buffers: Vec<*mut c_void> =
            dispatch.buffers.iter().map(|handle| handle.buffer().start.cast()).collect();
        let mut lengths: Vec<u64> =
            dispatch.buffers.iter().map(|handle| handle.capacity()).collect();
        buffers.push(constants.as_mut_ptr().cast());
        lengths.push(constants.len() as u64);
        let name = CString::new(dispatch.kernel.name()).expect("a name without zeros");
        let launch = Launch {
            kernel: name.as_ptr(),
            buffers: buffers.as_ptr(),
            lengths: lengths.as_ptr(),
            n_buffers: buffers.len() as u32,
            threadgroup_bytes: dispatch.shared_bytes,
            groups: dispatch.groups,
            threads: dispatch.kernel.threads(),
            seed: self.seed,
        };
        // SAFETY: the launch and all it points to live until the call returns. Kernels may leave
        // their buffers only at the price of the process.
        let error = unsafe { (self.memory.0.run)(&launch) };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: the library returns a string of its own, ended by a zero.
        Err(failed(&unsafe { CStr::from_ptr(error) }.to_string_lossy()))
    }
}

impl Driver for Simulator {
    type Memory = SimulatorMemory;

    fn hardware(&self) -> String {
        "kernels on the CPU".into()
    }

    fn memory(&self) -> SimulatorMemory {
        self.memory.clone()
    }

    fn encode(&mut self, dispatch: &Dispatch<'_, SimulatorMemory>) -> Result<()> {
        if dispatch.groups.contains(&0) {
            let reason = format!("{}: an empty grid", dispatch.kernel.name());
            return Err(Error::Device { device: "metal".into(), reason });
        }
        self.recorded.push(Recorded {
            kernel: dispatch.kernel,
            buffers: dispatch.buffers.iter().map(|&handle| handle.clone()).collect(),
            constants: dispatch.constants.to_vec(),
            groups: dispatch.groups,
            shared_bytes: dispatch.shared_bytes,
            beside: dispatch.beside,
        });
        Ok(())
    }

    fn submit(&mut self) -> Result<()> {
        self.memory.1.submissions.fetch_add(1, Ordering::Relaxed);
        let recorded = std::mem::take(&mut self.recorded);
        if self.lost.load(Ordering::Relaxed) {
            let reason = "the device was removed".into();
            return Err(Error::Device { device: "metal".into(), reason });
        }
        for together in recorded.chunk_by(|_, next| next.beside) {
            // Those that may run at the same time must not care which is first.
            match self.seed % 2 {
                0 => together.iter().try_for_each(|dispatch| self.run(dispatch))?,
                _ => together.iter().rev().try_for_each(|dispatch| self.run(dispatch))?,
            }
        }
        Ok(())
    }

    fn abandon(&mut self) {
        self.recorded.clear();
    }
}

/// A backend over the kernels as they are.
pub(crate) fn backend(seed: u32) -> MetalBackend<Simulator> {
    over(Library::kernels(), seed)
}

/// A backend over a library.
pub(crate) fn over(library: Arc<Library>, seed: u32) -> MetalBackend<Simulator> {
    MetalBackend::new(Simulator::new(library, seed), 1 << 40).expect("a few bytes")
}
