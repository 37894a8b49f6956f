//! Every interleaving of threads that share a pool, by loom: run with `scripts/test-loom.sh`.
#![cfg(loom)]

use bitnet_core::memory::{
    AccessPattern, AllocationStrategy, BufferKind, Completion, CopySide, DeviceMemory,
    EnhancedMemoryPool, GPUMemoryManager, MemoryProperties,
};
use bitnet_core::{Error, Result};
use loom::thread;

/// A device whose buffers are numbers and whose copies are done by other threads, well or not.
struct Numbers {
    finishes: bool,
}

const NUMBERS: Numbers = Numbers { finishes: true };

impl DeviceMemory for Numbers {
    type Buffer = u64;

    fn name(&self) -> &str {
        "numbers"
    }

    fn properties(&self) -> MemoryProperties {
        MemoryProperties {
            unified: false,
            suballocates: true,
            alignment: 1,
            max_buffer_bytes: 1 << 20,
            total_bytes: None,
        }
    }

    fn allocate(&self, bytes: u64, _: BufferKind) -> Result<u64> {
        Ok(bytes)
    }

    fn write(&self, _: &mut u64, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: &u64, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn copy(&self, _: CopySide<Self>, _: CopySide<Self>, _: u64) -> Result<Completion> {
        let (signal, completion) = Completion::new();
        match self.finishes {
            true => drop(thread::spawn(move || signal.finish(Ok(())))),
            false => drop(thread::spawn(move || drop(signal))),
        }
        Ok(completion)
    }
}

/// Two threads want a buffer where the budget has room for one: each gets it or is refused, the
/// budget holds, and nothing is left over.
#[test]
fn a_budget_holds_between_threads() {
    loom::model(|| {
        let pool = EnhancedMemoryPool::new(NUMBERS, 128);
        let take = |pool: EnhancedMemoryPool<Numbers>| {
            let region = pool.take(128, AccessPattern::Activations);
            assert!(pool.stats().allocated_bytes <= 128);
            match region {
                Ok(region) => assert_eq!(region.bytes(), 128),
                Err(error) => assert!(matches!(error, Error::OutOfMemory { .. })),
            }
        };
        let other = pool.clone();
        let thread = thread::spawn(move || take(other));
        take(pool.clone());
        thread.join().unwrap();
        let stats = pool.stats();
        assert_eq!((stats.active_regions, stats.active_bytes), (0, 0));
        assert_eq!(pool.take(128, AccessPattern::Activations).unwrap().bytes(), 128);
    });
}

/// Regions of one shared buffer, taken and given back by two threads, never overlap.
#[test]
fn neighbours_in_a_buffer_do_not_overlap() {
    loom::model(|| {
        let shared = [(AccessPattern::Weights, AllocationStrategy::Shared { buffer_bytes: 64 })];
        let pool = EnhancedMemoryPool::with_strategies(NUMBERS, 64, &shared);
        let first = pool.take(16, AccessPattern::Weights).unwrap();
        let other = pool.clone();
        let thread = thread::spawn(move || {
            drop(first);
            other.take(24, AccessPattern::Weights).unwrap()
        });
        let mine = pool.take(16, AccessPattern::Weights).unwrap();
        let theirs = thread.join().unwrap();
        let (a, b) = (mine.offset(), theirs.offset());
        assert!(a + 16 <= b || b + 24 <= a, "{a} and {b}");
        drop((mine, theirs));
        assert_eq!(pool.stats().allocated_bytes, 0);
    });
}

/// Two handles of one region, dropped by two threads: it returns once, with the last.
#[test]
fn a_region_returns_with_its_last_handle() {
    loom::model(|| {
        let pool = EnhancedMemoryPool::new(NUMBERS, 1 << 10);
        let region = pool.take(64, AccessPattern::Activations).unwrap();
        let clone = region.clone();
        let thread = thread::spawn(move || drop(clone));
        drop(region);
        thread.join().unwrap();
        assert_eq!(pool.stats().active_regions, 0);
        let again = pool.take(64, AccessPattern::Activations).unwrap();
        assert!(!again.is_fresh());
    });
}

/// A thread that waits for a copy hears of it, finished or dropped, and the staging buffer is back.
#[test]
fn who_waits_for_a_copy_is_told() {
    for finishes in [true, false] {
        loom::model(move || {
            let manager = GPUMemoryManager::new(Numbers { finishes }, 1 << 10);
            let mut region = manager.pool().take(8, AccessPattern::Activations).unwrap();
            let copy = manager.copy_to_gpu_async(&[1; 8], &mut region, 0).unwrap();
            assert_eq!(copy.wait().is_ok(), finishes);
            let stats = manager.stats();
            assert_eq!((stats.transfers, stats.active_regions), (u64::from(finishes), 1));
        });
    }
}
