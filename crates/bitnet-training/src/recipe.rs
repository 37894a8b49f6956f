//! What a run is: its data, its model, how long and how it learns. A TOML file says it all.
//!
//! Everything is checked before the first step, and what is wrong is named as it is written in the
//! file. The file of a run's folder is the recipe in force, complete, so that a run can be repeated.

mod model;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bitnet_quant::convert::Target;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Precision;
use crate::optimizer::AdamW;
use crate::schedule::{Schedule, Shape};
use crate::teacher::DistillOptions;
use crate::tokenizer::END_OF_TEXT;
use crate::trainer::TrainOptions;
pub use model::{Family, ModelRecipe, PRESETS, Preset};

/// A run from beginning to end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// What the model is called on its card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Weights, order of the data and samples follow from it.
    pub seed: u64,
    /// A model to go on from instead of random weights: ternary, or float masters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// A folder with a tokenizer. With `from`, that model's own unless given. Without both, one is
    /// trained on the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// A line of plain text that divides documents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// The licence of the model's weights, for its card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// Sentences for the card: what the data is, what the model is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Forms of the finished model: hf, i2_s, tq1_0, tq2_0, …
    pub export: Vec<String>,
    /// The model.
    pub model: ModelRecipe,
    /// How it learns.
    pub train: TrainRecipe,
    /// A teacher, and how much it counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillRecipe>,
    /// How it is measured.
    pub eval: EvalRecipe,
    /// What it is asked to continue while it learns.
    pub samples: SampleRecipe,
    /// How it is saved.
    pub checkpoints: CheckpointRecipe,
    /// The data: stages one after another.
    pub stage: Vec<StageRecipe>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            name: None,
            seed: 0,
            from: None,
            tokenizer: None,
            separator: None,
            license: None,
            description: None,
            export: vec!["hf".into()],
            model: ModelRecipe::default(),
            train: TrainRecipe::default(),
            distill: None,
            eval: EvalRecipe::default(),
            samples: SampleRecipe::default(),
            checkpoints: CheckpointRecipe::default(),
            stage: Vec::new(),
        }
    }
}

/// A part of the run with one mixture of corpora.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageRecipe {
    /// Where it ends, as a share of the run; the last stage ends at 1.
    #[serde(default = "one")]
    pub until: f64,
    /// What it is mixed of.
    pub mix: Vec<CorpusRecipe>,
}

/// Files that are read as one corpus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusRecipe {
    /// `.txt`, `.md`, `.jsonl`, or these with `.xz`.
    pub files: Vec<PathBuf>,
    /// Its share of the stage, beside those of the others.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// How the model learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainRecipe {
    /// How long, in optimizer steps. Exactly one of `steps`, `tokens` and `minutes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// How long, in predictions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// How long, in minutes of training over all sittings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minutes: Option<f64>,
    /// Predictions of a window.
    pub window: usize,
    /// Windows computed together.
    pub rows: usize,
    /// Batches of `rows` windows that make a step.
    pub accumulate: usize,
    /// Highest learning rate.
    pub rate: f64,
    /// `two-stage`, `trapezoid` or `cosine`.
    pub schedule: ScheduleName,
    /// Where the second stage begins, or for `trapezoid` the fall, as a share of the run.
    pub switch: f64,
    /// Highest rate of the second stage, as a share of `rate`.
    pub second_rate: f64,
    /// Lowest rate at the end, as a share of `rate`.
    pub floor: f64,
    /// The share of the run in which the rate grows.
    pub warmup: f64,
    /// Weight decay, in the first stage.
    pub weight_decay: f64,
    /// Decay of the moments of AdamW.
    pub betas: [f64; 2],
    /// Added to the root of AdamW's second moment.
    pub epsilon: f64,
    /// Longest gradient; 0: any.
    pub clip: f64,
    /// CPU threads; 0: one for each physical core. The last bits of a run depend on it.
    pub threads: usize,
    /// Train float weights: a teacher. Its projections stay float.
    pub float: bool,
}

