//! A run from its recipe to its finished model: prepare, step, look, save, export.
//!
//! ```text
//! OUT/recipe.toml          what is run, complete
//! OUT/text/                the tokenizer and what else the model's text needs
//! OUT/tokens/              the corpora, tokenized
//! OUT/checkpoints/         the newest states, to go on from
//! OUT/log.csv, log.jsonl   every step; measurements and samples
//! OUT/loss.svg             the picture of it
//! OUT/model/, OUT/model-*.gguf, OUT/README.md   the result and its card
//! ```
//!
//! Prints nothing: a listener hears of everything and may stop the run after any step, which saves it.

mod card;
mod log;
mod made_of;
mod plot;
mod prepare;
mod probe;

use std::path::{Path, PathBuf};
use std::time::Instant;

use bitnet_quant::convert::NewFile;
use serde::Serialize;

use crate::batch::Batch;
use crate::checkpoint::{self, Position};
use crate::data::Mixture;
use crate::distill::ExtraLoss;
use crate::error::{Error, Result};
use crate::export;
use crate::recipe::{Form, Length, Recipe};
use crate::teacher::Teacher;
use crate::tokenizer::TrainedTokenizer;
use crate::trainer::Trainer;
use log::Log;
use probe::Probe;
pub use probe::{Measured, Sampled};

/// Steps between two times that log files are brought to the disk.
const FLUSH_EVERY: u64 = 20;
/// Longest text read for evaluation.
pub(crate) const LONGEST_EVAL: u64 = 64 << 20;

/// Where a run is and whether it goes on there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The run's folder.
    pub folder: PathBuf,
    /// Go on from the newest checkpoint; without this the folder must not hold a run.
    pub resume: bool,
}

