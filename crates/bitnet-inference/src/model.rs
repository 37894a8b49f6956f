//! A loaded model: what it is, its text side, and the worker that runs it.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bitnet_core::backend::{DeviceInfo, KvSpec, MemoryUsage};
use bitnet_quant::config::ModelConfig;

use crate::chat_template::{ChatOptions, ChatTemplate, Message};
use crate::config::EngineConfig;
use crate::device::{self, Choice, Device, Loaded, Placement};
use crate::draft::Draft;
use crate::error::{InferenceError, Result};
use crate::grammar::{Constraint, Grammar, GrammarCompiler};
use crate::input::InferenceInput;
use crate::source::{self, WeightSource};
use crate::tokenizer::Tokenizer;
use crate::worker::{Spare, Worker, WorkerLimits};

/// A model on a device, ready to run. Clones share it; the last one to go unloads it.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

struct Inner {
    id: String,
    config: ModelConfig,
    total_weights: u64,
    tokenizer: Option<Tokenizer>,
    /// The file's template, or what is wrong with it.
    chat_template: Option<Result<ChatTemplate, String>>,
    plain_template: ChatTemplate,
    /// Made for the first request with a grammar, or why it cannot be.
    grammars: OnceLock<Result<GrammarCompiler, String>>,
    load_time: Duration,
    warnings: Vec<String>,
    worker: Worker,
}

/// Opens a model's weights again.
type Reopen = Box<dyn FnOnce() -> Result<Box<dyn WeightSource>> + Send>;

/// What a model is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelStats {
    /// Sequences in the running set.
    pub running: u64,
    /// Requests waiting to enter it.
    pub waiting: u64,
    /// Times a sequence gave its memory back to let another one run.
    pub preemptions: u64,
    /// Steps run.
    pub steps: u64,
    /// Tokens computed in them.
    pub tokens_computed: u64,
    /// Blocks of the KV cache that belong to running sequences.
    pub kv_blocks_in_use: u64,
    /// Blocks of the KV cache.
    pub kv_blocks: u64,
}

impl Model {
    /// Opens `path` (or the built-in model) and brings it onto the device. Blocking.
    pub(crate) fn load(
        path: &Path,
        config: &EngineConfig,
        choice: &Choice,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let started = Instant::now();
        let id = path.display().to_string();
        let checkpoint = source::open(path)?;
        let reopen = path.to_path_buf();
        let reopen =
            move || -> Result<Box<dyn WeightSource>> { Ok(Box::new(source::open(&reopen)?)) };
        let reopen = Some(Box::new(reopen) as Reopen);
        Self::place(id, &checkpoint, config, choice, reopen, started, progress)
    }

    /// Brings a model onto the device, wherever its weights come from. They cannot be read again, so
    /// a device that is lost takes the model with it.
    pub(crate) fn from_source(
        id: String,
        source: &dyn WeightSource,
        config: &EngineConfig,
        choice: &Choice,
        started: Instant,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        Self::place(id, source, config, choice, None, started, progress)
    }

    fn place(
        id: String,
        source: &dyn WeightSource,
        config: &EngineConfig,
        choice: &Choice,
        reopen: Option<Reopen>,
        started: Instant,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let model_config = source.config().clone();
        let assets = source.text();
        let tokenizer = match &assets.tokenizer {
            Some(_) => Some(
                Tokenizer::from_assets(assets).map_err(|e| InferenceError::tokenizer(&id, e))?,
            ),
            None => None,
        };
        let (max_positions, kv_spec) = config.kv_cache(&model_config)?;
        let step = config.step_limits(model_config.vocab_size, max_positions);
        let placement = Placement { kv_spec, max_positions, max_step_tokens: step.max_tokens };
        let Loaded { backend, mut warnings } =
            device::load(config, choice, source, placement, progress)?;
        warnings.extend(shorter_context(config, &model_config, max_positions));
        let draft = match &config.draft_model {
            Some(path) => {
                let beside = Beside { model: &model_config, kv_spec, max_positions };
                let (draft, more) = load_draft(path, config, choice, beside)?;
                warnings.extend(more);
                Some(draft)
            }
            None => None,
        };
        let spare = match reopen {
            Some(reopen) if choice.ends_on_cpu() && backend.device().name != "cpu" => {
                let config = config.clone();
                let spare = move || {
                    device::open(Device::Cpu, &config, &*reopen()?, placement, &mut |_, _| {})
                };
                Some(Box::new(spare) as Spare)
            }
            _ => None,
        };
        let limits = WorkerLimits {
            step,
            max_waiting: config.max_waiting,
            max_positions,
            context: config.context_of(&model_config),
            vocab_size: model_config.vocab_size,
        };
        Ok(Self(Arc::new(Inner {
            id,
            total_weights: source.total_weight_count(),
            tokenizer,
            chat_template: assets.chat_template.as_ref().map(|source| {
                // A model with a broken template still generates; only chats need it.
                ChatTemplate::new(source, &assets.special_tokens).map_err(|e| e.to_string())
            }),
            plain_template: ChatTemplate::plain(),
            grammars: OnceLock::new(),
            load_time: started.elapsed(),
            warnings,
            worker: Worker::spawn(backend, draft, spare, limits)?,
            config: model_config,
        })))
    }

