//! The life of the server as requests see it: serving, draining, cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, watch};

/// Where the server is in its life; it only moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// New requests are taken.
    Serving,
    /// New requests are refused; those in work go on.
    Draining,
    /// Those still in work are told to end.
    Cancelled,
}

/// Watched by everything that must end when the server does.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    phase: Arc<watch::Sender<Phase>>,
    in_work: Arc<InWork>,
}

#[derive(Debug, Default)]
struct InWork {
    count: AtomicUsize,
    none: Notify,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self { phase: Arc::new(watch::Sender::new(Phase::Serving)), in_work: Arc::default() }
    }
}

impl Lifecycle {
    /// Where the server is now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves forward to `phase`; never back.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let forward = phase > *now;
            *now = phase.max(*now);
            forward
        });
    }

    /// Returns once the server has reached `phase`.
    pub async fn reached(&self, phase: Phase) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }

    /// Counts a request in; it counts out when the guard is dropped.
    pub(crate) fn enter(&self) -> InWorkGuard {
        self.in_work.count.fetch_add(1, Ordering::AcqRel);
        InWorkGuard(self.in_work.clone())
    }

    /// Returns once no request is in work.
    pub(crate) async fn idle(&self) {
        loop {
            let notified = self.in_work.none.notified();
            if self.in_work.count.load(Ordering::Acquire) == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// A request in work.
#[derive(Debug)]
pub(crate) struct InWorkGuard(Arc<InWork>);

impl Drop for InWorkGuard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_only_move_forward() {
        let lifecycle = Lifecycle::default();
        lifecycle.advance(Phase::Cancelled);
        lifecycle.advance(Phase::Draining);
        assert_eq!(lifecycle.phase(), Phase::Cancelled);
    }

    #[tokio::test]
    async fn idle_waits_for_the_last_guard() {
        let lifecycle = Lifecycle::default();
        lifecycle.idle().await;
        let (one, two) = (lifecycle.enter(), lifecycle.enter());
        let waiting = tokio::spawn({
            let lifecycle = lifecycle.clone();
            async move { lifecycle.idle().await }
        });
        drop(one);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(two);
        waiting.await.unwrap();
    }
}
