//! Flags of a training run, and how they change a recipe. What is not given changes nothing.

use std::path::{Path, PathBuf};

use bitnet_training::recipe::{CorpusRecipe, Family, Recipe, ScheduleName, StageRecipe};
use clap::{Args, ValueEnum};

use crate::exit::Usage;

/// What is read.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArgs {
    /// Files of text: .txt, .md, .jsonl, and these with .xz; mixed by their lengths
    files: Vec<PathBuf>,
    /// A text in none of the files, to measure on
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// A line of a text file that divides documents [default: <|endoftext|>]
    #[arg(long, value_name = "TEXT")]
    separator: Option<String>,
    /// Folder with a tokenizer [default: the model's own, or a new one]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
}

/// A new model's shape.
#[derive(Debug, Args)]
#[command(next_help_heading = "New model (not with --from)")]
pub(super) struct ModelArgs {
    /// A sensible size, by ternary weights [default: 3m]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Family [default: bitnet]
    #[arg(long, value_name = "NAME")]
    family: Option<FamilyArg>,
    /// Tokens of the vocabulary
    #[arg(long, value_name = "N")]
    vocab_size: Option<usize>,
    /// Features of the residual stream
    #[arg(long, value_name = "N")]
    hidden_size: Option<usize>,
    /// Features of the feed-forward block
    #[arg(long, value_name = "N")]
    intermediate_size: Option<usize>,
    /// Layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key/value heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Feed-forward activation: relu2 or silu
    #[arg(long, value_name = "NAME")]
    hidden_act: Option<String>,
    /// A head of its own, not the embedding turned around
    #[arg(long)]
    separate_head: bool,
}

/// Families with flags of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum FamilyArg {
    Bitnet, // with sub-norms
    Llama,
}

/// How long, how, and where to.
#[derive(Debug, Args)]
#[command(next_help_heading = "Run")]
pub(super) struct RunArgs {
    /// Folder of the run
    #[arg(short, long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Go on from the newest checkpoint of that folder; what is not given stays as it was
    #[arg(long)]
    pub(super) resume: bool,
    /// How long, in optimizer steps
    #[arg(long, value_name = "N", group = "length")]
    steps: Option<u64>,
    /// How long, in tokens
    #[arg(long, value_name = "N", group = "length")]
    tokens: Option<u64>,
    /// How long, in minutes
    #[arg(long, value_name = "N", group = "length")]
    minutes: Option<f64>,
    /// Tokens of a window [default: 256]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Windows computed together [default: 8]
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    /// Batches that make a step [default: 1]
    #[arg(long, value_name = "N")]
    accumulate: Option<usize>,
    /// Highest learning rate [default: 0.003; finetune 0.0003, distill 0.001]
    #[arg(long, value_name = "X")]
    rate: Option<f64>,
    /// How the rate changes: two-stage, trapezoid or cosine [default: two-stage]
    #[arg(long, value_name = "NAME", value_parser = schedule)]
    schedule: Option<ScheduleName>,
    /// Makes the run repeatable [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// CPU threads [default: one for each physical core]
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Steps from one measurement to the next; 0: only at the end [default: 250]
    #[arg(long, value_name = "N")]
    eval_every: Option<u64>,
    /// A beginning to continue while the model learns; may be given several times
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Steps from one continuation to the next; 0: only at the end [default: 500]
    #[arg(long, value_name = "N")]
    sample_every: Option<u64>,
    /// Steps from one checkpoint to the next; 0: only at the end [default: 500]
    #[arg(long, value_name = "N")]
    save_every: Option<u64>,
    /// Checkpoints to keep [default: 2]
    #[arg(long, value_name = "N")]
    keep: Option<usize>,
    /// Form of the result: hf, i2_s, tq1_0, tq2_0, …, or masters; may be given several times; float
    /// models: hf or masters [default: hf]
    #[arg(long, value_name = "FORM")]
    export: Vec<String>,
    /// What the model is called on its card [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Print one JSON object at the end
    #[arg(long)]
    pub(super) json: bool,
}

fn schedule(name: &str) -> Result<ScheduleName, String> {
    serde_json::from_value(name.into()).map_err(|error| error.to_string())
}

