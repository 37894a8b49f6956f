//! Everything before the first step: folder, tokenizer, tokens, model, and whether they fit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use bitnet_inference::source;
use bitnet_inference::tokenizer::Tokenizer;
use bitnet_quant::Checkpoint;
use bitnet_quant::config::ModelConfig;
use bitnet_quant::convert::{self, TEXT_FILES};
use bitnet_quant::text::TextAssets;

use super::log::Log;
use super::made_of;
use super::probe::Probe;
use super::{Event, LONGEST_EVAL, Place, Run, Start, beginning, write_file};
use crate::checkpoint::{self, Position};
use crate::data::{Corpus, Encoder, Mixture, Share, Stage, Tokens, Windows, open_text};
use crate::distill::ExtraLoss;
use crate::error::{Error, Result};
use crate::export;
use crate::model::{Model, ParameterKind};
use crate::recipe::{CorpusRecipe, Form, Recipe, SampleRecipe};
use crate::teacher::{self, Teacher};
use crate::tokenizer::{TokenizerOptions, train_tokenizer};
use crate::trainer::Trainer;

pub(super) const RECIPE: &str = "recipe.toml";
pub(super) const TEXT: &str = "text";
pub(super) const TOKENS: &str = "tokens";
pub(super) const CHECKPOINTS: &str = "checkpoints";

/// Time between two looks at the work of another thread.
const HEAR_EVERY: Duration = Duration::from_millis(100);
/// Most of the held-out text that is looked at before the first step, in bytes.
const REHEARSED_BYTES: usize = 64 << 10;
/// Characters of a prompt that an error repeats.
const QUOTED_CHARS: usize = 40;

type Hear<'a> = &'a mut dyn FnMut(Event<'_>) -> bool;

/// What the model is called.
pub(super) fn name(recipe: &Recipe, folder: &Path) -> String {
    let folder = || {
        let full = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        full.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned())
    };
    recipe.name.clone().unwrap_or_else(folder)
}

impl Run {
    /// Checks the recipe, makes what it needs, and brings the model to where the run begins.
    pub(super) fn prepare(recipe: &Recipe, place: &Place, hear: Hear<'_>) -> Result<Self> {
        recipe.check()?;
        let folder = &place.folder;
        let saved = checkpoint::newest(&folder.join(CHECKPOINTS))?;
        match (&saved, place.resume) {
            (Some(_), false) => {
                let expected = "a folder without a run, or to be told to resume";
                return Err(Error::input(folder.display().to_string(), expected, "a run"));
            }
            (None, true) => {
                let expected = "a run with a checkpoint to resume";
                return Err(Error::input(folder.display().to_string(), expected, "none"));
            }
            _ => {}
        }
        if saved.is_none() {
            recipe.check_new()?;
        }
        let from = recipe.from.as_deref().map(source::open).transpose()?;
        let teacher = match &recipe.distill {
            Some(distill) => {
                let opened = source::open(&distill.teacher)?;
                let model = teacher::open(&opened)?;
                Some((opened, model, distill))
            }
            None => None,
        };
        // Whose text and shape the model has, unless it is new.
        let origin = from.as_ref().or(teacher.as_ref().map(|(opened, ..)| opened));
        let read = |path| open_text(path, recipe.separator(), LONGEST_EVAL);
        let eval_text = recipe.eval.text.as_ref().map(read).transpose()?;
        text_folder(recipe, origin, &folder.join(TEXT), saved.is_some(), hear)?;
        let encoder = Encoder::new(&TextAssets::from_folder(folder.join(TEXT))?)?;
        let mut config = config(recipe, origin, &name(recipe, folder), &encoder)?;
        let precision = recipe.precision();
        let student = match (&from, &teacher) {
            (None, Some((_, teacher, distill))) => {
                Some(teacher::student(teacher, distill.sub_norms)?)
            }
            _ => None,
        };
        if let Some(student) = &student {
            config = ModelConfig { name: config.name, ..student.config().clone() };
        }
        let teacher = match teacher {
            Some((opened, model, distill)) => {
                same_tokens(encoder.tokenizer(), &opened)?;
                let teacher = Teacher::new(model, distill.options())?;
                teacher.suits(&config)?;
                Some(teacher)
            }
            None => None,
        };
        let mut mixture = mixture(recipe, &encoder, &folder.join(TOKENS), hear)?;
        for corpus in mixture.corpora() {
            let tokens = corpus.windows.tokens();
            if tokens.info().ids_below as usize > config.vocab_size {
                let expected = format!("tokens below the vocabulary's size {}", config.vocab_size);
                return Err(Error::input(tokens.name(), expected, tokens.info().ids_below - 1));
            }
        }
        let options = recipe.options();
        let identity = recipe.identity();
        let made_of = made_of::names(made_of::Parts {
            config: &config,
            precision,
            encoder: &encoder,
            separator: recipe.separator(),
            corpora: mixture.corpora(),
            teacher: teacher.as_ref().map(Teacher::model),
        });
        let (trainer, position) = match &saved {
            Some(saved) => {
                goes_on(recipe, saved, &identity, &made_of, &encoder)?;
                let (trainer, position) = checkpoint::load(saved, config, precision, options)?;
                mixture.restore(position.data.clone())?;
                (trainer, Position { made_of, ..position })
            }
            None => {
                let model = match (&from, student) {
                    (Some(from), _) => Model::from_checkpoint(from, precision)?,
                    (None, Some(student)) => student,
                    (None, None) => Model::new(config, precision, recipe.seed)?,
                };
                let data = mixture.state().clone();
                let (step, tokens, seconds) = (0, 0, 0.0);
                let position = Position { step, tokens, seconds, data, recipe: identity, made_of };
                (Trainer::new(model, options)?, position)
            }
        };
        rehearse(
            recipe,
            trainer.model(),
            &folder.join(TEXT),
            eval_text.as_deref(),
            options.threads,
        )?;
        write_file(&folder.join(RECIPE), recipe.to_toml()?.as_bytes())?;
        let log = Log::open(folder, position.step)?;
        let (recipe, folder) = (recipe.clone(), folder.clone());
        let length = recipe.length()?;
        let run =
            Self { recipe, folder, length, mixture, trainer, position, log, eval_text, teacher };
        match hear(Event::Started(&run.start())) {
            true => Ok(run),
            false => Err(Error::Stopped),
        }
    }

