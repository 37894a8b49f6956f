//! A run: a step over a few batches, evaluation, and the state a resumed run needs.
//!
//! ```text
//! step: quantize the masters → windows forward and backward, shared out to threads → clip → AdamW
//! ```
//!
//! Knows no files and no text.

use crate::batch::Batch;
use crate::distill::ExtraLoss;
use crate::error::{Error, Result};
use crate::head::piece_logits;
use crate::model::{Model, Parameter};
use crate::optimizer::{AdamW, Moments};
use crate::schedule::Schedule;
use crate::vector;
use crate::weights::Weights;
use crate::worker::{Goal, Sums, Windows, Worker};
use bitnet_core::cpu::CpuBackend;
use bitnet_core::threads::MAX_THREADS;
use std::sync::Arc;

/// How a model is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainOptions {
    /// Learning rate and weight decay.
    pub schedule: Schedule,
    /// The optimizer.
    pub optimizer: AdamW,
    /// Gradients longer than this are shortened to it; 0: never.
    pub clip: f64,
    /// CPU threads. Gradients of the windows are added up thread by thread, so that the last bits
    /// of a run depend on this number.
    pub threads: usize,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss of the counted predictions, nats.
    pub loss: f64,
    /// Mean loss of an [`ExtraLoss`], where there is one.
    pub extra_loss: f64,
    /// Length of the gradient before clipping.
    pub grad_norm: f64,
    /// Predictions that counted.
    pub tokens: usize,
    /// Learning rate.
    pub rate: f64,
}

/// Tokens a thread takes through the model at a time: enough to pay for reading the weights, few
/// enough for the activations to stay in the caches, and integer sums in 32 bits.
const PIECE_TOKENS: usize = 512;

/// A model being trained.
pub struct Trainer {
    model: Model,
    options: TrainOptions,
    moments: Moments,
    steps: u64,
    /// Quantizes.
    backend: CpuBackend,
    workers: Vec<Worker>,
    /// Of the masters as they are; `None` after they changed.
    weights: Option<Weights>,
}

impl Trainer {
    /// Starts a run.
    ///
    /// # Errors
    /// [`Error::Setting`] for options outside their range.
    pub fn new(model: Model, options: TrainOptions) -> Result<Self> {
        options.schedule.check()?;
        options.optimizer.check()?;
        if !(options.clip >= 0.0 && options.clip.is_finite()) {
            return Err(Error::setting("clip", "0 or more", options.clip));
        }
        if options.threads == 0 || options.threads > MAX_THREADS {
            return Err(Error::setting("threads", format!("1 to {MAX_THREADS}"), options.threads));
        }
        let workers = (0..options.threads).map(|_| Worker::new(model.config()));
        Ok(Self {
            moments: Moments::new(model.places.len),
            steps: 0,
            backend: CpuBackend::new(Some(1), None)?,
            workers: workers.collect::<Result<_>>()?,
            weights: None,
            model,
            options,
        })
    }

    /// One optimizer step over all `batches` together; `progress` is the place in the schedule, 0
    /// to 1.
    ///
    /// # Errors
    /// [`Error::Data`] for batches that do not fit the model or in which nothing counts,
    /// [`Error::Setting`] for an extra loss that does not suit it, [`Error::Diverged`] if the loss or the gradient is no number. The model is then as it was.
    pub fn step(
        &mut self,
        batches: &[Batch],
        progress: f64,
        extra: Option<&dyn ExtraLoss>,
    ) -> Result<StepStats> {
        let sums = self.gradients(batches, extra)?;
        let tokens = sums.counted;
        let (loss, extra_loss) = (sums.nats / tokens as f64, sums.extra);
        let step = self.steps + 1;
        let diverged = |what, value: f64| Error::Diverged { step, what, value };
        if !(loss + extra_loss).is_finite() {
            return Err(diverged("loss", loss + extra_loss));
        }
        let gradients = &self.workers[0].gradients;
        let grad_norm = vector::square_sum(gradients).sqrt();
        if !grad_norm.is_finite() {
            return Err(diverged("gradient norm", grad_norm));
        }
        let clip = self.options.clip;
        let factor = if clip > 0.0 && grad_norm > clip { clip / grad_norm } else { 1.0 };
        let schedule = &self.options.schedule;
        let rate = schedule.rate(progress);
        self.weights = None; // they hold the masters, which change now
        self.moments.update(
            &self.options.optimizer,
            &self.model.places,
            step,
            rate,
            schedule.decay(progress),
            gradients,
            factor as f32,
            Arc::<Vec<f32>>::make_mut(&mut self.model.values),
        );
        self.steps = step;
        Ok(StepStats { step, loss, extra_loss, grad_norm, tokens, rate })
    }

