//! Metal's buffers over the host's memory, which is shared with the device as theirs is.

use bitnet_core::memory::{AccessPattern, DeviceMemory, HostMemory};
use bitnet_metal::{MetalBuffer, MetalBufferPool};

#[test]
fn a_buffer_knows_what_it_is_and_its_memory_is_used_again() {
    let pool = MetalBufferPool::new(HostMemory, u64::MAX);
    let first = MetalBuffer::new(&pool, 100, AccessPattern::Activations).unwrap();
    let (id, alignment) = (first.id(), pool.memory().properties().alignment);
    assert_eq!((first.size(), first.alignment()), (100, alignment));
    assert!(!first.is_staging());
    let staging = MetalBuffer::new(&pool, 100, AccessPattern::Upload).unwrap();
    assert!(staging.is_staging());
    assert_ne!(staging.id(), id);
    let stats = pool.stats();
    assert_eq!((stats.active_bytes, stats.hit_rate), (200, 0.0));

    drop(first);
    let again = MetalBuffer::new(&pool, 100, AccessPattern::Activations).unwrap();
    // The same memory under a number of its own.
    assert_ne!(again.id(), id);
    let stats_again = pool.stats();
    assert_eq!(stats_again.allocated_bytes, stats.allocated_bytes);
    assert_eq!(stats_again.hit_rate, 1.0 / 3.0);
}