impl Default for TrainRecipe {
    fn default() -> Self {
        Self {
            steps: None,
            tokens: None,
            minutes: None,
            window: 256,
            rows: 8,
            accumulate: 1,
            rate: 3e-3,
            schedule: ScheduleName::TwoStage,
            switch: 0.5,
            second_rate: 0.6,
            floor: 0.02,
            warmup: 0.02,
            weight_decay: 0.1,
            betas: [0.9, 0.95],
            epsilon: 1e-8,
            clip: 1.0,
            threads: 0,
            float: false,
        }
    }
}

/// A teacher, and how much it counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillRecipe {
    /// A float model of the family `llama`. Unless `from` names another, the student begins as its
    /// copy.
    pub teacher: PathBuf,
    /// Put norms before the output and down projections of the student: the family `bitnet`.
    #[serde(default = "yes")]
    pub sub_norms: bool,
    /// The share of the next token in the loss.
    #[serde(default = "one_f32")]
    pub token: f32,
    /// The share of the teacher's distribution.
    #[serde(default = "one_f32")]
    pub logits: f32,
    /// What divides logits before they are compared.
    #[serde(default = "two_f32")]
    pub temperature: f32,
    /// The share of the relations of queries, keys and values.
    #[serde(default = "one_f32")]
    pub attention: f32,
    /// The layer whose relations are compared; the last but one unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
}

impl DistillRecipe {
    /// A teacher with the usual shares.
    pub fn new(teacher: PathBuf) -> Self {
        Self {
            teacher,
            sub_norms: true,
            token: 1.0,
            logits: 1.0,
            temperature: 2.0,
            attention: 1.0,
            layer: None,
        }
    }

    /// The shares.
    pub fn options(&self) -> DistillOptions {
        DistillOptions {
            token: self.token,
            logits: self.logits,
            temperature: self.temperature,
            attention: self.attention,
            layer: self.layer,
        }
    }
}

fn yes() -> bool {
    true
}

fn one_f32() -> f32 {
    1.0
}

fn two_f32() -> f32 {
    2.0
}

/// Names of [`Shape`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleName {
    /// [`Shape::TwoStage`]
    TwoStage,
    /// [`Shape::Trapezoid`]
    Trapezoid,
    /// [`Shape::Cosine`]
    Cosine,
}

/// How the model is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalRecipe {
    /// A text that is in none of the corpora.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<PathBuf>,
    /// Steps from one measurement to the next; 0: only at the end.
    pub every: u64,
    /// Bytes of the text that are read while the model learns. At the end all of it is.
    pub bytes: usize,
}

impl Default for EvalRecipe {
    fn default() -> Self {
        Self { text: None, every: 250, bytes: 64 << 10 }
    }
}

/// What the model is asked to continue while it learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleRecipe {
    /// Beginnings of texts.
    pub prompts: Vec<String>,
    /// Steps from one time to the next; 0: only at the end.
    pub every: u64,
    /// Tokens of a continuation.
    pub tokens: u32,
    /// 0: always the likeliest token.
    pub temperature: f32,
}

impl Default for SampleRecipe {
    fn default() -> Self {
        Self { prompts: Vec::new(), every: 500, tokens: 80, temperature: 0.7 }
    }
}

/// How the run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointRecipe {
    /// Steps from one checkpoint to the next; 0: only at the end and when stopped.
    pub every: u64,
    /// How many are kept.
    pub keep: usize,
}

impl Default for CheckpointRecipe {
    fn default() -> Self {
        Self { every: 500, keep: 2 }
    }
}

/// The name of [`Form::Masters`].
const MASTERS: &str = "masters";

/// A form of a finished model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A Hugging Face folder with float masters, quantized at load: to train on from.
    Masters,
    /// What `bitnet convert` can write.
    Packed(Target),
}

impl Form {
    /// Its name in the run's folder.
    pub fn place(self) -> String {
        match self {
            Self::Masters => MASTERS.into(),
            Self::Packed(Target::Folder(_)) => "model".into(),
            Self::Packed(target) => format!("model-{target}.gguf"),
        }
    }
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Predictions.
    Tokens(u64),
    /// Time of training.
    Time(Duration),
}

