//! What the system says about this process and what runs beside it. Linux tells through `/proc`;
//! elsewhere every answer is `None`.

use std::fs;

/// Memory this process holds now, in bytes.
pub fn resident_memory() -> Option<u64> {
    kib("/proc/self/status", "VmRSS")
}

/// The most memory this process held since it started, or since [`reset_peak_memory`].
pub fn peak_memory() -> Option<u64> {
    kib("/proc/self/status", "VmHWM")
}

/// Lets [`peak_memory`] start anew; false where the system does not allow it.
pub fn reset_peak_memory() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Processes that ran or wanted to, on average over the last minute.
pub fn load_average() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// A `name: 123 kB` line, in bytes.
fn kib(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Processor time since the system started, in clock ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTimes {
    /// All processors, whatever they did, idling included.
    total: u64,
    /// All processors, working or taken away by the machine beneath.
    busy: u64,
    /// This process alone.
    own: u64,
    processors: u64,
}

impl CpuTimes {
    /// As of now.
    pub fn now() -> Option<Self> {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        Self::parse(&stat, &fs::read_to_string("/proc/self/stat").ok()?)
    }

    /// Reads `/proc/stat` and `/proc/self/stat`.
    fn parse(stat: &str, own: &str) -> Option<Self> {
        let mut lines = stat.lines();
        let fields = lines.next()?.strip_prefix("cpu ")?.split_whitespace();
        // user nice system idle iowait irq softirq steal; guest times are counted in user already.
        let times: Vec<u64> = fields.take(8).map(|f| f.parse().ok()).collect::<Option<_>>()?;
        let total = times.iter().sum();
        let idle = times.get(3)? + times.get(4)?;
        let processors = lines.take_while(|line| line.starts_with("cpu")).count() as u64;
        // The command may hold spaces; utime and stime are fields 14 and 15, counted from 1.
        let mut own = own.rsplit_once(')')?.1.split_whitespace().skip(11);
        let own = own.next()?.parse::<u64>().ok()? + own.next()?.parse::<u64>().ok()?;
        Some(Self { total, busy: total - idle, own, processors })
    }

    /// Processors that others kept busy since `earlier`, on average.
    pub fn other_load_since(&self, earlier: &Self) -> f64 {
        let elapsed = self.total.saturating_sub(earlier.total);
        let busy = self.busy.saturating_sub(earlier.busy);
        let others = busy.saturating_sub(self.own.saturating_sub(earlier.own));
        match elapsed {
            0 => 0.0,
            _ => others as f64 / elapsed as f64 * self.processors as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_of_others_is_what_is_busy_without_us() {
        let own = |ticks| format!("12 (a (b) c) R 1 2 3 4 5 6 7 8 9 10 {ticks} 5 0 0 20 0");
        let stat = |user, idle| {
            format!("cpu  {user} 0 10 {idle} 7 0 3 2 0 0\ncpu0 1 0 0 0\ncpu1 1 0 0 0\nintr 5\n")
        };
        let before = CpuTimes::parse(&stat(100, 1000), &own(50)).unwrap();
        // 200 ticks on two processors: 150 busy, 100 of them ours.
        let after = CpuTimes::parse(&stat(250, 1050), &own(150)).unwrap();
        assert_eq!(after.other_load_since(&before), 0.5);
        assert_eq!(before.other_load_since(&before), 0.0);
        assert_eq!(CpuTimes::parse("no stat", &own(1)), None);
        assert_eq!(CpuTimes::parse(&stat(1, 1), "12 (x) R 1"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_what_we_hold() {
        let (resident, peak) = (resident_memory().unwrap(), peak_memory().unwrap());
        assert!(resident > 100_000 && peak >= resident, "{resident} {peak}");
        assert!(CpuTimes::now().is_some());
    }
}
