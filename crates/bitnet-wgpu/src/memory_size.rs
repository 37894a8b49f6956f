//! How much memory an adapter has: wgpu does not tell, the Vulkan driver beneath it does.

use wgpu::Adapter;

/// Bytes of the adapter's own memory, where the driver tells.
#[cfg(any(target_os = "linux", target_os = "windows", target_os = "android"))]
pub(crate) fn of(adapter: &Adapter) -> Option<u64> {
    // SAFETY: the handle is used before the guard and the adapter are dropped, to read only.
    let raw = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = raw.shared_instance().raw_instance();
    // SAFETY: the physical device belongs to this instance, and both live as long as the guard.
    let memory =
        unsafe { instance.get_physical_device_memory_properties(raw.raw_physical_device()) };
    /// The flag of a heap that is the device's own memory.
    const DEVICE_LOCAL: u32 = 1;
    let heaps = &memory.memory_heaps[..memory.memory_heap_count as usize];
    let local = heaps.iter().filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0);
    local.map(|heap| heap.size).max()
}

/// Elsewhere nobody is asked.
#[cfg(not(any(target_os = "linux", target_os = "windows", target_os = "android")))]
pub(crate) fn of(_: &Adapter) -> Option<u64> {
    None
}
