//! A pool of threads that all run the same closure: the only form of parallelism the CPU needs.
//!
//! A decode step is some two hundred short parallel regions, so starting and ending one must cost
//! about a microsecond. Workers therefore wait for the next region by spinning for a moment before
//! they sleep; an idle pool burns no core. On a machine with other work to do, a worker may not be
//! running when its part is due: whoever is done takes the parts that nobody has begun, so that a
//! region waits for no thread that the system has not started. The pool knows nothing of matrices:
//! a region is a closure over a part's number, and [`share`] says which range belongs to it.

use crate::error::{Error, Result};
use crate::processors::{allowed_processors, bind_to, physical_cores};
use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Most threads a pool may have; far above any machine, so that a mistyped number is an error.
pub const MAX_THREADS: usize = 1024;

/// Waiting with the pause instruction only: covers the gaps inside a step.
const SPIN: Duration = Duration::from_micros(20);
/// Waiting that offers the core to others between looks: covers the gap between two steps.
const YIELD: Duration = Duration::from_micros(200);

/// The part of `0..n` that belongs to thread `index` of `threads`: contiguous, balanced to one.
pub fn share(n: usize, threads: usize, index: usize) -> Range<usize> {
    let (each, extra) = (n / threads, n % threads);
    let start = each * index + index.min(extra);
    start..start + each + usize::from(index < extra)
}

/// Threads worth using by default: the physical cores this process may run on.
pub fn default_threads() -> usize {
    let allowed = thread::available_parallelism().map_or(1, usize::from);
    physical_cores().map_or(allowed, |cores| cores.min(allowed)).max(1)
}

/// A mutable slice whose disjoint parts the threads of one region write.
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: `part` hands out disjoint parts only, as its caller promises; with `T: Send` each part may
// be used by another thread.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// The elements in `range`.
    ///
    /// # Safety
    /// While the result lives, no other live result of `part` overlaps it.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice that `self` borrows mutably; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// A persistent pool; the thread that calls [`ThreadPool::run`] takes part as number 0.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// What the caller and the workers look at, each hot word on a cache line of its own.
struct Shared {
    /// Number of the current region; a change starts the workers, [`STOP`] ends them.
    epoch: Line<AtomicUsize>,
    /// Parts of the current region that are not finished, the caller's own excluded.
    unfinished: Line<AtomicUsize>,
    /// The current region's closure. Written only by the thread that holds `busy`, before it
    /// moves `epoch`; read by who has claimed a part, before that part leaves `unfinished`.
    job: UnsafeCell<Option<Job>>,
    /// Set while a region runs.
    busy: AtomicBool,
    /// The first panic of a worker in the current region.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Whether the caller sleeps until `unfinished` is 0, and which thread it is.
    caller_asleep: AtomicBool,
    caller: Mutex<Option<Thread>>,
    /// One for each worker: whether it sleeps until `epoch` moves.
    asleep: Vec<Line<AtomicBool>>,
    /// One for each worker: the last region whose part with the worker's number was claimed, by
    /// the worker or by the caller in its place.
    claimed: Vec<Line<AtomicUsize>>,
}

/// Keeps its content off the cache lines of its neighbours.
#[repr(align(128))]
struct Line<T>(T);

type Job = *const (dyn Fn(usize) + Sync);

/// The epoch that tells workers to return; regions count from 1 and never reach it.
const STOP: usize = usize::MAX;