impl Recipe {
    /// Reads a TOML file. Paths in it are relative to its folder.
    ///
    /// # Errors
    /// A file that cannot be read or says what is not known here.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, "read", error))?;
        let mut recipe: Self = toml::from_str(&text).map_err(|error| {
            let message = error.to_string();
            Error::input(path.display().to_string(), "a recipe", message.trim_end())
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        recipe.each_path(|path| *path = folder.join(&*path));
        Ok(recipe)
    }

    /// The recipe as a TOML file, with absolute paths.
    ///
    /// # Errors
    /// A path that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        let mut recipe = self.clone();
        recipe.each_path(|path| {
            if let Ok(absolute) = std::path::absolute(&*path) {
                *path = absolute;
            }
        });
        toml::to_string(&recipe).map_err(|error| Error::input("recipe", "text", error))
    }

    fn each_path(&mut self, mut change: impl FnMut(&mut PathBuf)) {
        self.from.iter_mut().filter(|from| from.as_os_str() != "builtin").for_each(&mut change);
        self.tokenizer.iter_mut().chain(&mut self.eval.text).for_each(&mut change);
        self.distill.iter_mut().map(|distill| &mut distill.teacher).for_each(&mut change);
        let files = self.stage.iter_mut().flat_map(|stage| &mut stage.mix);
        files.flat_map(|corpus| &mut corpus.files).for_each(change);
    }

