//! What the system says of its processors: which ones this process may use, and which share a core.
//! Knows nothing of pools.

/// Processors the process may use, ascending; empty where the system does not tell.
pub(crate) fn allowed_processors() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: `cpu_set_t` is a plain bit set, for which all-zero is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes at most the size it is given into `set`.
        let rc = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) };
        if rc == 0 {
            // SAFETY: every index is below the set's capacity.
            return (0..libc::CPU_SETSIZE as usize)
                .filter(|&i| unsafe { libc::CPU_ISSET(i, &set) })
                .collect();
        }
    }
    Vec::new()
}

/// Binds the calling thread to one processor; a refusal leaves it free, which is only slower.
pub(crate) fn bind_to(processor: usize) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: as in `allowed_processors`, where `processor` comes from.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(processor, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &set);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = processor;
}

/// Physical cores among the allowed processors, where the system tells: processors that name the
/// same siblings share a core, and a hybrid Apple machine counts its fast cores only.
pub(crate) fn physical_cores() -> Option<usize> {
    #[cfg(target_os = "linux")]
    {
        let cores: Option<std::collections::BTreeSet<String>> = allowed_processors()
            .iter()
            .map(|cpu| {
                let path =
                    format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
                std::fs::read_to_string(path).ok()
            })
            .collect();
        cores.map(|cores| cores.len()).filter(|&n| n > 0)
    }
    #[cfg(target_os = "macos")]
    {
        let mut cores = 0i32;
        let mut size = size_of::<i32>();
        // SAFETY: the name ends in NUL; the system writes at most `size` bytes into `cores`.
        let rc = unsafe {
            libc::sysctlbyname(
                c"hw.perflevel0.physicalcpu".as_ptr(),
                (&raw mut cores).cast(),
                &mut size,
                std::ptr::null_mut(),
                0,
            )
        };
        usize::try_from(cores).ok().filter(|&n| rc == 0 && n > 0)
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    None
}