// SAFETY: everything in `Shared` is `Sync` but `job`, whose writes and reads are ordered by `epoch`
// (Release/Acquire) on the way in and by `unfinished` on the way out, as its comment says; the closure
// behind the pointer is `Sync`, so that many threads may call it.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in `Shared` belongs to a particular thread.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool of `threads` threads: the caller's and `threads − 1` new ones.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `threads` is 0 or above [`MAX_THREADS`], [`Error::Device`] if the
    /// system refuses a thread.
    pub fn new(threads: usize) -> Result<Self> {
        Self::start(threads, &[])
    }

    /// As [`ThreadPool::new`], with worker `i` bound to one of the processors this process may use
    /// (the `i`-th; the caller's thread keeps its freedom). Worth it on a machine of one's own;
    /// two pinned programs on the same processors fight. Where the system knows no such binding
    /// (macOS, Windows) the pool is an ordinary one.
    ///
    /// # Errors
    /// As [`ThreadPool::new`].
    pub fn pinned(threads: usize) -> Result<Self> {
        Self::start(threads, &allowed_processors())
    }

    fn start(threads: usize, processors: &[usize]) -> Result<Self> {
        if threads == 0 || threads > MAX_THREADS {
            let reason = format!("{threads} is not between 1 and {MAX_THREADS}");
            return Err(Error::invalid("threads", reason));
        }
        let mut pool = Self {
            shared: Arc::new(Shared {
                epoch: Line(AtomicUsize::new(0)),
                unfinished: Line(AtomicUsize::new(0)),
                job: UnsafeCell::new(None),
                busy: AtomicBool::new(false),
                panic: Mutex::new(None),
                caller_asleep: AtomicBool::new(false),
                caller: Mutex::new(None),
                asleep: (1..threads).map(|_| Line(AtomicBool::new(false))).collect(),
                claimed: (1..threads).map(|_| Line(AtomicUsize::new(0))).collect(),
            }),
            workers: Vec::with_capacity(threads - 1),
        };
        for index in 1..threads {
            let shared = pool.shared.clone();
            let processor = (!processors.is_empty()).then(|| processors[index % processors.len()]);
            let worker = thread::Builder::new()
                .name(format!("bitnet-{index}"))
                .spawn(move || {
                    if let Some(processor) = processor {
                        bind_to(processor);
                    }
                    work(&shared, index);
                })
                // Dropping `pool` on this path ends the threads that did start.
                .map_err(|e| Error::Device {
                    device: "cpu".into(),
                    reason: format!("thread {index} of {threads} did not start: {e}"),
                })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.asleep.len() + 1
    }

    /// Calls `job(i)` once for every `i` in `0..threads()`, in parallel, and returns when all
    /// calls have returned.
    ///
    /// Call `i` is thread `i`'s if that thread runs in time, else the caller makes it: the results
    /// of a call must not depend on the thread that makes it.
    ///
    /// A region inside a region, or a second one beside it from another thread, runs its calls one
    /// after the other on its own thread: `run` never waits for a pool that is in use. So calls
    /// must not wait for each other.
    ///
    /// # Panics
    /// If a call panics; the other calls are finished first.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let workers = shared.asleep.len();
        if workers == 0 || shared.busy.swap(true, Ordering::Acquire) {
            return (0..=workers).for_each(job);
        }
        // The workers' last writes were made before their parts left `unfinished`, which the
        // previous region waited for; `busy` (Acquire, released below) hands that knowledge from
        // caller to caller.
        shared.unfinished.0.store(workers, Ordering::Relaxed);
        // SAFETY: the pointer's lifetime is erased here; `wait_for_workers` returns when every
        // claimed part is finished and every part is claimed, and nothing between here and there
        // can unwind, so no one uses it after `run` returns. No worker reads the cell now: they read
        // it only between a claim of the current region's part and that part's end.
        unsafe {
            *shared.job.get() =
                Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job));
        }
        let next = match shared.epoch.0.load(Ordering::Relaxed) + 1 {
            STOP => 1,
            next => next,
        };
        // SeqCst with the loads below: either this thread sees the worker's `asleep`, or the worker,
        // which sets it before its last look at `epoch`, sees the new epoch and does not sleep.
        // Here and for both sleepers an exchange, though a store would do by the language's rules:
        // qemu lets a load overtake a sequentially consistent store of an aarch64 guest, and the
        // sleeper then waits for ever. On x86-64 both are the same instruction.
        shared.epoch.0.swap(next, Ordering::SeqCst);
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers) {
            if asleep.0.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        // Backwards: the workers were woken forwards, so the last is the likeliest to be late.
        for index in (1..=workers).rev() {
            if shared.claim(index, next) {
                shared.perform(index);
            }
        }
        shared.wait_for_workers();
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        shared.busy.store(false, Ordering::Release);
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // Exclusive access: no region runs, so the workers all wait for `epoch`.
        self.shared.epoch.0.store(STOP, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its jobs, so it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Takes part `index` of region `epoch`; false if it is taken, or the region is over.
    fn claim(&self, index: usize, epoch: usize) -> bool {
        let claimed = &self.claimed[index - 1].0;
        let last = claimed.load(Ordering::Relaxed);
        // Signed distance: a worker that slept through regions must not bring an old one back.
        // The exchange orders nothing: `epoch` (read before) and `unfinished` (changed after) do.
        (epoch.wrapping_sub(last) as isize) > 0
            && claimed.compare_exchange(last, epoch, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Makes call `index`, which this thread has claimed, and keeps its panic for the caller.
    fn perform(&self, index: usize) {
        // SAFETY: the part is claimed and unfinished, so the region goes on: the caller has written
        // the cell, writes it no more and keeps the closure alive until the part is finished.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe {
            if let Some(job) = *self.job.get() {
                (*job)(index);
            }
        }));
        if let Err(payload) = result {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        // Release: the job's writes are visible to the caller. After this line the region may be
        // over; a wake-up that comes late finds a caller that checks `unfinished` again.
        if self.unfinished.0.fetch_sub(1, Ordering::SeqCst) == 1
            && self.caller_asleep.load(Ordering::SeqCst)
            && let Some(caller) = &*self.caller.lock().unwrap_or_else(PoisonError::into_inner)
        {
            caller.unpark();
        }
    }

    /// Returns when every part of the current region is finished.
    fn wait_for_workers(&self) {
        // Acquire: what the workers wrote in the region is visible after this.
        if wait_awake(|| self.unfinished.0.load(Ordering::Acquire) == 0) {
            return;
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        loop {
            // SeqCst with `work`: either the last worker sees this flag, or this thread sees 0.
            self.caller_asleep.swap(true, Ordering::SeqCst);
            if self.unfinished.0.load(Ordering::SeqCst) == 0 {
                break;
            }
            thread::park();
        }
        self.caller_asleep.store(false, Ordering::Relaxed);
    }
}

/// The life of worker `index`.
fn work(shared: &Shared, index: usize) {
    let asleep = &shared.asleep[index - 1].0;
    let mut seen = 0;
    loop {
        let moved = || shared.epoch.0.load(Ordering::Acquire) != seen;
        if !wait_awake(moved) {
            loop {
                asleep.swap(true, Ordering::SeqCst);
                if shared.epoch.0.load(Ordering::SeqCst) != seen {
                    break;
                }
                thread::park();
            }
            asleep.store(false, Ordering::Relaxed);
        }
        seen = shared.epoch.0.load(Ordering::Acquire);
        if seen == STOP {
            return;
        }
        if shared.claim(index, seen) {
            shared.perform(index);
        }
    }
}

/// Waits without sleeping; false if `done` stays false for longer than that is worth.
fn wait_awake(done: impl Fn() -> bool) -> bool {
    // A pause takes between 4 and 140 cycles, so the clock, not a count, says when to stop.
    for _ in 0..64 {
        if done() {
            return true;
        }
        std::hint::spin_loop();
    }
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        let waited = start.elapsed();
        if waited > YIELD {
            return false;
        }
        if waited > SPIN {
            // With more threads than processors, the one waited for may need this very core.
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn shares_cover_the_range_once() {
        for n in [0, 1, 2, 7, 16, 1000] {
            for threads in 1..20 {
                let mut next = 0;
                for index in 0..threads {
                    let part = share(n, threads, index);
                    assert_eq!(part.start, next);
                    assert!(part.len() <= n.div_ceil(threads));
                    next = part.end;
                }
                assert_eq!(next, n);
            }
        }
    }

    #[test]
    fn a_thousandfold_run_calls_every_index_once() {
        for threads in [1, 2, 3, 8] {
            let pool = ThreadPool::new(threads).unwrap();
            let counts: Vec<_> = (0..threads).map(|_| AtomicU64::new(0)).collect();
            for round in 1..=2000 {
                pool.run(&|i| {
                    // A plain load and store: a second call with the same index would lose counts.
                    counts[i].store(counts[i].load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                });
                for count in &counts {
                    assert_eq!(count.load(Ordering::Relaxed), round);
                }
                if round % 500 == 0 {
                    // Long enough for the workers to go to sleep.
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    #[test]
    fn a_sleeping_caller_is_woken() {
        let pool = ThreadPool::new(3).unwrap();
        for _ in 0..20 {
            let done = AtomicUsize::new(0);
            pool.run(&|i| {
                if i != 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 3);
        }
    }

    #[test]
    fn who_is_about_to_sleep_is_woken() {
        // Parts that end just when the caller gives up waiting awake, and the other way round.
        let pool = ThreadPool::new(2).unwrap();
        let busy = |time: Duration| {
            let start = Instant::now();
            while start.elapsed() < time {
                std::hint::spin_loop();
            }
        };
        let calls = AtomicU64::new(0);
        for round in 0..3000 {
            let late = YIELD + Duration::from_nanos(round * 7 % 20_000);
            pool.run(&|i| {
                busy(if i == 0 { Duration::ZERO } else { late });
                calls.fetch_add(1, Ordering::Relaxed);
            });
            if round % 4 == 0 {
                busy(late);
            }
        }
        assert_eq!(calls.into_inner(), 2 * 3000);
    }

    #[test]
    fn a_worker_that_does_not_run_holds_nobody_up() {
        let pool = ThreadPool::new(2).unwrap();
        let shared = &*pool.shared;
        let me = thread::current().id();
        for _ in 0..200 {
            // The worker's part is claimed before the worker can see the region: it is late.
            let epoch = shared.epoch.0.load(Ordering::Relaxed) + 1;
            let calls = Mutex::new(Vec::new());
            let late = AtomicBool::new(true);
            pool.run(&|i| {
                if i == 0 {
                    late.store(shared.claim(1, epoch), Ordering::Relaxed);
                    if late.load(Ordering::Relaxed) {
                        shared.perform(1);
                    }
                }
                calls.lock().unwrap().push((i, thread::current().id()));
            });
            let mut calls = calls.into_inner().unwrap();
            calls.sort_by_key(|call| call.0);
            assert_eq!(calls.iter().map(|call| call.0).collect::<Vec<_>>(), [0, 1]);
            assert!(!late.into_inner() || calls[1].1 == me);
            // The region is over for the one who missed it.
            assert!(!shared.claim(1, epoch));
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(4).unwrap();
        for bad in 0..4 {
            let done = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|i| {
                    assert_ne!(i, bad, "planted");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }));
            assert!(result.is_err());
            assert_eq!(done.load(Ordering::Relaxed), 3, "the others finish");
            pool.run(&|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 7);
        }
    }

    #[test]
    fn nested_and_concurrent_regions_finish() {
        let pool = ThreadPool::new(3).unwrap();
        let calls = AtomicUsize::new(0);
        pool.run(&|_| {
            pool.run(&|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(calls.swap(0, Ordering::Relaxed), 9);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(&|_| {
                            calls.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(calls.into_inner(), 4 * 200 * 3);
    }

    #[test]
    fn absurd_thread_counts_are_errors() {
        assert!(ThreadPool::new(0).is_err());
        assert!(ThreadPool::new(MAX_THREADS + 1).is_err());
    }

    #[test]
    fn a_pinned_pool_works() {
        let pool = ThreadPool::pinned(2).unwrap();
        let calls = AtomicUsize::new(0);
        pool.run(&|_| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 2);
        assert!(default_threads() >= 1);
    }
}