    /// Checks every number, and that every file is there.
    ///
    /// # Errors
    /// The first thing that is wrong, by its name in the file.
    pub fn check(&self) -> Result<()> {
        let TrainRecipe { window, rows, accumulate, .. } = self.train;
        self.length()?;
        range("train.window", window as u64, 2, 1 << 20)?;
        range("train.rows", rows as u64, 1, 1 << 12)?;
        range("train.accumulate", accumulate as u64, 1, 1 << 16)?;
        range("train.threads", self.train.threads as u64, 0, 1024)?;
        self.schedule().check()?;
        for beta in self.train.betas {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::setting("train.betas", "0 to below 1", beta));
            }
        }
        if !(self.train.clip >= 0.0 && self.train.clip.is_finite()) {
            return Err(Error::setting("train.clip", "0 or more", self.train.clip));
        }
        if !(self.train.epsilon > 0.0 && self.train.epsilon <= 1.0) {
            return Err(Error::setting("train.epsilon", "above 0, at most 1", self.train.epsilon));
        }
        range("checkpoints.keep", self.checkpoints.keep as u64, 1, 1 << 20)?;
        if !(0.0..=10.0).contains(&self.samples.temperature) {
            return Err(Error::setting("samples.temperature", "0 to 10", self.samples.temperature));
        }
        range("samples.tokens", self.samples.tokens.into(), 1, 1 << 16)?;
        if self.eval.text.is_some() {
            range("eval.bytes", self.eval.bytes as u64, 1, u64::MAX)?;
        }
        self.check_forms()?;
        if self.train.float && self.distill.is_some() {
            let expected = "false, as the student of a distillation is ternary";
            return Err(Error::setting("train.float", expected, true));
        }
        if self.stage.is_empty() {
            return Err(Error::setting("stage", "at least one, with data", "none"));
        }
        for path in self.files() {
            std::fs::File::open(path).map_err(|error| Error::io(path, "open", error))?;
        }
        if let Some(tokenizer) = &self.tokenizer {
            let file = tokenizer.join("tokenizer.json");
            std::fs::File::open(&file).map_err(|error| Error::io(&file, "open", error))?;
        }
        Ok(())
    }

    /// Checks what only a run that begins can have wrong: a shape where a model brings its own.
    ///
    /// # Errors
    /// The first number of a shape that would have no effect.
    pub fn check_new(&self) -> Result<()> {
        let origin = match (&self.from, &self.distill) {
            (Some(_), _) => "a model to go on from",
            (None, Some(_)) => "a teacher",
            (None, None) => return Ok(()),
        };
        let shape = toml::Table::try_from(&self.model)
            .map_err(|error| Error::input("model", "what TOML can hold", error))?;
        match shape.iter().next() {
            Some((name, value)) => {
                let expected = format!("nothing beside {origin}, whose shape the new model has");
                Err(Error::setting(format!("model.{name}"), expected, value))
            }
            None => Ok(()),
        }
    }

    /// Checks that every form can be made of such a model, and that none takes another's place.
    fn check_forms(&self) -> Result<()> {
        let mut places: Vec<(String, &String)> = Vec::new();
        for (form, name) in self.targets()?.into_iter().zip(&self.export) {
            if self.train.float && matches!(form, Form::Packed(Target::Gguf(_))) {
                let expected = "hf or masters for float weights, which no ternary packing holds";
                return Err(Error::setting("export", expected, name));
            }
            let place = form.place();
            if let Some((_, other)) = places.iter().find(|(known, _)| *known == place) {
                let got = format!("{other} and {name}, both {place}");
                return Err(Error::setting("export", "forms with places of their own", got));
            }
            places.push((place, name));
        }
        Ok(())
    }

    /// Every file of text, that for evaluation too.
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let corpora = self.stage.iter().flat_map(|stage| &stage.mix);
        corpora.flat_map(|corpus| &corpus.files).chain(&self.eval.text)
    }

    /// Every file of training text, once, in order.
    pub fn training_files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = Vec::new();
        for corpus in self.stage.iter().flat_map(|stage| &stage.mix) {
            for file in &corpus.files {
                if !files.contains(file) {
                    files.push(file.clone());
                }
            }
        }
        files
    }

    /// How long the run is.
    ///
    /// # Errors
    /// None of the three ways to say it, or several.
    pub fn length(&self) -> Result<Length> {
        let TrainRecipe { steps, tokens, minutes, .. } = self.train;
        let expected = "one of steps, tokens and minutes, above 0";
        match (steps, tokens, minutes) {
            (Some(steps), None, None) if steps > 0 => Ok(Length::Steps(steps)),
            (None, Some(tokens), None) if tokens > 0 => Ok(Length::Tokens(tokens)),
            (None, None, Some(minutes)) if minutes > 0.0 && minutes < 1e7 => {
                Ok(Length::Time(Duration::from_secs_f64(minutes * 60.0)))
            }
            (None, None, None) => Err(Error::setting("length of the run", expected, "none")),
            _ => Err(Error::setting(
                "length of the run",
                expected,
                format!("steps {steps:?}, tokens {tokens:?}, minutes {minutes:?}"),
            )),
        }
    }

    fn schedule(&self) -> Schedule {
        let train = &self.train;
        let shape = match train.schedule {
            ScheduleName::TwoStage => {
                Shape::TwoStage { switch: train.switch, second_peak: train.second_rate }
            }
            ScheduleName::Trapezoid => Shape::Trapezoid { decay: 1.0 - train.switch },
            ScheduleName::Cosine => Shape::Cosine,
        };
        Schedule {
            shape,
            peak: train.rate,
            floor: train.floor,
            warmup: train.warmup,
            weight_decay: train.weight_decay,
        }
    }

    /// What the trainer needs to know.
    pub fn options(&self) -> TrainOptions {
        let train = &self.train;
        let all = || bitnet_core::threads::default_threads();
        TrainOptions {
            schedule: self.schedule(),
            optimizer: AdamW {
                beta1: train.betas[0],
                beta2: train.betas[1],
                epsilon: train.epsilon,
            },
            clip: train.clip,
            threads: if train.threads == 0 { all() } else { train.threads },
        }
    }

    /// Forms of the finished model.
    ///
    /// # Errors
    /// A form that is not known.
    pub fn targets(&self) -> Result<Vec<Form>> {
        let form = |name: &String| match name.as_str() {
            MASTERS => Ok(Form::Masters),
            name => Ok(Form::Packed(name.parse::<Target>()?)),
        };
        self.export.iter().map(form).collect()
    }

    /// How the model's projections compute.
    pub fn precision(&self) -> Precision {
        if self.train.float { Precision::Float } else { Precision::Ternary }
    }

    /// The line that divides documents.
    pub fn separator(&self) -> &str {
        self.separator.as_deref().unwrap_or(END_OF_TEXT)
    }

    /// What the losses of a run depend on, as text: a run that goes on must have the same.
    pub(crate) fn identity(&self) -> String {
        let Self { seed, train, .. } = self;
        let stages: Vec<String> = self
            .stage
            .iter()
            .map(|stage| {
                let name =
                    |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
                let corpus = |corpus: &CorpusRecipe| {
                    let names: Vec<_> = corpus.files.iter().filter_map(name).collect();
                    format!("{} × {}", corpus.weight, names.join("+"))
                };
                let mix: Vec<_> = stage.mix.iter().map(corpus).collect();
                format!("{} of {}", stage.until, mix.join(", "))
            })
            .collect();
        format!(
            "seed {seed}; {} × {} windows of {}; {}",
            train.accumulate,
            train.rows,
            train.window,
            stages.join("; ")
        )
    }
}

