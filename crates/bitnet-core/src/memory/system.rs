//! How much memory the machine has, and how much of it is free. Where CPU and GPU share it, this is
//! the size of the GPU's memory too. Linux and macOS tell; elsewhere the answers are `None`.

/// All memory of the machine, or what a control group leaves of it, in bytes.
pub fn total_memory() -> Option<u64> {
    imp::total()
}

/// Memory that can be had without pushing anything out, in bytes.
pub fn available_memory() -> Option<u64> {
    imp::available()
}

#[cfg(target_os = "linux")]
mod imp {
    use std::fs;

    pub(super) fn total() -> Option<u64> {
        let machine = super::kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")?;
        let group = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
        let limit = group.and_then(|text| text.trim().parse::<u64>().ok());
        Some(limit.map_or(machine, |limit| limit.min(machine)))
    }

    pub(super) fn available() -> Option<u64> {
        super::kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
    }
}

#[cfg(target_os = "macos")]
mod imp {
    pub(super) fn total() -> Option<u64> {
        let mut bytes = 0u64;
        let mut size = std::mem::size_of::<u64>();
        // SAFETY: the name is a C string, and `hw.memsize` is a 64-bit number that fits `bytes`,
        // whose size is given; nothing is set.
        let status = unsafe {
            libc::sysctlbyname(
                c"hw.memsize".as_ptr(),
                (&raw mut bytes).cast(),
                &raw mut size,
                std::ptr::null_mut(),
                0,
            )
        };
        (status == 0 && size == std::mem::size_of::<u64>()).then_some(bytes)
    }

    pub(super) fn available() -> Option<u64> {
        None
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod imp {
    pub(super) fn total() -> Option<u64> {
        None
    }

    pub(super) fn available() -> Option<u64> {
        None
    }
}

/// A `name: 123 kB` line, in bytes.
#[cfg(any(target_os = "linux", test))]
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_in_kib_are_read() {
        let text =
            "MemTotal:       24689792 kB\nMemFree:     10 kB\nOdd: x kB\nMemAvailable: 7 MB\n";
        assert_eq!(kib(text, "MemTotal"), Some(24_689_792 << 10));
        assert_eq!(kib(text, "MemFree"), Some(10 << 10));
        for name in ["Mem", "Odd", "MemAvailable", "Swap"] {
            assert_eq!(kib(text, name), None);
        }
    }

    #[test]
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    fn the_system_tells() {
        let total = total_memory().unwrap();
        assert!(total > 64 << 20, "{total}");
        if let Some(available) = available_memory() {
            assert!(available > 0);
        }
    }
}
