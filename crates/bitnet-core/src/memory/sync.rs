//! The locks and counts the pool is built on: the standard library's, or loom's when a model of all
//! interleavings is checked (`--cfg loom`).

#[cfg(loom)]
pub(super) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(super) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks; what a panicking thread left behind is consistent, for nothing below panics half way.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
