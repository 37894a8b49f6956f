//! The pool and the manager on the host's memory and on a device that the host does not reach.

use super::*;
use crate::error::Error;
use std::time::{Duration, Instant};

use AccessPattern::{Activations, KvCache, Readback, Upload, Weights};

fn host(budget: u64) -> EnhancedMemoryPool<HostMemory> {
    EnhancedMemoryPool::new(HostMemory, budget)
}

fn discrete(delay_ms: u64) -> GPUMemoryManager<DiscreteMemory> {
    let memory = DiscreteMemory::new(u64::MAX, Duration::from_millis(delay_ms));
    GPUMemoryManager::new(memory, u64::MAX)
}

#[test]
fn every_field_of_the_statistics_moves() {
    let manager = discrete(1);
    let pool = manager.pool();
    assert_eq!(manager.stats(), MemoryStats::default());

    let mut region = pool.take(1000, Activations).unwrap();
    let stats = manager.stats();
    assert_eq!((stats.allocated_bytes, stats.peak_bytes), (1024, 1024));
    assert_eq!((stats.active_bytes, stats.active_regions), (1000, 1));
    assert_eq!((stats.hit_rate, stats.fragmentation), (0.0, 24.0 / 1024.0));

    manager.copy_to_gpu_async(&[7; 600], &mut region, 0).unwrap().wait().unwrap();
    let stats = manager.stats();
    assert_eq!((stats.transfers, stats.transferred_bytes), (1, 600));
    // 600 bytes in a millisecond at least.
    assert!(stats.bandwidth > 0.0 && stats.bandwidth <= 600e3, "{}", stats.bandwidth);
    let staging = 768;
    assert_eq!((stats.allocated_bytes, stats.peak_bytes), (1024 + staging, 1024 + staging));
    assert_eq!(stats.active_regions, 1, "the staging buffer is back");

    drop(region);
    let stats = manager.stats();
    assert_eq!((stats.active_bytes, stats.active_regions, stats.fragmentation), (0, 0, 0.0));
    assert_eq!(stats.allocated_bytes, 1024 + staging, "kept for reuse");
    drop(pool.take(1000, Activations).unwrap());
    drop(pool.take(600, Upload).unwrap());
    assert_eq!(manager.stats().hit_rate, 2.0 / 4.0);
    assert_eq!(pool.trim(), 1024 + staging);
    let stats = manager.stats();
    assert_eq!((stats.allocated_bytes, stats.peak_bytes), (0, 1024 + staging));
}

#[test]
fn a_region_lives_as_long_as_its_last_handle() {
    let pool = host(u64::MAX);
    let region = pool.take(100, Activations).unwrap();
    let (id, other) = (region.id(), region.clone());
    drop(region);
    assert_eq!((pool.stats().active_regions, other.id()), (1, id));
    drop(other);
    assert_eq!(pool.stats().active_regions, 0);
    let next = pool.take(100, Activations).unwrap();
    assert!(next.id() != id && !next.is_fresh());
}

#[test]
fn a_buffer_is_written_by_a_sole_owner_only() {
    let pool = host(u64::MAX);
    let mut region = pool.take(64, Activations).unwrap();
    assert!(region.buffer_mut().is_some());
    let clone = region.clone();
    assert!(region.buffer_mut().is_none());
    drop(clone);
    let kept = region.shared_buffer();
    assert!(region.buffer_mut().is_none());
    // Who keeps a buffer beyond its region keeps it from serving another one.
    drop(region);
    let next = pool.take(64, Activations).unwrap();
    assert!(next.is_fresh() && !std::ptr::eq(next.buffer(), &*kept));
}

#[test]
fn a_budget_is_kept_and_idle_buffers_go_first() {
    let pool = host(10_000);
    assert!(matches!(pool.take(10_001, KvCache), Err(Error::OutOfMemory { .. })));
    let held = pool.take(4000, KvCache).unwrap();
    drop(pool.take(5000, Activations).unwrap());
    let idle = pool.stats().allocated_bytes;
    assert!(idle > 9000, "5000 bytes wait for reuse");
    // They make room for another size.
    let other = pool.take(2000, Activations).unwrap();
    assert!(pool.stats().allocated_bytes <= 10_000);
    assert!(matches!(pool.take(5000, KvCache), Err(Error::OutOfMemory { .. })));
    drop((held, other));
    assert_eq!(pool.take(9000, Weights).unwrap().bytes(), 9000);
    assert!(matches!(pool.take(0, Weights), Err(Error::Invalid { .. })));
}

#[test]
fn a_device_without_room_is_asked_again_after_idle_buffers_went() {
    let memory = DiscreteMemory::new(2, Duration::ZERO);
    let pool = EnhancedMemoryPool::new(memory, u64::MAX);
    drop(pool.take(1000, Activations).unwrap());
    let kept = pool.take(9000, KvCache).unwrap();
    assert_eq!(pool.stats().allocated_bytes, 1024 + 9216);
    // The device gives no third buffer; the idle one went in vain, and nothing else is lost.
    assert!(matches!(pool.take(5000, KvCache), Err(Error::OutOfMemory { .. })));
    let stats = pool.stats();
    assert_eq!((stats.allocated_bytes, stats.active_regions), (9216, 1));
    drop(kept);
    assert_eq!(pool.stats().allocated_bytes, 0);
}