    fn start(&self) -> Start {
        let model = self.trainer.model();
        let ternary = |kind| matches!(kind, ParameterKind::Projection);
        let ternary = model.named_parameters().filter(|(parameter, _)| ternary(parameter.kind));
        let train = &self.recipe.train;
        let corpora = self.mixture.corpora().iter();
        Start {
            name: name(&self.recipe, &self.folder),
            parameters: model.parameter_count(),
            ternary: ternary.map(|(_, values)| values.len()).sum(),
            corpus_tokens: corpora.map(|corpus| corpus.windows.tokens().len() as u64).sum(),
            step: (train.rows * train.accumulate, train.window),
            length: self.length,
            steps_done: self.position.step,
        }
    }
}

/// Whether a run may go on from the checkpoint `saved`.
fn goes_on(
    recipe: &Recipe,
    saved: &Path,
    identity: &str,
    made_of: &BTreeMap<String, String>,
    encoder: &Encoder,
) -> Result<()> {
    let (what, was) = (saved.display().to_string(), checkpoint::position(saved)?);
    if was.recipe != identity {
        return Err(Error::input(what, format!("a run with {identity}"), was.recipe));
    }
    made_of::compare(&what, &was.made_of, made_of)?;
    // The run has its own copy, so that another one would be asked for in vain.
    if let Some(tokenizer) = &recipe.tokenizer
        && !was.made_of.is_empty()
    {
        let asked = Encoder::new(&TextAssets::from_folder(tokenizer)?)?;
        if asked.fingerprint() != encoder.fingerprint() {
            let expected = "the one the run began with";
            return Err(Error::setting("tokenizer", expected, tokenizer.display()));
        }
    }
    Ok(())
}

