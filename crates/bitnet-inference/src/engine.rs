//! The engine: loads models, keeps them, and turns prompts into logits, tokens and text.
//!
//! Each call has an async form and a blocking twin. No async runtime is needed: the model runs on
//! its own thread, and loading gets a thread for as long as it takes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use futures_channel::mpsc::UnboundedReceiver;
use futures_channel::oneshot;

use crate::builder::InferenceEngineBuilder;
use crate::cache::LoadCache;
use crate::config::EngineConfig;
use crate::detokenizer::Detokenizer;
use crate::device::{self, Choice, InferenceContext};
use crate::error::{InferenceError, Result};
use crate::input::{InferenceInput, InferenceOutput};
use crate::model::Model;
use crate::options::GenerationOptions;
use crate::request::{Continuation, Event, GeneratedToken, Goal, Request, RequestContext, Usage};
use crate::sampler::Sampler;
use crate::source::WeightSource;
use crate::stream::{Generation, TokenStream};
use crate::wait::block_on;

/// Loads ternary models and runs them.
///
/// ```
/// use bitnet_inference::{GenerationOptions, InferenceEngine};
///
/// let engine = InferenceEngine::builder().build_blocking()?;
/// let model = engine.load_model_blocking("builtin")?;
/// let options = GenerationOptions::default().max_tokens(8).seed(1);
/// let answer = engine.generate_blocking(&model, "Once upon a time", &options)?;
/// println!("{}", answer.text);
/// assert_eq!(answer.usage.completion_tokens, 8);
/// # Ok::<(), bitnet_inference::InferenceError>(())
/// ```
#[derive(Clone)]
pub struct InferenceEngine(Arc<Inner>);

struct Inner {
    config: EngineConfig,
    choice: Choice,
    warnings: Vec<String>,
    models: LoadCache<PathBuf, Model>,
}

impl InferenceEngine {
    /// An engine with [`EngineConfig::balanced`].
    pub async fn balanced() -> Result<Self> {
        Self::with_config(EngineConfig::balanced())
    }

    /// An engine with [`EngineConfig::optimized_for_speed`].
    pub async fn optimized_for_speed() -> Result<Self> {
        Self::with_config(EngineConfig::optimized_for_speed())
    }

    /// An engine with [`EngineConfig::optimized_for_memory`].
    pub async fn optimized_for_memory() -> Result<Self> {
        Self::with_config(EngineConfig::optimized_for_memory())
    }

    /// Chooses settings one by one, starting from the balanced profile.
    pub fn builder() -> InferenceEngineBuilder {
        InferenceEngineBuilder::default()
    }

    /// An engine with these settings.
    ///
    /// # Errors
    /// A setting outside its range; a device that is absent, where `strict_device` is set.
    pub fn with_config(config: EngineConfig) -> Result<Self> {
        config.validate()?;
        let choice = device::choose(&config)?;
        let models = LoadCache::new(config.max_cached_models, config.max_cached_bytes.bytes());
        let warnings = choice.warning.iter().cloned().collect();
        Ok(Self(Arc::new(Inner { config, choice, warnings, models })))
    }

    /// The settings in force.
    pub fn config(&self) -> &EngineConfig {
        &self.0.config
    }

    /// The device chosen and what it runs with. Where a model truly is, its
    /// [`device`](Model::device) says: a device that fails may hand it on.
    pub fn context(&self) -> InferenceContext {
        InferenceContext {
            device: self.0.choice.first(),
            optimization_level: self.0.config.optimization_level,
            batch_size: self.0.config.batch_size,
        }
    }

    /// What could not be done as asked, such as a GPU that is absent.
    pub fn warnings(&self) -> &[String] {
        &self.0.warnings
    }

    /// The model of `path` if it is loaded now. Looking does not count as use: it does not delay the
    /// model's eviction.
    pub fn loaded_model(&self, path: impl AsRef<Path>) -> Option<Model> {
        self.0.models.peek(&model_key(path.as_ref())).filter(|model| !model.has_failed())
    }

    /// Models loaded now and the bytes of their weights.
    pub fn loaded_models(&self) -> (usize, u64) {
        self.0.models.usage()
    }

    /// Forgets the model of `path` and returns it, if it is loaded now; it is unloaded when its last
    /// user drops it.
    pub fn unload_model(&self, path: impl AsRef<Path>) -> Option<Model> {
        self.0.models.take(&model_key(path.as_ref()))
    }

    /// Forgets all models; each is unloaded when its last user drops it.
    pub fn unload_models(&self) {
        self.0.models.clear();
    }