    /// The path or name it was loaded by.
    pub fn get_model_id(&self) -> &str {
        &self.0.id
    }

    /// Features of the residual stream (`hidden_size`).
    pub fn get_input_dim(&self) -> usize {
        self.0.config.hidden_size
    }

    /// Tokens the model chooses between (`vocab_size`).
    pub fn get_output_dim(&self) -> usize {
        self.0.config.vocab_size
    }

    /// Numbers in all tensors of its file; a tied head is counted once.
    pub fn get_total_weight_count(&self) -> u64 {
        self.0.total_weights
    }

    /// Its hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// Longest sequence it can hold here: prompt and answer together, in tokens.
    pub fn context_length(&self) -> usize {
        self.0.worker.limits().max_positions
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// A file without a tokenizer has none; such a model takes token ids only.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let lacks = || InferenceError::model_lacks(&self.0.id, "its file has no tokenizer");
        self.0.tokenizer.as_ref().ok_or_else(lacks)
    }

    /// Whether its file has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.0.chat_template.is_some()
    }

    /// Its chat template; for a file without one, [`ChatTemplate::plain`].
    ///
    /// # Errors
    /// The file's template is no valid Jinja.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        match &self.0.chat_template {
            Some(Ok(template)) => Ok(template),
            Some(Err(reason)) => Err(InferenceError::model_lacks(&self.0.id, reason)),
            None => Ok(&self.0.plain_template),
        }
    }

    /// The prompt that asks for the next message of a conversation.
    ///
    /// ```
    /// use bitnet_inference::{ChatOptions, GenerationOptions, InferenceEngine, Message};
    ///
    /// let engine = InferenceEngine::builder().build_blocking()?;
    /// let model = engine.load_model_blocking("builtin")?;
    /// let prompt = model.chat_prompt(&[Message::user("Tell me a story.")], &ChatOptions::default())?;
    /// let options = GenerationOptions::default().max_tokens(20);
    /// println!("{}", engine.generate_blocking(&model, prompt, &options)?.text);
    /// # Ok::<(), bitnet_inference::InferenceError>(())
    /// ```
    ///
    /// # Errors
    /// A template that is damaged or refuses the messages; a model without a tokenizer.
    pub fn chat_prompt(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<InferenceInput> {
        let tokens = self.chat_template()?.encode(self.tokenizer()?, messages, options);
        let refused = |e| {
            let expected = format!("what the chat template of {} accepts", self.get_model_id());
            InferenceError::input("messages", expected, e)
        };
        Ok(InferenceInput::Tokens(tokens.map_err(refused)?))
    }

    /// Compiles a grammar, so that the next generations held to it start at once.
    ///
    /// # Errors
    /// [`InferenceError::Input`] says what is wrong with the grammar; a model without a tokenizer.
    pub fn prepare_grammar(&self, grammar: &Grammar) -> Result<()> {
        self.constraint(grammar).map(drop)
    }

    pub(crate) fn constraint(&self, grammar: &Grammar) -> Result<Constraint> {
        let tokenizer = self.tokenizer()?;
        let new = || GrammarCompiler::new(tokenizer, self.get_output_dim());
        match self.0.grammars.get_or_init(new) {
            Ok(compiler) => compiler.constraint(grammar),
            Err(reason) => Err(InferenceError::model_lacks(&self.0.id, reason)),
        }
    }

    /// The device it runs on now.
    pub fn device(&self) -> &DeviceInfo {
        &self.0.worker.place().device
    }

    /// What did not go as asked: devices that did not take it when it was loaded and, last, the
    /// device that was lost while it ran.
    pub fn warnings(&self) -> Vec<String> {
        self.0.warnings.iter().chain(&self.0.worker.place().notice).cloned().collect()
    }

    /// Whether it has stopped for good, with a device that was lost or a step that failed.
    pub fn has_failed(&self) -> bool {
        self.0.worker.has_failed()
    }

    /// Bytes it holds there.
    pub fn memory(&self) -> MemoryUsage {
        self.0.worker.place().memory
    }

    /// Shape of its KV cache.
    pub fn kv_spec(&self) -> KvSpec {
        self.0.worker.kv_spec
    }

    /// How long it took to open and place it.
    pub fn load_time(&self) -> Duration {
        self.0.load_time
    }

    /// What it is doing now.
    pub fn stats(&self) -> ModelStats {
        use std::sync::atomic::Ordering::Relaxed;
        let stats = self.0.worker.stats();
        ModelStats {
            running: stats.running.load(Relaxed),
            waiting: stats.waiting.load(Relaxed),
            preemptions: stats.preemptions.load(Relaxed),
            steps: stats.steps.load(Relaxed),
            tokens_computed: stats.tokens_computed.load(Relaxed),
            kv_blocks_in_use: stats.blocks_in_use.load(Relaxed),
            kv_blocks: self.0.worker.kv_spec.n_blocks as u64,
        }
    }

    /// The residual stream of each layer for a sequence of tokens: after the embedding, after each
    /// layer, the last after the final norm. `(layers + 1)` times `(tokens, hidden_size)`.
    ///
    /// # Errors
    /// More tokens than one step takes, or ids outside the vocabulary.
    pub fn hidden_states(&self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        self.0.worker.hidden_states(tokens.to_vec())
    }

    pub(crate) fn worker(&self) -> &Worker {
        &self.0.worker
    }
}