fn range(what: &str, value: u64, low: u64, high: u64) -> Result<()> {
    match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(Error::setting(what, format!("{low} to {high}"), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &str) -> (tempfile::TempDir, Result<Recipe>) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tales.txt"), "Once.").unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        let recipe = Recipe::read(&path);
        (folder, recipe)
    }

    const GOOD: &str = "seed = 3\nmodel.preset = '3m'\ntrain.steps = 10\n\
        [[stage]]\nmix = [{ files = ['tales.txt'] }]\n";

    #[test]
    fn a_recipe_survives_its_file() {
        let (folder, recipe) = write(GOOD);
        let recipe = recipe.unwrap();
        recipe.check().unwrap();
        assert_eq!(recipe.stage[0].mix[0].files, [folder.path().join("tales.txt")]);
        assert_eq!(recipe.length().unwrap(), Length::Steps(10));
        let path = folder.path().join("again.toml");
        std::fs::write(&path, recipe.to_toml().unwrap()).unwrap();
        assert_eq!(Recipe::read(&path).unwrap(), recipe);
    }

    #[test]
    fn what_is_wrong_is_named_as_it_is_written() {
        for (change, expected) in [
            (("train.steps", "train.stops"), "unknown field `stops`"),
            (("seed = 3", "seed = 'x'"), "line 1"),
            (("tales.txt", "gone.txt"), "gone.txt: cannot open"),
            (("steps = 10", "window = 9"), "length of the run: expected one of"),
            (("steps = 10", "steps = 10\ntrain.tokens = 5"), "length of the run"),
            (("steps = 10", "steps = 10\ntrain.window = 1"), "train.window: expected 2"),
            (("steps = 10", "steps = 10\ntrain.rate = -1.0"), "learning rate: expected"),
            (("steps = 10", "steps = 10\ntrain.betas = [0.9, 1.0]"), "train.betas"),
            (("steps = 10", "steps = 10\ntrain.schedule = 'steps'"), "unknown variant `steps`"),
            (("seed = 3", "export = ['gguf']"), "target gguf is not supported"),
            (("seed = 3", "tokenizer = 'nowhere'"), "tokenizer.json: cannot open"),
            (("seed = 3", "from = 'builtin'"), "model.preset: expected nothing beside a model to"),
            (
                ("model.preset = '3m'", "from = 'builtin'\nmodel.hidden_size = 64"),
                "model.hidden_size: expected nothing beside a model to go on from, whose",
            ),
            (
                ("seed = 3", "distill.teacher = 'there'"),
                "model.preset: expected nothing beside a te",
            ),
            (
                ("model.preset = '3m'", "distill.teacher = 'there'\ntrain.float = true"),
                "train.float: expected false",
            ),
            (
                ("seed = 3", "export = ['hf', 'i2_s']\ntrain.float = true"),
                "export: expected hf or masters for float weights, which no ternary packing holds, got i2_s",
            ),
            (("seed = 3", "export = ['hf', 'hf-divide']"), "got hf and hf-divide, both model"),
            (("seed = 3", "eval = { text = 'tales.txt', bytes = 0 }"), "eval.bytes: expected 1 to"),
            (("[[stage]]\nmix = [{ files = ['tales.txt'] }]", ""), "stage: expected at least one"),
        ] {
            let (_folder, recipe) = write(&GOOD.replace(change.0, change.1));
            let checked = recipe.and_then(|recipe| recipe.check().and(recipe.check_new()));
            let error = checked.expect_err(change.1).to_string();
            assert!(error.contains(expected), "{error:?} should say {expected:?}");
        }
    }
}