    /// Opens a GGUF file, a safetensors file, a model folder, or `"builtin"`.
    ///
    /// The same path gives the same loaded model until it is evicted; callers that ask for it at the
    /// same time wait for one load.
    ///
    /// # Errors
    /// [`InferenceError::Model`] says which file is missing or damaged, and how.
    pub async fn load_model(&self, path: impl AsRef<Path>) -> Result<Model> {
        if self.loaded_model(path.as_ref()).is_some() {
            return self.load_model_blocking(path); // Only a look-up.
        }
        let (sender, receiver) = oneshot::channel();
        let (engine, path) = (self.clone(), path.as_ref().to_path_buf());
        let load = move || {
            let _ = sender.send(engine.load_model_blocking(path));
        };
        std::thread::Builder::new()
            .name("bitnet-load".into())
            .spawn(load)
            .map_err(|e| InferenceError::thread(&e))?;
        receiver.await.map_err(|_| InferenceError::stopped())?
    }

    /// Blocking twin of [`load_model`](Self::load_model).
    pub fn load_model_blocking(&self, path: impl AsRef<Path>) -> Result<Model> {
        self.load_model_with_progress(path, &mut |_, _| {})
    }

    /// Loads a model and reports (layers done, layers) on the way. Blocking.
    pub fn load_model_with_progress(
        &self,
        path: impl AsRef<Path>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Model> {
        let path = path.as_ref();
        let key = model_key(path);
        self.0.models.drop_if(&key, Model::has_failed);
        self.0.models.get_or_load(&key, || {
            let model = Model::load(path, &self.0.config, &self.0.choice, progress)?;
            let bytes = model.memory().weights;
            Ok((model, bytes))
        })
    }

    /// Brings a model onto the device from any source of weights, such as a
    /// [`SyntheticModel`](crate::synthetic::SyntheticModel). It is not kept: dropping it unloads it.
    /// Blocking.
    ///
    /// # Errors
    /// As [`load_model`](Self::load_model).
    pub fn load_source_blocking(
        &self,
        id: impl Into<String>,
        source: &dyn WeightSource,
    ) -> Result<Model> {
        let started = Instant::now();
        let Inner { config, choice, .. } = &*self.0;
        Model::from_source(id.into(), source, config, choice, started, &mut |_, _| {})
    }

    /// The logits after the last token of the input: `vocab_size` numbers.
    ///
    /// # Errors
    /// An empty input, one longer than the context, or a model that fails.
    pub async fn infer(&self, model: &Model, input: &InferenceInput) -> Result<InferenceOutput> {
        let (tokens, events) = self.submit_logits(model, input)?;
        collect_logits(tokens, events).await
    }

    /// Blocking twin of [`infer`](Self::infer).
    pub fn infer_blocking(&self, model: &Model, input: &InferenceInput) -> Result<InferenceOutput> {
        block_on(self.infer(model, input))
    }

    /// [`infer`](Self::infer) for many inputs, which share the model's steps. Results come in the
    /// order of the inputs, each the same to the last bit as if it were alone.
    ///
    /// # Errors
    /// The first error of any input.
    pub async fn infer_batch(
        &self,
        model: &Model,
        inputs: &[InferenceInput],
    ) -> Result<Vec<InferenceOutput>> {
        let mut outputs = Vec::with_capacity(inputs.len());
        // No more at a time than may wait: a long list is no reason to be refused.
        for group in inputs.chunks(self.0.config.max_waiting.min(self.0.config.batch_size * 2)) {
            let submitted: Result<Vec<_>> =
                group.iter().map(|input| self.submit_logits(model, input)).collect();
            for (tokens, events) in submitted? {
                outputs.push(collect_logits(tokens, events).await?);
            }
        }
        Ok(outputs)
    }

    /// Blocking twin of [`infer_batch`](Self::infer_batch).
    pub fn infer_batch_blocking(
        &self,
        model: &Model,
        inputs: &[InferenceInput],
    ) -> Result<Vec<InferenceOutput>> {
        block_on(self.infer_batch(model, inputs))
    }

    /// Loads a model and runs one input through it, with the balanced profile.
    ///
    /// ```
    /// use bitnet_inference::InferenceEngine;
    ///
    /// # async fn example() -> Result<(), bitnet_inference::InferenceError> {
    /// let output = InferenceEngine::quick_infer("builtin", &"Once upon a".into()).await?;
    /// assert_eq!(output.logits.len(), 4096);
    /// # Ok(())
    /// # }
    /// # futures::executor::block_on(example()).unwrap();
    /// ```
    pub async fn quick_infer(
        path: impl AsRef<Path>,
        input: &InferenceInput,
    ) -> Result<InferenceOutput> {
        let engine = Self::balanced().await?;
        let model = engine.load_model(path).await?;
        engine.infer(&model, input).await
    }

    /// Logits after every token of the input, `(tokens, vocab_size)` row-major. Blocking.
    ///
    /// # Errors
    /// As [`infer`](Self::infer).
    pub fn logits_of_all(&self, model: &Model, input: &InferenceInput) -> Result<Vec<Vec<f32>>> {
        let tokens = input.tokens(model)?;
        let events = submit(model, tokens, Goal::Logits { all: true })?;
        block_on(drain(events, |event, rows: &mut Vec<Vec<f32>>| {
            if let Event::Logits(row) = event {
                rows.push(row);
            }
        }))
        .map(|(rows, _)| rows)
    }

    /// The natural log-probability of each token of the input given those before it; the first has
    /// none, so there is one number less than tokens. Blocking.
    ///
    /// # Errors
    /// As [`infer`](Self::infer).
    pub fn score(&self, model: &Model, input: &InferenceInput) -> Result<Vec<f32>> {
        let scored = block_on(self.score_tokens(model, input, 0, &RequestContext::default()))?;
        Ok(scored.iter().filter_map(|token| token.logprob).collect())
    }

    /// As [`score`](Self::score), with each token's id and the `top` likeliest tokens at its place.
    /// Dropping the future cancels the work before the model's next step.
    ///
    /// # Errors
    /// As [`infer`](Self::infer).
    pub async fn score_tokens(
        &self,
        model: &Model,
        input: &InferenceInput,
        top: usize,
        context: &RequestContext,
    ) -> Result<Vec<GeneratedToken>> {
        let tokens = input.tokens(model)?;
        let events = submit_for(model, tokens, Goal::Score { top }, context)?;
        let take = |event, scored: &mut Vec<GeneratedToken>| {
            if let Event::Score(token) = event {
                scored.push(token);
            }
        };
        drain(events, take).await.map(|(scored, _)| scored)
    }

    /// Starts a generation whose text arrives while it is computed.
    ///
    /// The stream is an [`Iterator`] and an async [`Stream`](futures_core::Stream); dropping it
    /// cancels the generation before the model's next step.
    ///
    /// ```
    /// use bitnet_inference::{GenerationOptions, InferenceEngine};
    ///
    /// let engine = InferenceEngine::builder().build_blocking()?;
    /// let model = engine.load_model_blocking("builtin")?;
    /// let options = GenerationOptions::default().max_tokens(5);
    /// for chunk in engine.stream(&model, "The king said", &options)? {
    ///     print!("{}", chunk?.text);
    /// }
    /// # Ok::<(), bitnet_inference::InferenceError>(())
    /// ```
    ///
    /// # Errors
    /// An option outside its range, an empty prompt, or one longer than the context.
    pub fn stream(
        &self,
        model: &Model,
        prompt: impl Into<InferenceInput>,
        options: &GenerationOptions,
    ) -> Result<TokenStream> {
        self.stream_for(model, prompt, options, &RequestContext::default())
    }

    /// [`stream`](Self::stream) for one of many callers.
    ///
    /// # Errors
    /// As [`stream`](Self::stream).
    pub fn stream_for(
        &self,
        model: &Model,
        prompt: impl Into<InferenceInput>,
        options: &GenerationOptions,
        context: &RequestContext,
    ) -> Result<TokenStream> {
        let tokens = prompt.into().tokens(model)?;
        let mut ending_tokens = options.stop_token_ids.clone();
        if !options.ignore_eos
            && let Ok(tokenizer) = model.tokenizer()
        {
            ending_tokens.extend_from_slice(tokenizer.eos_ids());
        }
        let mut sampler = Sampler::new(options, &tokens, model.get_output_dim())?;
        if let Some(dry) = &options.dry
            && let Ok(tokenizer) = model.tokenizer()
        {
            sampler =
                sampler.with_dry_breakers(tokenizer.tokens_containing(&dry.sequence_breakers));
        }
        let constraint = options.grammar.as_ref().map(|g| model.constraint(g)).transpose()?;
        let continuation = Continuation {
            sampler,
            constraint,
            max_tokens: options.max_tokens.map_or(usize::MAX, |n| n as usize),
            ending_tokens: ending_tokens.clone(),
        };
        let goal = Goal::Generate(Box::new(continuation));
        let detokenizer = model.tokenizer().ok().map(|t| Detokenizer::after(t, &tokens));
        let events = submit_for(model, tokens, goal, context)?;
        Ok(TokenStream::new(events, detokenizer, &options.stop, ending_tokens))
    }

    /// Generates a whole answer.
    ///
    /// # Errors
    /// As [`stream`](Self::stream), or a model that fails on the way.
    pub async fn generate(
        &self,
        model: &Model,
        prompt: impl Into<InferenceInput>,
        options: &GenerationOptions,
    ) -> Result<Generation> {
        self.stream(model, prompt, options)?.collect().await
    }

    /// Blocking twin of [`generate`](Self::generate).
    pub fn generate_blocking(
        &self,
        model: &Model,
        prompt: impl Into<InferenceInput>,
        options: &GenerationOptions,
    ) -> Result<Generation> {
        self.stream(model, prompt, options)?.collect_blocking()
    }

    /// Generates `n` answers to one prompt, which is computed once. Answer `i` is what
    /// [`generate`](Self::generate) gives with [`options.for_choice(i)`](GenerationOptions::for_choice).
    ///
    /// ```
    /// use bitnet_inference::{GenerationOptions, InferenceEngine};
    ///
    /// let engine = InferenceEngine::builder().build_blocking()?;
    /// let model = engine.load_model_blocking("builtin")?;
    /// let options = GenerationOptions::default().seed(1).max_tokens(8).logprobs(0);
    /// let answers = engine.generate_choices_blocking(&model, "The wolf said", &options, 4)?;
    /// let score = |answer: &bitnet_inference::Generation| -> f32 {
    ///     answer.tokens.iter().filter_map(|token| token.logprob).sum()
    /// };
    /// let best = answers.iter().max_by(|a, b| score(a).total_cmp(&score(b)));
    /// println!("{}", best.unwrap().text);
    /// # Ok::<(), bitnet_inference::InferenceError>(())
    /// ```
    ///
    /// # Errors
    /// As [`generate`](Self::generate); more answers than may wait in the engine's queue.
    pub async fn generate_choices(
        &self,
        model: &Model,
        prompt: impl Into<InferenceInput>,
        options: &GenerationOptions,
        n: usize,
    ) -> Result<Vec<Generation>> {
        let prompt = InferenceInput::Tokens(prompt.into().tokens(model)?);
        let start = |i| self.stream(model, prompt.clone(), &options.for_choice(i as u64));
        let streams = (0..n).map(start).collect::<Result<Vec<_>>>()?;
        let mut answers = Vec::with_capacity(n);
        for stream in streams {
            answers.push(stream.collect().await?);
        }
        Ok(answers)
    }

    /// Blocking twin of [`generate_choices`](Self::generate_choices).
    pub fn generate_choices_blocking(
        &self,
        model: &Model,
        prompt: impl Into<InferenceInput>,
        options: &GenerationOptions,
        n: usize,
    ) -> Result<Vec<Generation>> {
        block_on(self.generate_choices(model, prompt, options, n))
    }

    fn submit_logits(
        &self,
        model: &Model,
        input: &InferenceInput,
    ) -> Result<(usize, UnboundedReceiver<Event>)> {
        let tokens = input.tokens(model)?;
        Ok((tokens.len(), submit(model, tokens, Goal::Logits { all: false })?))
    }
}

impl std::fmt::Debug for InferenceEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InferenceEngine").field("context", &self.context()).finish_non_exhaustive()
    }
}