/// Does once, and in little, what is done with the model while it learns and when it has learnt, so
/// that what cannot be done is known before the first step.
fn rehearse(
    recipe: &Recipe,
    model: &Model,
    text: &Path,
    eval_text: Option<&str>,
    threads: usize,
) -> Result<()> {
    let checkpoint = export::checkpoint(model, "training", text)?;
    for form in recipe.targets()? {
        if let Form::Packed(target) = form {
            export::check(&checkpoint, model.precision(), target)?;
        }
    }
    let prompts = &recipe.samples.prompts;
    if eval_text.is_none() && prompts.is_empty() {
        return Ok(());
    }
    let probe = Probe::open(&checkpoint, 0, recipe.train.window, threads)?;
    drop(checkpoint);
    if let Some(eval_text) = eval_text {
        let bytes = match recipe.eval.every {
            0 => REHEARSED_BYTES,
            _ => recipe.eval.bytes.min(REHEARSED_BYTES),
        };
        let part = beginning(eval_text, bytes);
        probe.measure(part, recipe.train.window, &mut |_| false).map_err(|error| {
            let what = recipe.eval.text.as_deref().unwrap_or(Path::new("eval.text"));
            let got = format!("an error in its first {} bytes: {error}", part.len());
            Error::input(what.display().to_string(), "text to measure on", got)
        })?;
    }
    for prompt in prompts {
        let one = SampleRecipe { tokens: 1, ..recipe.samples.clone() };
        probe.sample(prompt, &one, recipe.seed).map_err(|error| {
            let expected = "texts that the model can continue";
            Error::setting("samples.prompts", expected, format!("{}: {error}", quoted(prompt)))
        })?;
    }
    Ok(())
}

/// The beginning of a text that may be long, in quotation marks.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(QUOTED_CHARS).collect();
    let more = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{more}")
}

/// Fills the folder with the tokenizer: the one asked for, the model's, or a new one. It appears whole
/// or not at all, in place of what a run that did not come to its first checkpoint may have left.
fn text_folder(
    recipe: &Recipe,
    from: Option<&Checkpoint>,
    folder: &Path,
    goes_on: bool,
    hear: Hear<'_>,
) -> Result<()> {
    if goes_on && folder.join("tokenizer.json").exists() {
        return Ok(());
    }
    let part = folder.with_file_name(format!(".{TEXT}.part"));
    let remove = |folder: &Path| match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(folder, "remove", error))
        }
        _ => Ok(()),
    };
    remove(&part)?;
    let made = match (&recipe.tokenizer, from) {
        (Some(source), _) => copy_text(source, &part),
        (None, Some(from)) => convert::write_text(from, &part, true).map_err(Error::from),
        (None, None) => new_tokenizer(recipe, &part, hear),
    };
    if let Err(error) = made {
        // The error that is told is the one that came first.
        let _ = remove(&part);
        return Err(error);
    }
    remove(folder)?;
    std::fs::rename(&part, folder).map_err(|error| Error::io(folder, "create", error))
}

