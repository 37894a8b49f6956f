//! The pool: regions of device memory by reference count, from buffers that are used again.
//!
//! One lock guards the bookkeeping; buffers are made and dropped outside it. Knows sizes and
//! patterns, not what is stored.

use super::device::DeviceMemory;
use super::ranges::{Range, Ranges};
use super::stats::MemoryStats;
use super::strategy::{AccessPattern, AllocationStrategy, Plan};
use super::sync::{Arc, Condvar, Mutex, lock};
use super::trace::{AllocationTrace, TraceEvent};
use crate::error::{Error, Result};
use std::fmt;
use std::sync::Arc as StdArc;

/// A pool of one device's memory; clones are the same pool.
pub struct EnhancedMemoryPool<M: DeviceMemory>(Arc<Shared<M>>);

struct Shared<M: DeviceMemory> {
    memory: StdArc<M>,
    /// Most bytes held at a time.
    budget: u64,
    /// Strategies that differ from what the device and the pattern suggest.
    strategies: [Option<AllocationStrategy>; AccessPattern::ALL.len()],
    state: Mutex<State<M>>,
    /// Told when the device has answered a request.
    answered: Condvar,
}

struct State<M: DeviceMemory> {
    ranges: Ranges,
    /// The buffer of each number; `None` while a region has it for itself.
    buffers: Vec<Option<StdArc<M::Buffer>>>,
    /// Bytes being asked of the device now.
    reserved: u64,
    peak: u64,
    /// Bytes asked for by live regions, for each pattern.
    active: [u64; AccessPattern::ALL.len()],
    regions: u64,
    takes: u64,
    hits: u64,
    next_id: u64,
    recording: Option<AllocationTrace>,
}

impl<M: DeviceMemory> EnhancedMemoryPool<M> {
    /// A pool over `memory` that never holds more than `budget` bytes.
    pub fn new(memory: M, budget: u64) -> Self {
        Self::with_strategies(memory, budget, &[])
    }

    /// As [`new`](Self::new), with other strategies for some patterns.
    pub fn with_strategies(
        memory: M,
        budget: u64,
        strategies: &[(AccessPattern, AllocationStrategy)],
    ) -> Self {
        let mut table = [None; AccessPattern::ALL.len()];
        for (pattern, strategy) in strategies {
            table[*pattern as usize] = Some(*strategy);
        }
        let state = State {
            ranges: Ranges::default(),
            buffers: Vec::new(),
            reserved: 0,
            peak: 0,
            active: [0; AccessPattern::ALL.len()],
            regions: 0,
            takes: 0,
            hits: 0,
            next_id: 0,
            recording: None,
        };
        let memory = StdArc::new(memory);
        let (state, answered) = (Mutex::new(state), Condvar::new());
        Self(Arc::new(Shared { memory, budget, strategies: table, state, answered }))
    }

    /// The device's memory.
    pub fn memory(&self) -> &StdArc<M> {
        &self.0.memory
    }

    /// Most bytes it may hold.
    pub fn budget(&self) -> u64 {
        self.0.budget
    }

    /// A region of at least `bytes` bytes with arbitrary contents.
    ///
    /// Buffers kept for reuse are given back to the device before the budget, or the device, refuses.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the budget or the device has no room; [`Error::Invalid`] for no
    /// bytes at all; the device's errors.
    pub fn take(&self, bytes: u64, pattern: AccessPattern) -> Result<DeviceBufferHandle<M>> {
        let shared = &self.0;
        let properties = shared.memory.properties();
        let strategy = shared.strategies[pattern as usize]
            .unwrap_or_else(|| AllocationStrategy::choose(&properties, pattern, bytes));
        let plan = Plan::new(&properties, strategy, pattern, bytes)?;
        let evicted;
        {
            let mut state = lock(&shared.state);
            evicted = loop {
                if let Some(range) = state.ranges.take(&plan) {
                    state.hits += 1;
                    let shared = plan.shelf.shared;
                    return Ok(self.region(&mut state, range, bytes, pattern, shared, false));
                }
                match shared.reserve(&mut state, plan.buffer_bytes, pattern) {
                    // A buffer another thread is asking for may have room for both, or none may come.
                    Err(_) if state.reserved > 0 => {
                        let answered = shared.answered.wait(state);
                        state = answered.unwrap_or_else(|poisoned| poisoned.into_inner());
                    }
                    result => break result?,
                }
            };
        }
        drop(evicted);
        let buffer = self.allocate(&plan);
        let mut state = lock(&shared.state);
        state.reserved -= plan.buffer_bytes;
        shared.answered.notify_all();
        let buffer = StdArc::new(buffer?);
        let range = state.ranges.add(&plan);
        state.peak = state.peak.max(state.ranges.held());
        if range.buffer >= state.buffers.len() {
            state.buffers.resize_with(range.buffer + 1, || None);
        }
        state.buffers[range.buffer] = Some(buffer);
        Ok(self.region(&mut state, range, bytes, pattern, plan.shelf.shared, true))
    }