    /// The gradients of the mean loss over all batches, without a step: by parameter, in the order
    /// of [`Model::named_parameters`], and the mean loss. For tests.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn loss_and_gradients(&mut self, batches: &[Batch]) -> Result<(f64, Vec<Vec<f32>>)> {
        let sums = self.gradients(batches, None)?;
        let all = &self.workers[0].gradients;
        let parameters = self.model.places.parameters.iter();
        let gradients = parameters.map(|p| all[p.range.clone()].to_vec()).collect();
        Ok((sums.nats / sums.counted as f64, gradients))
    }

    /// Sum of the negative log-probabilities of the counted predictions, nats, and their number.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch that does not fit the model.
    pub fn eval(&mut self, batch: &Batch) -> Result<(f64, usize)> {
        batch.check(self.model.config.vocab_size)?;
        let windows = pieces(batch);
        let sums = self.share_out(&windows, |worker, weights, model, windows| {
            worker.measure(weights, &model.places, windows)
        })?;
        Ok((sums.nats, sums.counted))
    }

    /// The logits of all windows of a batch, `(rows · len, vocab)`: for tests, on one thread.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch that does not fit the model.
    pub fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let (places, vocab) = (self.model.places.clone(), self.model.config.vocab_size);
        batch.check(vocab)?;
        self.quantize()?;
        let weights = self.weights.as_ref().expect("just made");
        let mut logits = vec![0.0; batch.rows * batch.len * vocab];
        let mut rest = &mut logits[..];
        for windows in pieces(batch) {
            let shown = self.workers[0].show(weights, &places, windows, None)?;
            let n = windows.rows * windows.len;
            let (these, others) = rest.split_at_mut(n * vocab);
            let (values, config) = (&self.model.values, &self.model.config);
            piece_logits(&shown.hidden, values, &places, config, 0, n, these);
            rest = others;
        }
        Ok(logits)
    }

    /// The model as it is now.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The options.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// What a resumed run needs beside the model and [`Trainer::steps`]: first and second moments of
    /// every parameter.
    pub fn state(&self) -> impl Iterator<Item = (&Parameter, &[f32], &[f32])> {
        self.model.places.parameters.iter().map(|p| {
            (p, &self.moments.first[p.range.clone()], &self.moments.second[p.range.clone()])
        })
    }

    /// Continues a run: `moments(name)` gives what [`Trainer::state`] gave, by parameter name.
    ///
    /// # Errors
    /// [`Error::Tensor`] for moments that are missing or misshapen.
    pub fn load_state(
        &mut self,
        steps: u64,
        moments: impl Fn(&str) -> Option<(Vec<f32>, Vec<f32>)>,
    ) -> Result<()> {
        let mut loaded = Moments::new(self.model.places.len);
        for parameter in &self.model.places.parameters {
            let (name, len) = (&parameter.name, parameter.range.len());
            let expected = || format!("two moments of {len} numbers");
            let (first, second) =
                moments(name).ok_or_else(|| Error::tensor(name, expected(), "none"))?;
            if first.len() != len || second.len() != len {
                let got = format!("{} and {}", first.len(), second.len());
                return Err(Error::tensor(name, expected(), got));
            }
            loaded.first[parameter.range.clone()].copy_from_slice(&first);
            loaded.second[parameter.range.clone()].copy_from_slice(&second);
        }
        (self.moments, self.steps) = (loaded, steps);
        Ok(())
    }

    fn quantize(&mut self) -> Result<()> {
        if self.weights.is_none() {
            self.weights = Some(Weights::new(&self.model, &mut self.backend)?);
        }
        Ok(())
    }

    /// Sums of losses over all batches; the gradients of their mean are in the first worker.
    fn gradients(&mut self, batches: &[Batch], extra: Option<&dyn ExtraLoss>) -> Result<Sums> {
        for batch in batches {
            batch.check(self.model.config.vocab_size)?;
        }
        if let Some(extra) = extra {
            extra.suits(&self.model.config)?;
        }
        let counted: usize = batches.iter().map(Batch::counted).sum();
        if counted == 0 {
            return Err(Error::Data("no prediction of the step counts".into()));
        }
        for worker in &mut self.workers {
            worker.gradients.clear();
            worker.gradients.resize(self.model.places.len, 0.0);
        }
        let all: usize = batches.iter().map(|batch| batch.rows * batch.len).sum();
        let goal = Goal { scale: 1.0 / counted as f32, scale_of_all: 1.0 / all as f32, extra };
        let windows: Vec<_> = batches.iter().flat_map(pieces).collect();
        let sums = self.share_out(&windows, |worker, weights, model, windows| {
            worker.learn(weights, &model.places, windows, goal)
        })?;
        let (first, others) = self.workers.split_first_mut().expect("at least one");
        for other in others {
            vector::add(&mut first.gradients, &other.gradients);
        }
        Ok(sums)
    }

    /// Runs `job` on all windows; thread `i` of `t` takes every `t`-th from the `i`-th on.
    fn share_out(
        &mut self,
        windows: &[Windows<'_>],
        job: impl Fn(&mut Worker, &Weights, &Model, Windows<'_>) -> Result<Sums> + Sync,
    ) -> Result<Sums> {
        self.quantize()?;
        let weights = self.weights.as_ref().expect("just made");
        let (model, threads) = (&self.model, self.workers.len());
        let run = |index: usize, worker: &mut Worker| -> Result<Sums> {
            let mut sums = Sums::default();
            for &windows in windows.iter().skip(index).step_by(threads) {
                let more = job(worker, weights, model, windows)?;
                sums.nats += more.nats;
                sums.extra += more.extra;
                sums.counted += more.counted;
            }
            Ok(sums)
        };
        let (first, others) = self.workers.split_first_mut().expect("at least one");
        let parts: Vec<Result<Sums>> = std::thread::scope(|scope| {
            let run = &run;
            let others: Vec<_> = others
                .iter_mut()
                .enumerate()
                .map(|(i, worker)| scope.spawn(move || run(i + 1, worker)))
                .collect();
            let mut parts = vec![run(0, first)];
            for other in others {
                parts.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            parts
        });
        let mut total = Sums::default();
        for part in parts {
            let part = part?;
            total.nats += part.nats;
            total.extra += part.extra;
            total.counted += part.counted;
        }
        Ok(total)
    }
}

/// The windows of a batch, in pieces that a thread takes at a time.
fn pieces(batch: &Batch) -> Vec<Windows<'_>> {
    let (rows_each, width) = ((PIECE_TOKENS / batch.len).max(1), batch.len + 1);
    (0..batch.rows)
        .step_by(rows_each)
        .map(|first_row| {
            let rows = rows_each.min(batch.rows - first_row);
            let mask = batch.loss_mask.as_deref().unwrap_or_default();
            let part = first_row * batch.len..(first_row + rows) * batch.len;
            Windows {
                tokens: &batch.tokens[first_row * width..(first_row + rows) * width],
                mask: if mask.is_empty() { mask } else { &mask[part] },
                rows,
                len: batch.len,
            }
        })
        .collect()
}