impl RunArgs {
    /// The recipe the flags change: of a file, of the run that goes on, or the defaults.
    pub(super) fn begin(&self, config: Option<&Path>) -> anyhow::Result<Recipe> {
        let own = self.out.join("recipe.toml");
        match (config, self.resume) {
            (Some(config), _) => Recipe::read(config).map_err(super::as_usage),
            (None, true) if own.exists() => Recipe::read(own).map_err(super::as_usage),
            (None, true) => {
                let folder = self.out.display();
                Err(Usage::error(format!("--resume: {folder} holds no run")))
            }
            (None, false) => Ok(Recipe::default()),
        }
    }

    /// Changes what is given.
    pub(super) fn apply(&self, recipe: &mut Recipe) -> anyhow::Result<()> {
        fn set<T: Clone>(field: &mut T, given: &Option<T>) {
            if let Some(given) = given {
                *field = given.clone();
            }
        }
        let train = &mut recipe.train;
        if self.steps.is_some() || self.tokens.is_some() || self.minutes.is_some() {
            (train.steps, train.tokens, train.minutes) = (self.steps, self.tokens, self.minutes);
        }
        set(&mut train.window, &self.window);
        set(&mut train.rows, &self.rows);
        set(&mut train.accumulate, &self.accumulate);
        set(&mut train.rate, &self.rate);
        set(&mut train.schedule, &self.schedule);
        set(&mut train.threads, &self.threads);
        set(&mut recipe.seed, &self.seed);
        set(&mut recipe.eval.every, &self.eval_every);
        set(&mut recipe.samples.every, &self.sample_every);
        set(&mut recipe.checkpoints.every, &self.save_every);
        set(&mut recipe.checkpoints.keep, &self.keep);
        if !self.prompt.is_empty() {
            recipe.samples.prompts.clone_from(&self.prompt);
        }
        if !self.export.is_empty() {
            recipe.export.clone_from(&self.export);
        }
        if self.name.is_some() {
            recipe.name.clone_from(&self.name);
        }
        if recipe.stage.is_empty() {
            return Err(Usage::error(
                "expected files of text to learn from, or a recipe: bitnet train tales.txt --out run",
            ));
        }
        if recipe.length().is_err() {
            return Err(Usage::error("expected how long to train: --steps, --tokens or --minutes"));
        }
        Ok(())
    }
}

impl DataArgs {
    /// Changes what is given. Files become one corpus, so that each counts by its length.
    pub(super) fn apply(&self, recipe: &mut Recipe) {
        if !self.files.is_empty() {
            let corpus = CorpusRecipe { files: self.files.clone(), weight: 1.0 };
            recipe.stage = vec![StageRecipe { until: 1.0, mix: vec![corpus] }];
        }
        if self.eval.is_some() {
            recipe.eval.text.clone_from(&self.eval);
        }
        if self.separator.is_some() {
            recipe.separator.clone_from(&self.separator);
        }
        if self.tokenizer.is_some() {
            recipe.tokenizer.clone_from(&self.tokenizer);
        }
    }
}

impl ModelArgs {
    /// Changes what is given.
    ///
    /// # Errors
    /// A shape for a run that goes on with a model that has one.
    pub(super) fn apply(&self, recipe: &mut Recipe, resume: bool) -> anyhow::Result<()> {
        fn set<T: Clone>(field: &mut Option<T>, given: &Option<T>) {
            if given.is_some() {
                field.clone_from(given);
            }
        }
        let before = recipe.model.clone();
        let model = &mut recipe.model;
        set(&mut model.preset, &self.preset);
        set(&mut model.vocab_size, &self.vocab_size);
        set(&mut model.hidden_size, &self.hidden_size);
        set(&mut model.intermediate_size, &self.intermediate_size);
        set(&mut model.num_hidden_layers, &self.layers);
        set(&mut model.num_attention_heads, &self.heads);
        set(&mut model.num_key_value_heads, &self.kv_heads);
        set(&mut model.hidden_act, &self.hidden_act);
        if self.separate_head {
            model.tie_word_embeddings = Some(false);
        }
        if let Some(family) = self.family {
            model.family = Some(match family {
                FamilyArg::Bitnet => Family::Bitnet,
                FamilyArg::Llama => Family::Llama,
            });
        }
        // Of a run that begins, the library says so.
        if resume && *model != before && (recipe.from.is_some() || recipe.distill.is_some()) {
            return Err(Usage::error(
                "--resume: expected no flags of a new model's shape: this run's model has that of the \
                 model it began as",
            ));
        }
        Ok(())
    }
}
