//! What a pool has done: nine numbers, and the log of transfers behind three of them.

use super::device::Completion;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The state and history of a pool. Bytes are bytes of device memory.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MemoryStats {
    /// Bytes of the buffers the device gave and has not got back, in use or kept for reuse.
    pub allocated_bytes: u64,
    /// The largest [`allocated_bytes`](Self::allocated_bytes) there ever was.
    pub peak_bytes: u64,
    /// Bytes that the regions alive now asked for.
    pub active_bytes: u64,
    /// Regions alive now; a region with several handles counts once.
    pub active_regions: u64,
    /// Of all regions ever taken, the share that needed no new buffer: 0 to 1, 0 before the first.
    pub hit_rate: f64,
    /// Of the bytes of buffers with a region in them, the share that no region asked for (rounding
    /// and gaps): 0 to 1, 0 if there are none. Idle buffers do not count: they can be given back at
    /// any time.
    pub fragmentation: f64,
    /// Copies between host and device that are done, in either direction.
    pub transfers: u64,
    /// Bytes of these copies.
    pub transferred_bytes: u64,
    /// Bytes a second of these copies, over the time in which one was under way; 0 before the first.
    pub bandwidth: f64,
}

/// One copy between host and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferSpan {
    /// Bytes copied.
    pub bytes: u64,
    /// When it was asked for.
    pub started: Instant,
    /// When the device reported it done.
    pub finished: Instant,
}

/// Copies that are done, and those under way with what must live until then.
pub(super) struct TransferLog<K> {
    under_way: VecDeque<UnderWay<K>>,
    spans: VecDeque<TransferSpan>,
    transfers: u64,
    bytes: u64,
    busy: Duration,
    busy_until: Option<Instant>,
}

struct UnderWay<K> {
    bytes: u64,
    started: Instant,
    completion: Completion,
    kept: K,
}

/// Spans that are remembered.
const SPANS: usize = 256;

impl<K> TransferLog<K> {
    pub(super) fn new() -> Self {
        Self {
            under_way: VecDeque::new(),
            spans: VecDeque::new(),
            transfers: 0,
            bytes: 0,
            busy: Duration::ZERO,
            busy_until: None,
        }
    }

    /// Adds a copy; `kept` lives until it is done.
    pub(super) fn start(&mut self, bytes: u64, started: Instant, completion: Completion, kept: K) {
        self.under_way.push_back(UnderWay { bytes, started, completion, kept });
    }

    /// Takes note of what is done, in the order of starts, and returns what lived for it.
    #[must_use = "buffers are dropped outside the lock"]
    pub(super) fn sweep(&mut self) -> Vec<K> {
        let mut done = Vec::new();
        while let Some(front) = self.under_way.front() {
            let Some((result, finished)) = front.completion.outcome() else { break };
            let Some(UnderWay { bytes, started, kept, .. }) = self.under_way.pop_front() else {
                break;
            };
            if result.is_ok() {
                self.record(TransferSpan { bytes, started, finished });
            }
            done.push(kept);
        }
        done
    }

    /// Adds a copy that took from `started` until now.
    pub(super) fn record_now(&mut self, bytes: u64, started: Instant) {
        self.record(TransferSpan { bytes, started, finished: Instant::now() });
    }

    fn record(&mut self, span: TransferSpan) {
        let from = self.busy_until.map_or(span.started, |until| until.max(span.started));
        self.busy += span.finished.saturating_duration_since(from);
        self.busy_until = self.busy_until.max(Some(span.finished));
        self.transfers += 1;
        self.bytes += span.bytes;
        if self.spans.len() == SPANS {
            self.spans.pop_front();
        }
        self.spans.push_back(span);
    }

    pub(super) fn last(&self) -> Option<Completion> {
        self.under_way.back().map(|last| last.completion.clone())
    }

    pub(super) fn spans(&self) -> Vec<TransferSpan> {
        self.spans.iter().copied().collect()
    }

    /// Fills in the three fields about transfers.
    pub(super) fn fill(&self, stats: &mut MemoryStats) {
        stats.transfers = self.transfers;
        stats.transferred_bytes = self.bytes;
        let seconds = self.busy.as_secs_f64();
        stats.bandwidth = if seconds > 0.0 { self.bytes as f64 / seconds } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_two_copies_are_under_way_counts_once() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut log = TransferLog::<()>::new();
        for (bytes, started, finished) in [(500, 0, 10), (300, 4, 15), (200, 35, 40)] {
            log.record(TransferSpan { bytes, started: at(started), finished: at(finished) });
        }
        let mut stats = MemoryStats::default();
        log.fill(&mut stats);
        assert_eq!((stats.transfers, stats.transferred_bytes), (3, 1000));
        // 0 to 15 and 35 to 40.
        assert!((stats.bandwidth - 1000.0 / 0.020).abs() < 1e-6, "{}", stats.bandwidth);
    }

    #[test]
    fn what_is_under_way_is_kept_and_failures_do_not_count() {
        let mut log = TransferLog::new();
        let (first, completion) = Completion::new();
        log.start(8, Instant::now(), completion, "first");
        let failed = crate::Error::invalid("copy", "for the test");
        log.start(8, Instant::now(), Completion::done(Err(failed)), "second");
        assert!(log.sweep().is_empty(), "the first is not done");
        first.finish(Ok(()));
        assert_eq!(log.sweep(), ["first", "second"]);
        let mut stats = MemoryStats::default();
        log.fill(&mut stats);
        assert_eq!((stats.transfers, log.under_way.len()), (1, 0));
        assert_eq!(log.spans().len(), 1);
    }
}