/// What to say where a sequence may not be as long as was asked for.
fn shorter_context(config: &EngineConfig, model: &ModelConfig, given: usize) -> Option<String> {
    let asked = config.context_length.filter(|&asked| asked > given)?;
    let why = match given < model.max_position_embeddings {
        true => "what the KV cache has memory for",
        false => "what the model was made for",
    };
    Some(format!("a context of {asked} tokens was asked for; it has {given}, {why}"))
}

/// The model a draft model works for.
struct Beside<'a> {
    model: &'a ModelConfig,
    kv_spec: KvSpec,
    max_positions: usize,
}

/// Brings a draft model onto the device, with a cache of the same blocks as the model's. Also
/// returns which devices did not take it.
fn load_draft(
    path: &Path,
    config: &EngineConfig,
    choice: &Choice,
    Beside { model, kv_spec, max_positions }: Beside<'_>,
) -> Result<(Draft, Vec<String>)> {
    let checkpoint = source::open(path)?;
    let draft = checkpoint.config();
    if draft.vocab_size != model.vocab_size {
        let expected = format!("a model with a vocabulary of {}", model.vocab_size);
        let got = format!("{} with {}", path.display(), draft.vocab_size);
        return Err(InferenceError::input("draft_model", expected, got));
    }
    let kv_spec = config.draft_kv(draft, kv_spec);
    let max_step_tokens = config.step_limits(draft.vocab_size, max_positions).max_tokens;
    let placement = Placement { kv_spec, max_positions, max_step_tokens };
    let Loaded { backend, warnings } =
        device::load(config, choice, &checkpoint, placement, &mut |_, _| {})?;
    Ok((Draft::new(backend, draft.vocab_size, max_step_tokens), warnings))
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("id", &self.0.id).field("device", self.device()).finish()
    }
}
