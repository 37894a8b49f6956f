//! What this machine could do at best: the limits that measured speeds are shares of.
//!
//! Decoding is bound by reading the weights, prompt processing by multiply-accumulates; both limits
//! drift with clocks and neighbours, so they are measured beside the thing they limit. Knows
//! nothing of models.

use crate::error::Result;
use crate::kernels::{Kernels, WeightMemory, prefetch};
use crate::threads::{Parts, ThreadPool, share};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// How long a limit is measured: enough to catch the machine at its best moment.
const MEASURE: Duration = Duration::from_millis(400);
/// Work between two looks at the clock.
const MAC_ROUNDS: u64 = 200_000;

/// Bytes a second that the pool's threads together can read from `bytes` bytes of memory laid out
/// like weights (huge pages where the system has them). Choose `bytes` far above the caches.
///
/// # Errors
/// [`crate::Error::OutOfMemory`] if there is no room for the bytes.
pub fn measure_read_bandwidth(pool: &ThreadPool, bytes: usize) -> Result<f64> {
    const PAGE: usize = 4096;
    let n_pages = bytes.div_ceil(PAGE).max(1);
    let mut block = WeightMemory::new().take(n_pages * PAGE)?;
    let parts = Parts::new(&mut block);
    pool.run(&|thread| {
        let pages = share(n_pages, pool.threads(), thread);
        // SAFETY: the shares of the threads are disjoint. Zero pages would all be one in the cache.
        unsafe { parts.part(pages.start * PAGE..pages.end * PAGE) }.fill(1);
    });
    let best = best_time(|| {
        pool.run(&|thread| {
            let pages = share(n_pages, pool.threads(), thread);
            black_box(sum(&block[pages.start * PAGE..pages.end * PAGE]));
        });
    });
    Ok((n_pages * PAGE) as f64 / best)
}

/// Multiply-accumulates of 8-bit integers a second that the pool's threads together can do with the
/// instruction that `kernels` multiply with, on registers alone.
pub fn measure_mac_peak(pool: &ThreadPool, kernels: &Kernels) -> f64 {
    let per_thread = kernels.mac_loop(0);
    let best = best_time(|| {
        pool.run(&|_| {
            black_box(kernels.mac_loop(MAC_ROUNDS));
        })
    });
    (per_thread * MAC_ROUNDS) as f64 * pool.threads() as f64 / best
}

/// The shortest of many runs, in seconds.
fn best_time(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    run();
    while start.elapsed() < MEASURE || best == f64::INFINITY {
        let before = Instant::now();
        run();
        best = best.min(before.elapsed().as_secs_f64());
    }
    best
}

/// Reads every byte, asking ahead as the kernels do, with enough independent additions to wait for
/// memory only.
fn sum(bytes: &[u8]) -> u64 {
    const LINE: usize = 64;
    const AHEAD: usize = 2048;
    let mut sums = [0u64; 8];
    for line in bytes.as_chunks::<LINE>().0 {
        prefetch(line.as_ptr().wrapping_add(AHEAD));
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |sum, &part| sum.wrapping_add(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_read() {
        let mut bytes = vec![0u8; 640];
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert_eq!(sum(&bytes), 1 << (8 * (at % 8)));
            bytes[at] = 0;
        }
    }

    #[test]
    fn limits_are_plausible() {
        let pool = ThreadPool::new(1).unwrap();
        // Between a thousandth and a thousandfold of what machines do today.
        let read = measure_read_bandwidth(&pool, 8 << 20).unwrap();
        assert!((1e7..1e14).contains(&read), "{read} bytes a second");
        for kernels in Kernels::available() {
            let macs = measure_mac_peak(&pool, kernels);
            assert!((1e7..1e15).contains(&macs), "{}: {macs} a second", kernels.name());
        }
    }
}