#[test]
fn small_weights_lie_side_by_side_where_the_device_allows_it() {
    let manager = discrete(0);
    let pool = manager.pool();
    let mut norms: Vec<_> = (0..20).map(|_| pool.take(10_240, Weights).unwrap()).collect();
    let stats = pool.stats();
    assert_eq!(stats.hit_rate, 19.0 / 20.0, "one buffer serves all");
    for (i, norm) in norms.iter_mut().enumerate() {
        let bytes = vec![i as u8; 10_240];
        manager.copy_to_gpu_async(&bytes, norm, 0).unwrap().wait().unwrap();
    }
    for (i, norm) in norms.iter().enumerate() {
        let mut bytes = vec![0xFF; 10_240];
        manager.copy_from_gpu_async(norm, 0, 10_240).unwrap().wait(&mut bytes).unwrap();
        assert!(bytes.iter().all(|&b| b == i as u8));
    }
    drop(norms);
    pool.trim();
    assert_eq!(pool.stats().allocated_bytes, 0, "the common buffer went with the last of them");
    // The host's buffers hold one region each.
    let pool = host(u64::MAX);
    let norms = [pool.take(64, Weights).unwrap(), pool.take(64, Weights).unwrap()];
    assert!(!std::ptr::eq(norms[0].buffer(), norms[1].buffer()));
    drop(norms);
    assert_eq!(pool.stats().allocated_bytes, 0);
}

#[test]
fn staged_bytes_arrive_in_order() {
    let manager = discrete(2);
    let mut region = manager.pool().take(300, Activations).unwrap();
    let copies: Vec<_> = (0..10u8)
        .map(|i| manager.copy_to_gpu_async(&[i; 100], &mut region, u64::from(i) * 20).unwrap())
        .collect();
    assert!(!copies[9].is_done());
    manager.finish_transfers().unwrap();
    assert!(copies.iter().all(Transfer::is_done));
    let bytes = DiscreteMemory::peek(region.buffer());
    for (i, chunk) in bytes[..280].chunks(20).enumerate() {
        assert!(chunk.iter().all(|&b| b == i.min(9) as u8), "{i}");
    }
    let mut out = [0; 3];
    manager.copy_from_gpu_async(&region, 178, 3).unwrap().wait(&mut out).unwrap();
    assert_eq!(out, [8, 8, 9]);
    for (offset, bytes) in [(450, 100), (u64::MAX, 1)] {
        assert!(manager.copy_to_gpu_async(&vec![0; bytes], &mut region, offset).is_err());
        assert!(manager.copy_from_gpu_async(&region, offset, bytes as u64).is_err());
    }
    let readback = manager.copy_from_gpu_async(&region, 0, 8).unwrap();
    assert!(matches!(readback.wait(&mut [0; 7]), Err(Error::Shape { .. })));
}

#[test]
fn copies_overlap_with_computing() {
    let manager = discrete(30);
    let mut region = manager.pool().take(1 << 16, Weights).unwrap();
    let data = vec![1u8; 1 << 16];
    let start = Instant::now();
    let copy = manager.copy_to_gpu_async(&data, &mut region, 0).unwrap();
    let compute_from = Instant::now();
    assert!(!copy.is_done(), "the call returned before the copy was done");
    let mut sum = 0u64;
    while !copy.is_done() {
        sum += data.iter().map(|&b| u64::from(b)).sum::<u64>();
    }
    let computed_until = Instant::now();
    copy.wait().unwrap();
    assert!(sum >= 1 << 16, "work was done meanwhile");
    let spans = manager.transfer_spans();
    let span = spans[0];
    assert!(span.started >= start && span.bytes == 1 << 16);
    // In the trace the copy began before the computing and ended after most of it.
    let overlap = span.finished.min(computed_until) - span.started.max(compute_from);
    assert!(overlap >= Duration::from_millis(25), "{overlap:?}");
}

#[test]
fn unified_memory_needs_no_second_copy() {
    let manager = GPUMemoryManager::new(HostMemory, 1024);
    assert!(manager.pool().memory().properties().unified);
    let mut buffers = manager.inference_buffers(512, 512).unwrap();
    // The budget has no room for a staging buffer.
    let copy = manager.copy_to_gpu_async(&[9; 512], &mut buffers.input, 0).unwrap();
    assert!(copy.is_done());
    assert_eq!(buffers.input.buffer().as_bytes()[..512], [9; 512]);
    let mut out = [0; 512];
    manager.copy_from_gpu_async(&buffers.input, 0, 512).unwrap().wait(&mut out).unwrap();
    assert_eq!(out, [9; 512]);
    let stats = manager.stats();
    assert_eq!((stats.allocated_bytes, stats.active_regions), (1024, 2));
    assert_eq!((stats.transfers, stats.transferred_bytes), (2, 1024));
    // Several owners: no writing in place, and host memory has no other way.
    let _other = buffers.input.clone();
    assert!(manager.copy_to_gpu_async(&[1], &mut buffers.input, 0).is_err());
}