/// Trains a tokenizer on the texts of the run. The work is another thread's; the listener stays on
/// this one.
fn new_tokenizer(recipe: &Recipe, folder: &Path, hear: Hear<'_>) -> Result<()> {
    let options = TokenizerOptions {
        end_of_text: recipe.separator().to_owned(),
        ..TokenizerOptions::new(recipe.model.vocab_size()?)
    };
    let files = recipe.training_files();
    let (read, stopped) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut progress = |bytes| {
        read.store(bytes, Relaxed);
        !stopped.load(Relaxed)
    };
    let trained = std::thread::scope(|scope| {
        let (ended, end) = std::sync::mpsc::channel::<()>();
        let work = scope.spawn(move || {
            let trained = train_tokenizer(&files, &options, folder, true, &mut progress);
            drop(ended);
            trained
        });
        loop {
            if !hear(Event::TrainingTokenizer(read.load(Relaxed))) {
                stopped.store(true, Relaxed);
            }
            if end.recv_timeout(HEAR_EVERY) != Err(RecvTimeoutError::Timeout) {
                break;
            }
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    match !stopped.load(Relaxed) && hear(Event::TrainedTokenizer(&trained)) {
        true => Ok(()),
        false => Err(Error::Stopped),
    }
}

fn copy_text(source: &Path, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, "create", error))?;
    for name in TEXT_FILES {
        let path = source.join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, "read", error))?;
            write_file(&folder.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// Whether every token is the same piece of text to the teacher; its distribution would be one of other
/// tokens.
fn same_tokens(ours: &Tokenizer, teacher: &Checkpoint) -> Result<()> {
    if teacher.text().tokenizer.is_none() {
        return Ok(()); // a model without one is taken at its word
    }
    let theirs = Tokenizer::from_assets(teacher.text())
        .map_err(|error| Error::input("the teacher's tokenizer", "one that can be read", error))?;
    let count = ours.vocab_size().max(theirs.vocab_size()) as u32;
    let token = |tokenizer: &Tokenizer, id| {
        format!("token {id} is {:?}", String::from_utf8_lossy(tokenizer.token_bytes(id)))
    };
    match (0..count).find(|&id| ours.token_bytes(id) != theirs.token_bytes(id)) {
        Some(id) => {
            let expected = format!("the teacher's, in which {}", token(&theirs, id));
            Err(Error::setting("tokenizer", expected, format!("one in which {}", token(ours, id))))
        }
        None => Ok(()),
    }
}

/// The shape of the model: new, or that of the one to go on from.
fn config(
    recipe: &Recipe,
    from: Option<&Checkpoint>,
    name: &str,
    encoder: &Encoder,
) -> Result<ModelConfig> {
    let (tokens, window) = (encoder.tokenizer().vocab_size(), recipe.train.window);
    let Some(from) = from else { return recipe.model.config(name, tokens, window) };
    let config = from.config().clone();
    if tokens > config.vocab_size {
        let expected = format!("a tokenizer of at most {} tokens, as the model", config.vocab_size);
        return Err(Error::setting("tokenizer", expected, tokens));
    }
    if window > config.max_position_embeddings {
        let expected = format!("at most the model's context, {}", config.max_position_embeddings);
        return Err(Error::setting("train.window", expected, window));
    }
    Ok(ModelConfig { name: name.to_owned(), ..config })
}

/// Opens or makes the tokens of every corpus.
fn mixture(recipe: &Recipe, encoder: &Encoder, folder: &Path, hear: Hear<'_>) -> Result<Mixture> {
    let mut known: Vec<&[PathBuf]> = Vec::new();
    let mut corpora = Vec::new();
    let mut stages = Vec::new();
    for stage in &recipe.stage {
        let mut shares = Vec::new();
        for CorpusRecipe { files, weight } in &stage.mix {
            let corpus = match known.iter().position(|other| *other == files.as_slice()) {
                Some(corpus) => corpus,
                None => {
                    let windows = windows(recipe, files, known.len(), encoder, folder, hear)?;
                    known.push(files);
                    corpora.push(Corpus { windows });
                    known.len() - 1
                }
            };
            shares.push(Share { corpus, weight: *weight });
        }
        stages.push(Stage { until: stage.until, shares });
    }
    Mixture::new(corpora, stages)
}

fn windows(
    recipe: &Recipe,
    files: &[PathBuf],
    index: usize,
    encoder: &Encoder,
    folder: &Path,
    hear: Hear<'_>,
) -> Result<Windows> {
    let name = files.first().and_then(|file| file.file_name()).unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    let separator = Some(recipe.separator());
    let tokens = Tokens::open_or_build(files, separator, encoder, folder, &mut |bytes| {
        hear(Event::Tokenizing { name: &name, bytes })
    })?;
    let seed = recipe.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64);
    if tokens.info().counted == 0 {
        let expected = "something to predict: text, or answers of an assistant";
        return Err(Error::input(name, expected, "none"));
    }
    Windows::new(tokens, recipe.train.window, seed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_quant::config::RopeScaling;

    use crate::model::Precision;

    #[test]
    fn frequencies_that_no_settings_describe_are_found_out_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let origin = source::open(Path::new("builtin")).unwrap();
        convert::write_text(&origin, folder.path(), true).unwrap();
        let recipe = Recipe::default();
        let mut config = origin.config().clone();
        let check = |config: &ModelConfig| {
            let model = Model::new(config.clone(), Precision::Ternary, 0).unwrap();
            rehearse(&recipe, &model, folder.path(), None, 1)
        };
        check(&config).unwrap();
        // As a GGUF file may have them.
        config.rope_scaling = RopeScaling::Factors([7.0, 1.0].repeat(config.head_dim / 4));
        let error = check(&config).unwrap_err().to_string();
        assert!(error.contains("config.json has no name for its divisors"), "{error}");
    }
}