    /// Asks the device; if it has no room, once more without the buffers kept for reuse.
    fn allocate(&self, plan: &Plan) -> Result<M::Buffer> {
        let memory = &self.0.memory;
        match memory.allocate(plan.buffer_bytes, plan.shelf.kind) {
            Err(Error::OutOfMemory { .. }) if self.trim() > 0 => {
                memory.allocate(plan.buffer_bytes, plan.shelf.kind)
            }
            result => result,
        }
    }

    /// Makes the handle of a range that was just taken.
    fn region(
        &self,
        state: &mut State<M>,
        range: Range,
        bytes: u64,
        pattern: AccessPattern,
        shared: bool,
        fresh: bool,
    ) -> DeviceBufferHandle<M> {
        let slot = &mut state.buffers[range.buffer];
        let buffer = if shared { slot.clone() } else { slot.take() };
        let id = state.next_id;
        state.next_id += 1;
        state.takes += 1;
        state.regions += 1;
        state.active[pattern as usize] += bytes;
        if let Some(trace) = &mut state.recording {
            trace.events.push(TraceEvent::Take { id, bytes, pattern });
        }
        let pool = self.0.clone();
        DeviceBufferHandle(Arc::new(Region { pool, buffer, range, bytes, pattern, id, fresh }))
    }

    /// Gives every buffer without a region back to the device; returns their bytes.
    pub fn trim(&self) -> u64 {
        let (before, after, buffers);
        {
            let mut state = lock(&self.0.state);
            before = state.ranges.held();
            buffers = state.evict(u64::MAX);
            after = state.ranges.held();
        }
        drop(buffers);
        before - after
    }

    /// Bytes that live regions of this pattern asked for.
    pub fn active_bytes(&self, pattern: AccessPattern) -> u64 {
        lock(&self.0.state).active[pattern as usize]
    }

    /// The six numbers about memory; those about transfers are zero (see
    /// [`GPUMemoryManager::stats`](super::GPUMemoryManager::stats)).
    pub fn stats(&self) -> MemoryStats {
        let state = lock(&self.0.state);
        let active_bytes = state.active.iter().sum();
        let share = |part: u64, of: u64| if of == 0 { 0.0 } else { part as f64 / of as f64 };
        MemoryStats {
            allocated_bytes: state.ranges.held(),
            peak_bytes: state.peak,
            active_bytes,
            active_regions: state.regions,
            hit_rate: share(state.hits, state.takes),
            fragmentation: share(state.ranges.busy() - active_bytes, state.ranges.busy()),
            ..MemoryStats::default()
        }
    }

    /// Starts to record what is taken and given back, instead of any recording before.
    pub fn start_recording(&self) {
        lock(&self.0.state).recording = Some(AllocationTrace::default());
    }

    /// Ends the recording, if there is one, and returns it.
    pub fn stop_recording(&self) -> Option<AllocationTrace> {
        lock(&self.0.state).recording.take()
    }
}

impl<M: DeviceMemory> State<M> {
    /// Takes idle buffers of `bytes` or more together out of the pool, the longest unused first.
    fn evict(&mut self, bytes: u64) -> Vec<Option<StdArc<M::Buffer>>> {
        let idle = self.ranges.idle(bytes);
        idle.into_iter()
            .map(|index| {
                self.ranges.remove(index);
                self.buffers[index].take()
            })
            .collect()
    }
}

