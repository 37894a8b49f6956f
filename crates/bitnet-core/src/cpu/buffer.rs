//! Activations, and the account of the memory a backend has handed out.

use crate::error::{Error, Result};
use crate::memory::{AccessPattern, EnhancedMemoryPool, HostMemory, HostRegion};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in use; shared by a backend and what it has handed out.
#[derive(Debug, Default, Clone)]
pub(crate) struct Counter(Arc<AtomicU64>);

impl Counter {
    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts `bytes` for as long as `value` lives.
    pub(crate) fn hold<T>(&self, value: T, bytes: u64) -> Held<T> {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Held { value, bytes, counter: self.clone() }
    }
}

/// Something on the device, counted in its memory until it is dropped.
#[derive(Debug)]
pub struct Held<T> {
    value: T,
    bytes: u64,
    counter: Counter,
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Held<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        self.counter.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Activations `(max_tokens, width)`, row-major, in a region of the backend's pool.
#[derive(Debug)]
pub struct CpuBuffer {
    data: HostRegion,
    width: usize,
}

impl CpuBuffer {
    /// Arbitrary numbers, whose pages are taken from the system when they are first written.
    pub(crate) fn new(
        max_tokens: usize,
        width: usize,
        pool: &EnhancedMemoryPool<HostMemory>,
    ) -> Result<Self> {
        if max_tokens == 0 || width == 0 {
            return Err(Error::invalid("buffer", format!("{max_tokens} × {width} is empty")));
        }
        let bytes = max_tokens.checked_mul(width).and_then(|len| len.checked_mul(4));
        let bytes = bytes.ok_or_else(|| Error::OutOfMemory {
            what: "activations".into(),
            bytes: (max_tokens as u64).saturating_mul(width as u64).saturating_mul(4),
        })?;
        Ok(Self { data: HostRegion::take(pool, bytes, AccessPattern::Activations)?, width })
    }

    /// Features of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The first `n` rows.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are fewer.
    pub fn rows(&self, n: usize) -> Result<&[f32]> {
        self.check(n)?;
        Ok(&self.data.as_floats()[..n * self.width])
    }

    /// The first `n` rows, to write to.
    ///
    /// # Errors
    /// As [`CpuBuffer::rows`].
    pub fn rows_mut(&mut self, n: usize) -> Result<&mut [f32]> {
        self.check(n)?;
        let len = n * self.width;
        Ok(&mut self.data.as_floats_mut()[..len])
    }

    fn check(&self, n: usize) -> Result<()> {
        let max = self.data.as_floats().len() / self.width;
        match n <= max {
            true => Ok(()),
            false => Err(Error::shape("rows of a buffer", format!("at most {max}"), n)),
        }
    }
}

/// What the processor calls itself, or its architecture where the system does not tell.
pub(crate) fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> EnhancedMemoryPool<HostMemory> {
        EnhancedMemoryPool::new(HostMemory, u64::MAX)
    }

    #[test]
    fn memory_is_counted_while_it_is_held() {
        let (counter, pool) = (Counter::default(), pool());
        let a = CpuBuffer::new(4, 10, &pool).unwrap();
        let b = counter.hold((), 7);
        let bytes = || pool.active_bytes(AccessPattern::Activations);
        assert_eq!((counter.bytes(), bytes()), (7, 160));
        drop((a, b));
        assert_eq!((counter.bytes(), bytes()), (0, 0));
    }

    #[test]
    fn rows_are_bounded() {
        let mut buffer = CpuBuffer::new(4, 10, &pool()).unwrap();
        assert_eq!(buffer.rows(4).unwrap().len(), 40);
        assert_eq!(buffer.rows_mut(0).unwrap().len(), 0);
        assert!(buffer.rows(5).is_err());
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let pool = pool();
        for (tokens, width) in [(0, 4), (4, 0)] {
            let error = CpuBuffer::new(tokens, width, &pool).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }));
        }
        for (tokens, width) in [(usize::MAX, 2), (1 << 60, 1), (1 << 40, 1 << 20)] {
            let error = CpuBuffer::new(tokens, width, &pool).unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { .. }));
        }
        assert_eq!(pool.stats().active_bytes, 0);
    }
}
