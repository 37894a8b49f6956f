//! When requests are sent: so many at a time, or at random times of a given rate.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::client::{self, Target, Timing};
use super::dataset::{Dataset, uniform};

/// How requests arrive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Load {
    /// So many at a time.
    Closed(usize),
    /// So many a second on average, independent of each other and of the answers.
    Poisson(f64),
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(n) => write!(f, "{n} at a time"),
            Self::Poisson(rate) => write!(f, "{rate} a second"),
        }
    }
}

/// A run to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) load: Load,
    pub(crate) requests: usize,
    pub(crate) warmup: usize,
    pub(crate) seed: u64,
}

/// A run that was made.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) outcomes: Vec<Result<Timing, String>>,
    /// From the first request's start to the last one's end.
    pub(crate) took: Duration,
    /// Ctrl-C ended it.
    pub(crate) interrupted: bool,
}

/// Makes a run. `progress` is called after each request with the tokens a second so far.
///
/// # Errors
/// The warm-up fails: nothing after it would succeed.
pub(crate) async fn run(
    target: &Arc<Target>,
    dataset: &Dataset,
    plan: Plan,
    progress: &mut dyn FnMut(f64),
) -> anyhow::Result<Run> {
    for i in 0..plan.warmup {
        // Prompts of their own, so that none of the run's is known already.
        let body = dataset.body(plan.requests + i);
        let outcome = client::request(target, body).await;
        outcome.map_err(|failure| anyhow::anyhow!("the first request failed: {failure}"))?;
    }
    let bodies = (0..plan.requests).map(|i| dataset.body(i)).collect();
    let (results, mut outcomes_of_tasks) = mpsc::unbounded_channel();
    let work =
        Arc::new(Work { target: target.clone(), bodies, next: AtomicUsize::new(0), results });
    // Dropped at the end, it aborts what still runs.
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    match plan.load {
        Load::Closed(n) => {
            for _ in 0..n.min(plan.requests) {
                tasks.spawn(work.clone().one_after_another());
            }
        }
        Load::Poisson(rate) => {
            for (i, after) in arrivals(rate, plan.requests, plan.seed).into_iter().enumerate() {
                tasks.spawn(work.clone().one_at(i, start + after));
            }
        }
    }
    let mut tokens = 0;
    let mut run = Run { outcomes: Vec::new(), took: Duration::ZERO, interrupted: false };
    while run.outcomes.len() < plan.requests && !run.interrupted {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => run.interrupted = true,
            outcome = outcomes_of_tasks.recv() => {
                let outcome = outcome.context("the tasks that send requests have ended")?;
                tokens += outcome.as_ref().map_or(0, |timing: &Timing| timing.usage.completion_tokens);
                run.outcomes.push(outcome);
                progress(tokens as f64 / start.elapsed().as_secs_f64());
            }
        }
    }
    run.took = start.elapsed();
    Ok(run)
}

/// What the tasks of a run share.
struct Work {
    target: Arc<Target>,
    bodies: Vec<String>,
    next: AtomicUsize,
    results: mpsc::UnboundedSender<Result<Timing, String>>,
}

impl Work {
    async fn one(&self, i: usize) {
        let outcome = client::request(&self.target, self.bodies[i].clone()).await;
        // Nobody listens after Ctrl-C.
        let _ = self.results.send(outcome);
    }

    async fn one_at(self: Arc<Self>, i: usize, at: Instant) {
        tokio::time::sleep_until(at.into()).await;
        self.one(i).await;
    }

    async fn one_after_another(self: Arc<Self>) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.bodies.len() {
                return;
            }
            self.one(i).await;
        }
    }
}

/// Times of arrival: gaps are exponential with the mean `1 / rate`; the first request comes at once.
fn arrivals(rate: f64, n: usize, seed: u64) -> Vec<Duration> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut at = 0.0;
    let mut next = || {
        let now = at;
        at -= (1.0 - uniform(&mut rng)).ln() / rate;
        Duration::from_secs_f64(now)
    };
    (0..n).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_a_poisson_process() {
        let n = 20_000;
        let times = arrivals(50.0, n, 3);
        assert_eq!(times[0], Duration::ZERO);
        assert!(times.is_sorted());
        let gaps: Vec<f64> = times.windows(2).map(|t| (t[1] - t[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance =
            gaps.iter().map(|gap| (gap - mean) * (gap - mean)).sum::<f64>() / gaps.len() as f64;
        // The mean of n exponential gaps has a relative error of 1/√n; five of these are allowed.
        let error = 5.0 / (n as f64).sqrt();
        assert!((mean * 50.0 - 1.0).abs() < error, "{mean}");
        // An exponential's deviation equals its mean; its own relative error is √2/√n.
        assert!((variance.sqrt() / mean - 1.0).abs() < 2.0 * error, "{variance}");
        assert_eq!(arrivals(50.0, 10, 3), times[..10]);
    }
}