impl<M: DeviceMemory> Shared<M> {
    /// Sets `bytes` of the budget aside; returns the buffers that had to go for them.
    fn reserve(
        &self,
        state: &mut State<M>,
        bytes: u64,
        pattern: AccessPattern,
    ) -> Result<Vec<Option<StdArc<M::Buffer>>>> {
        let out_of_memory = || Error::OutOfMemory { what: pattern.name().into(), bytes };
        let busy = state.ranges.busy().saturating_add(state.reserved);
        if busy.checked_add(bytes).is_none_or(|needed| needed > self.budget) {
            return Err(out_of_memory());
        }
        let needed = state.ranges.held() + state.reserved + bytes;
        let evicted = state.evict(needed.saturating_sub(self.budget));
        state.reserved += bytes;
        Ok(evicted)
    }

    /// Takes a region back.
    fn release(&self, region: &mut Region<M>) {
        let mut dropped;
        {
            let mut state = lock(&self.state);
            let buffer = region.buffer.take();
            state.regions -= 1;
            state.active[region.pattern as usize] -= region.bytes;
            if let Some(trace) = &mut state.recording {
                trace.events.push(TraceEvent::Release { id: region.id });
            }
            let index = region.range.buffer;
            let shared = state.buffers[index].is_some();
            let kept_elsewhere = buffer.as_ref().is_some_and(|b| StdArc::strong_count(b) > 1);
            let mut remove = state.ranges.give_back(region.range);
            if shared {
                dropped = (buffer, None);
            } else {
                // A buffer that somebody keeps beyond its region does not serve another one.
                remove |= kept_elsewhere;
                state.buffers[index] = buffer;
                dropped = (None, None);
            }
            if remove {
                state.ranges.remove(index);
                dropped.1 = state.buffers[index].take();
            }
        }
        drop(dropped);
    }
}

impl<M: DeviceMemory> Clone for EnhancedMemoryPool<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M: DeviceMemory> fmt::Debug for EnhancedMemoryPool<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnhancedMemoryPool")
            .field("device", &self.0.memory.name())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// A region of device memory. Clones are the same region; with the last one it returns to its pool.
pub struct DeviceBufferHandle<M: DeviceMemory>(Arc<Region<M>>);

struct Region<M: DeviceMemory> {
    pool: Arc<Shared<M>>,
    /// `None` only while it is being dropped.
    buffer: Option<StdArc<M::Buffer>>,
    range: Range,
    bytes: u64,
    pattern: AccessPattern,
    id: u64,
    fresh: bool,
}

impl<M: DeviceMemory> DeviceBufferHandle<M> {
    fn held(&self) -> &StdArc<M::Buffer> {
        self.0.buffer.as_ref().expect("a region has its buffer until it is dropped")
    }

    /// The buffer it lies in.
    pub fn buffer(&self) -> &M::Buffer {
        self.held()
    }

    /// The buffer it lies in, kept alive by the caller.
    pub fn shared_buffer(&self) -> StdArc<M::Buffer> {
        self.held().clone()
    }

    /// The buffer, if this region has it for itself, this is the region's only handle, and nobody
    /// else keeps the buffer alive.
    pub fn buffer_mut(&mut self) -> Option<&mut M::Buffer> {
        StdArc::get_mut(Arc::get_mut(&mut self.0)?.buffer.as_mut()?)
    }

    /// Its first byte in the buffer.
    pub fn offset(&self) -> u64 {
        self.0.range.offset
    }

    /// Bytes that were asked for.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Bytes that belong to it.
    pub fn capacity(&self) -> u64 {
        self.0.range.bytes
    }

    /// What it is for.
    pub fn pattern(&self) -> AccessPattern {
        self.0.pattern
    }

    /// A number no other region of the pool has or had.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Whether no region had these bytes before.
    pub fn is_fresh(&self) -> bool {
        self.0.fresh
    }
}

impl<M: DeviceMemory> Clone for DeviceBufferHandle<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M: DeviceMemory> fmt::Debug for DeviceBufferHandle<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBufferHandle")
            .field("id", &self.id())
            .field("bytes", &self.bytes())
            .field("capacity", &self.capacity())
            .field("pattern", &self.pattern())
            .finish_non_exhaustive()
    }
}

impl<M: DeviceMemory> Drop for Region<M> {
    fn drop(&mut self) {
        let pool = self.pool.clone();
        pool.release(self);
    }
}