/// What a listener hears.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A tokenizer is trained: bytes of text read. Several times a second.
    TrainingTokenizer(u64),
    /// A tokenizer was trained.
    TrainedTokenizer(&'a TrainedTokenizer),
    /// A corpus is tokenized.
    Tokenizing {
        /// Its first file.
        name: &'a str,
        /// Bytes of text read.
        bytes: u64,
    },
    /// Everything is ready.
    Started(&'a Start),
    /// A step was done.
    Stepped(&'a Line),
    /// Held-out text is measured.
    Measuring {
        /// Windows that were measured.
        done: usize,
        /// Windows of the text.
        windows: usize,
    },
    /// Held-out text was measured.
    Measured(&'a Measured),
    /// The model continued a prompt.
    Sampled(&'a Sampled),
    /// A checkpoint was written.
    Saved(&'a Path),
    /// The finished model was written.
    Exported(&'a Path),
}

/// What begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    /// What the model is called.
    pub name: String,
    /// Numbers of the model, all together.
    pub parameters: usize,
    /// Those that become ternary.
    pub ternary: usize,
    /// Tokens of all corpora.
    pub corpus_tokens: u64,
    /// Windows of a step, and predictions of a window.
    pub step: (usize, usize),
    /// How long the run is.
    pub length: Length,
    /// Steps done before, where the run goes on.
    pub steps_done: u64,
}

/// A step, as it is logged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Line {
    /// Optimizer steps done.
    pub step: u64,
    /// Predictions trained on.
    pub tokens: u64,
    /// Seconds of training, over all sittings.
    pub seconds: f64,
    /// Mean loss of this step's predictions, nats.
    pub loss: f64,
    /// Mean loss of distillation.
    pub extra_loss: f64,
    /// Length of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Predictions a second, in this step.
    pub tokens_per_second: f64,
    /// The share of the run that is done.
    pub progress: f64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Whether the listener stopped it; it can go on.
    pub stopped: bool,
    /// Optimizer steps done.
    pub steps: u64,
    /// Predictions trained on.
    pub tokens: u64,
    /// Seconds of training, over all sittings.
    pub seconds: f64,
    /// How well the whole held-out text is predicted, if there is one and the run ended.
    pub measured: Option<Measured>,
    /// The finished model's files and folders.
    pub exported: Vec<PathBuf>,
}

/// Runs `recipe` at `place`. `hear` returns `false` to stop.
///
/// # Errors
/// Whatever is wrong with the recipe, its files or the data, before the first step; later a full disk,
/// or a loss that is no number any more; [`Error::Stopped`] where it was stopped before the first step.
pub fn run(
    recipe: &Recipe,
    place: &Place,
    hear: &mut dyn FnMut(Event<'_>) -> bool,
) -> Result<Report> {
    let mut run = Run::prepare(recipe, place, hear)?;
    let stopped = run.train(hear)?;
    let mut report = Report {
        stopped: false,
        steps: run.position.step,
        tokens: run.position.tokens,
        seconds: run.position.seconds,
        measured: None,
        exported: Vec::new(),
    };
    report.stopped = stopped || !run.finish(&mut report, hear)?;
    Ok(report)
}

/// A run that is ready.
struct Run {
    recipe: Recipe,
    folder: PathBuf,
    length: Length,
    mixture: Mixture,
    trainer: Trainer,
    position: Position,
    log: Log,
    eval_text: Option<String>,
    teacher: Option<Teacher>,
}

impl Run {
    /// Steps until the end; whether it was stopped.
    fn train(&mut self, hear: &mut dyn FnMut(Event<'_>) -> bool) -> Result<bool> {
        while self.progress(0) < 1.0 {
            let line = self.step()?;
            let last = self.progress(0) >= 1.0;
            let due = |every: u64| every > 0 && line.step.is_multiple_of(every);
            let measures = due(self.recipe.eval.every) && self.eval_text.is_some() && !last;
            let samples =
                due(self.recipe.samples.every) && !self.recipe.samples.prompts.is_empty() && !last;
            let mut measured = None;
            let mut go_on = hear(Event::Stepped(&line));
            if go_on && (measures || samples) {
                let probe = self.probe()?;
                if measures {
                    (measured, go_on) = self.measure(&probe, self.recipe.eval.bytes, hear)?;
                }
                if go_on && samples {
                    go_on = self.sample(&probe, hear)?.1;
                }
            }
            self.log.step(&line, measured.as_ref())?;
            if line.step.is_multiple_of(FLUSH_EVERY) || measured.is_some() {
                self.log.flush()?;
                self.plot()?;
            }
            if due(self.recipe.checkpoints.every) || last || !go_on {
                let path = self.save()?;
                hear(Event::Saved(&path));
            }
            if !go_on {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The share of the run that is done after `more` further predictions in one step.
    fn progress(&self, more: u64) -> f64 {
        let Position { step, tokens, seconds, .. } = self.position;
        let progress = match self.length {
            Length::Steps(steps) => (step + u64::from(more > 0)) as f64 / steps as f64,
            Length::Tokens(total) => (tokens + more) as f64 / total as f64,
            Length::Time(time) => seconds / time.as_secs_f64(),
        };
        progress.min(1.0)
    }

    fn step(&mut self) -> Result<Line> {
        let begun = Instant::now();
        let (progress, train) = (self.progress(0), &self.recipe.train);
        let batches: Vec<Batch> = (0..train.accumulate)
            .map(|_| self.mixture.next_batch(progress, train.rows))
            .collect::<Result<_>>()?;
        let counted: usize = batches.iter().map(Batch::counted).sum();
        let ahead = self.progress(counted as u64);
        let extra = self.teacher.as_ref().map(|teacher| teacher as &dyn ExtraLoss);
        let stats = self.trainer.step(&batches, ahead, extra)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.position.step = stats.step;
        self.position.tokens += stats.tokens as u64;
        self.position.seconds += seconds;
        Ok(Line {
            step: stats.step,
            tokens: self.position.tokens,
            seconds: self.position.seconds,
            loss: stats.loss,
            extra_loss: stats.extra_loss,
            grad_norm: stats.grad_norm,
            rate: stats.rate,
            tokens_per_second: stats.tokens as f64 / seconds.max(1e-9),
            progress: self.progress(0),
        })
    }

    fn probe(&self) -> Result<Probe> {
        let (threads, window) = (self.trainer.options().threads, self.recipe.train.window);
        let (model, text) = (self.trainer.model(), self.text_folder());
        Probe::new(model, &text, self.position.step, window, threads)
    }

    fn text_folder(&self) -> PathBuf {
        self.folder.join(prepare::TEXT)
    }

    /// Measures the first `bytes` of the held-out text, if there is one; what was found, and whether to
    /// go on.
    fn measure(
        &self,
        probe: &Probe,
        bytes: usize,
        hear: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<(Option<Measured>, bool)> {
        let Some(text) = &self.eval_text else { return Ok((None, true)) };
        let mut go_on = true;
        let text = beginning(text, bytes);
        let found = probe.measure(text, self.recipe.train.window, &mut |found| {
            let (done, windows) = (found.windows_done, found.windows);
            go_on = hear(Event::Measuring { done, windows });
            go_on
        })?;
        // What was broken off is no measure of the text.
        let found = go_on.then_some(found);
        go_on &= found.iter().all(|found| hear(Event::Measured(found)));
        Ok((found, go_on))
    }

    /// Continues every prompt; the samples, and whether to go on.
    fn sample(
        &mut self,
        probe: &Probe,
        hear: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<(Vec<Sampled>, bool)> {
        let mut found = Vec::new();
        for prompt in &self.recipe.samples.prompts {
            let sampled = probe.sample(prompt, &self.recipe.samples, self.recipe.seed)?;
            self.log.sample(&sampled)?;
            let go_on = hear(Event::Sampled(&sampled));
            found.push(sampled);
            if !go_on {
                return Ok((found, false));
            }
        }
        Ok((found, true))
    }

    fn save(&mut self) -> Result<PathBuf> {
        self.log.flush()?;
        self.plot()?;
        self.position.data = self.mixture.state().clone();
        let folder = self.folder.join(prepare::CHECKPOINTS);
        checkpoint::save(&folder, &self.trainer, &self.position, self.recipe.checkpoints.keep)
    }

    fn plot(&self) -> Result<()> {
        let name = prepare::name(&self.recipe, &self.folder);
        let eval = &self.recipe.eval;
        let text = eval.text.as_deref().and_then(Path::file_name).unwrap_or_default();
        let text = text.to_string_lossy();
        // The whole of a long text is read only at the end.
        let measured_on = match &self.eval_text {
            Some(all) if all.len() > eval.bytes => {
                format!("{text} (its first {} bytes; the last point: all)", eval.bytes)
            }
            _ => text.into_owned(),
        };
        match plot::svg(&name, &measured_on, &log::rows(&self.folder)?) {
            Some(picture) => write_file(&self.folder.join("loss.svg"), picture.as_bytes()),
            None => Ok(()),
        }
    }

    /// Measures, samples, and writes the model with its card; `false` if it was stopped before that.
    fn finish(
        &mut self,
        report: &mut Report,
        hear: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<bool> {
        let probe = self.probe()?;
        let (measured, go_on) = self.measure(&probe, usize::MAX, hear)?;
        if let Some(measured) = &measured {
            self.log.measured(measured)?;
        }
        report.measured = measured;
        let (samples, go_on) = match go_on {
            true => self.sample(&probe, hear)?,
            false => (Vec::new(), false),
        };
        drop(probe);
        self.log.flush()?;
        self.plot()?;
        if !go_on {
            return Ok(false);
        }
        let model = self.trainer.model();
        let name = prepare::name(&self.recipe, &self.folder);
        let checkpoint = export::checkpoint(model, &name, &self.text_folder())?;
        for form in self.recipe.targets()? {
            let path = self.folder.join(form.place());
            match form {
                Form::Masters => export::write_masters(model, &self.text_folder(), &path)?,
                Form::Packed(target) => {
                    export::write(&checkpoint, model.precision(), target, &path, true)?;
                }
            }
            report.exported.push(path);
        }
        let card = card::write(&card::Facts {
            name: &name,
            recipe: &self.recipe,
            model,
            position: &self.position,
            corpora: self.mixture.corpora(),
            used: &self.mixture.state().used,
            measured: report.measured.as_ref(),
            eval_text: self.eval_text.as_deref(),
            samples: &samples,
            has_plot: self.folder.join("loss.svg").exists(),
        });
        let mut folders = vec![self.folder.clone()];
        folders.extend(report.exported.iter().filter(|path| path.is_dir()).cloned());
        for folder in &folders {
            write_file(&folder.join("README.md"), card.as_bytes())?;
            let plot = self.folder.join("loss.svg");
            if *folder != self.folder && plot.exists() {
                let bytes =
                    std::fs::read(&plot).map_err(|error| Error::io(&plot, "read", error))?;
                write_file(&folder.join("loss.svg"), &bytes)?;
            }
        }
        for path in &report.exported {
            hear(Event::Exported(path));
        }
        Ok(true)
    }
}

/// The first `bytes` of a text, or a few less: no character is cut.
fn beginning(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Writes a file that appears whole or not at all.
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = NewFile::create(path, true)?;
    file.write(bytes)?;
    Ok(file.commit()?)
}