/// One name for each file, however its path is written.
fn model_key(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}

fn submit(model: &Model, tokens: Vec<u32>, goal: Goal) -> Result<UnboundedReceiver<Event>> {
    submit_for(model, tokens, goal, &RequestContext::default())
}

fn submit_for(
    model: &Model,
    tokens: Vec<u32>,
    goal: Goal,
    context: &RequestContext,
) -> Result<UnboundedReceiver<Event>> {
    let RequestContext { priority, cache_salt } = context.clone();
    model.worker().submit(Request { tokens, goal, priority, cache_salt })
}

async fn collect_logits(
    n_tokens: usize,
    events: UnboundedReceiver<Event>,
) -> Result<InferenceOutput> {
    let (logits, usage) = drain(events, |event, logits: &mut Vec<f32>| {
        if let Event::Logits(row) = event {
            *logits = row;
        }
    })
    .await?;
    Ok(InferenceOutput { logits, n_tokens, usage })
}

/// Feeds all events of a request to `take` until it ends.
pub(crate) async fn drain<T: Default>(
    mut events: UnboundedReceiver<Event>,
    mut take: impl FnMut(Event, &mut T),
) -> Result<(T, Usage)> {
    use futures_core::Stream;
    let mut collected = T::default();
    loop {
        let next =
            std::future::poll_fn(|context| std::pin::Pin::new(&mut events).poll_next(context));
        match next.await {
            Some(Event::Finished(_, usage)) => return Ok((collected, usage)),
            Some(Event::Failed(error)) => return Err(error),
            Some(event) => take(event, &mut collected),
            None => return Err(InferenceError::stopped()),
        }
    }
}