#[test]
fn what_a_step_exchanges_grows_with_the_steps() {
    let manager = GPUMemoryManager::new(HostMemory, u64::MAX);
    let mut buffers = manager.inference_buffers(64, 100).unwrap();
    let ids = |b: &InferenceBuffers<HostMemory>| (b.input.id(), b.output.id());
    let first = ids(&buffers);
    assert!(!buffers.make_room(&manager, 64, 3).unwrap());
    assert_eq!(ids(&buffers), first);
    assert!(buffers.make_room(&manager, 65, 100).unwrap());
    assert_eq!((buffers.input.bytes(), buffers.output.bytes()), (128, 100));
    assert!(ids(&buffers).0 != first.0 && ids(&buffers).1 == first.1);
    assert_eq!(manager.stats().active_regions, 2);
}

#[test]
fn a_device_that_goes_away_is_an_error_not_a_hang() {
    let (signal, completion) = Completion::new();
    drop(signal);
    assert!(matches!(completion.block(), Err(Error::Device { .. })));
}

/// Threads that take, fill, check and drop regions of all sizes, within a budget.
#[test]
fn threads_never_see_each_others_bytes() {
    const THREADS: u8 = 6;
    const BUDGET: u64 = 3 << 20;
    let pool = host(BUDGET);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let pool = pool.clone();
            scope.spawn(move || {
                let mut random = u64::from(thread) + 1;
                let mut live: Vec<(HostRegion, u8)> = Vec::new();
                for round in 0..4000u32 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let bytes = 1 + (random >> 40) as usize % 60_000;
                    let pattern = AccessPattern::ALL[(random >> 33) as usize % 5];
                    let mark = thread.wrapping_mul(41).wrapping_add(round as u8);
                    match HostRegion::take(&pool, bytes, pattern) {
                        Ok(mut region) => {
                            region.fill(mark);
                            live.push((region, mark));
                        }
                        Err(Error::OutOfMemory { .. }) => live.clear(),
                        Err(error) => panic!("{error}"),
                    }
                    if live.len() > 8 {
                        let (region, mark) = live.swap_remove((random >> 50) as usize % live.len());
                        assert!(region.iter().all(|&b| b == mark));
                    }
                    assert!(pool.stats().allocated_bytes <= BUDGET);
                }
            });
        }
    });
    let stats = pool.stats();
    assert_eq!((stats.active_bytes, stats.active_regions), (0, 0));
    assert!(stats.peak_bytes <= BUDGET && stats.hit_rate > 0.2, "{stats:?}");
}

#[test]
fn a_recording_is_what_happened() {
    let pool = host(u64::MAX);
    let before = pool.take(10, Weights).unwrap();
    assert_eq!(pool.stop_recording(), None);
    pool.start_recording();
    let region = pool.take(100, Upload).unwrap();
    let clone = region.clone();
    drop(region);
    let other = pool.take(50, Readback).unwrap();
    drop((clone, other));
    let trace = pool.stop_recording().unwrap();
    assert_eq!(trace.to_string(), "1 100 upload\n2 50 readback\n1\n2\n");
    drop(before);
    let report = trace.replay(&host(u64::MAX)).unwrap();
    assert_eq!((report.takes, report.hit_rate), (2, 0.0));
    // What was taken before is not known to a replay.
    let strange: AllocationTrace = "0\n".parse().unwrap();
    assert!(strange.replay(&host(u64::MAX)).is_err());
    assert!(AllocationTrace::default().replay(&host(u64::MAX)).is_err());
}

/// What a serving engine really asked of its pool: recorded from the MLX backend while four clients
/// sent twenty requests of different lengths (the test of bitnet-inference
/// `requests_served_together_are_answered_as_alone`, with `BITNET_MLX_TRACE`).
fn serving_trace() -> AllocationTrace {
    include_str!("serving.trace").parse().unwrap()
}

#[test]
fn a_serving_trace_is_served_from_memory_that_is_there() {
    let check = |what: &str, report: ReplayReport| {
        println!("{what}: {report:?}");
        assert!(report.takes > 500, "a trace of many steps");
        assert!(report.hit_rate > 0.8, "{what}: hit rate {}", report.hit_rate);
        let worst = report.worst_fragmentation;
        assert!(worst < 0.2, "{what}: fragmentation {worst}");
        assert!(report.overhead < 1.25, "{what}: {} times the use is held", report.overhead);
        assert!(report.take_p99 < Duration::from_millis(1), "{what}: {:?}", report.take_p99);
    };
    let trace = serving_trace();
    check("host", trace.replay(&host(u64::MAX)).unwrap());
    check("discrete", trace.replay(discrete(0).pool()).unwrap());
}

#[test]
fn without_reuse_the_serving_trace_misses() {
    let dedicated = AccessPattern::ALL.map(|pattern| (pattern, AllocationStrategy::Dedicated));
    let pool = EnhancedMemoryPool::with_strategies(HostMemory, u64::MAX, &dedicated);
    let report = serving_trace().replay(&pool).unwrap();
    assert!(report.hit_rate < 0.1, "{report:?}");
}
