//! What a pool was asked for over time, as text, and how another pool does on it.

use super::device::DeviceMemory;
use super::pool::EnhancedMemoryPool;
use super::strategy::AccessPattern;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// One request to a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceEvent {
    /// A region was taken.
    Take {
        /// Its number.
        id: u64,
        /// Bytes asked for.
        bytes: u64,
        /// What for.
        pattern: AccessPattern,
    },
    /// Its last handle went.
    Release {
        /// Its number.
        id: u64,
    },
}

/// Requests in their order. As text: a line `ID BYTES PATTERN` or `ID` each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllocationTrace {
    /// The requests.
    pub events: Vec<TraceEvent>,
}

/// How a pool did on a trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplayReport {
    /// Regions taken.
    pub takes: u64,
    /// As [`MemoryStats::hit_rate`](super::MemoryStats::hit_rate), over these.
    pub hit_rate: f64,
    /// The largest [`MemoryStats::fragmentation`](super::MemoryStats::fragmentation) after an event
    /// with at least half as much in use as ever: a pool that holds next to nothing wastes nothing.
    pub worst_fragmentation: f64,
    /// Its mean over the same events.
    pub mean_fragmentation: f64,
    /// Peak of the memory held, over the peak of the memory asked for at one time.
    pub overhead: f64,
    /// Median and 99th percentile of the time of one take.
    pub take_p50: Duration,
    /// See [`take_p50`](Self::take_p50).
    pub take_p99: Duration,
}

impl AllocationTrace {
    /// Asks `pool` for what is on record.
    ///
    /// # Errors
    /// The pool's; [`Error::Invalid`] for a release of what was not taken, or no take at all.
    pub fn replay<M: DeviceMemory>(&self, pool: &EnhancedMemoryPool<M>) -> Result<ReplayReport> {
        let mut live = HashMap::new();
        let mut times = Vec::new();
        let mut states = Vec::with_capacity(self.events.len());
        for event in &self.events {
            match *event {
                TraceEvent::Take { id, bytes, pattern } => {
                    let start = Instant::now();
                    let region = pool.take(bytes, pattern)?;
                    times.push(start.elapsed());
                    live.insert(id, region);
                }
                TraceEvent::Release { id } => {
                    let reason = || format!("region {id} is released but was not taken");
                    live.remove(&id).ok_or_else(|| Error::invalid("trace", reason()))?;
                }
            }
            let stats = pool.stats();
            states.push((stats.active_bytes, stats.fragmentation));
        }
        let most_active = states.iter().map(|(active, _)| *active).max().unwrap_or(0);
        let busy = states.iter().filter(|(active, _)| 2 * active >= most_active);
        let busy: Vec<f64> = busy.map(|(_, fragmentation)| *fragmentation).collect();
        times.sort_unstable();
        let last = times.len().checked_sub(1).ok_or_else(|| Error::invalid("trace", "empty"))?;
        let stats = pool.stats();
        Ok(ReplayReport {
            takes: times.len() as u64,
            hit_rate: stats.hit_rate,
            worst_fragmentation: busy.iter().copied().fold(0.0, f64::max),
            mean_fragmentation: busy.iter().sum::<f64>() / busy.len() as f64,
            overhead: stats.peak_bytes as f64 / most_active as f64,
            take_p50: times[last / 2],
            take_p99: times[last * 99 / 100],
        })
    }
}

impl fmt::Display for AllocationTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for event in &self.events {
            match event {
                TraceEvent::Take { id, bytes, pattern } => {
                    writeln!(f, "{id} {bytes} {}", pattern.name())?;
                }
                TraceEvent::Release { id } => writeln!(f, "{id}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for AllocationTrace {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let events = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let bad = || Error::invalid("trace", format!("cannot read the line {line:?}"));
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |word: &str| word.parse::<u64>().map_err(|_| bad());
            match words[..] {
                [id] => Ok(TraceEvent::Release { id: number(id)? }),
                [id, bytes, name] => {
                    let mut patterns = AccessPattern::ALL.into_iter();
                    let pattern = patterns.find(|p| p.name() == name).ok_or_else(bad)?;
                    Ok(TraceEvent::Take { id: number(id)?, bytes: number(bytes)?, pattern })
                }
                _ => Err(bad()),
            }
        });
        Ok(Self { events: events.collect::<Result<_>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_holds_all_of_a_trace() {
        let text = "0 100 weights\n1 7 upload\n1\n2 99 readback\n0\n2\n";
        let trace: AllocationTrace = text.parse().unwrap();
        assert_eq!(trace.events.len(), 6);
        assert_eq!(trace.to_string(), text);
        for bad in ["x", "1 2", "1 2 heap", "1 2 upload 3", "-1", "\n"] {
            assert!(bad.parse::<AllocationTrace>().is_err(), "{bad:?}");
        }
    }
}
