//! `bitnet serve`: serves models over HTTP until it is told to stop.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use bitnet_inference::{BUILTIN_MODEL, InferenceEngine, MemorySize};
use bitnet_server::{AppState, KeepAlive, Listen, LogFormat, ServerConfig};
use clap::{Args, ValueEnum};

use crate::exit::{Outcome, Usage};
use crate::flags::{EngineArgs, as_usage};
use crate::term::Term;

const EXAMPLES: &str = "\
Examples:
  bitnet serve
  bitnet serve -m model.gguf --port 9000
  bitnet serve -m chat=model.gguf -m small=other/ --api-key-file keys.txt --host 0.0.0.0
  curl localhost:8080/v1/chat/completions -H 'content-type: application/json' \\
    -d '{\"model\":\"builtin\",\"messages\":[{\"role\":\"user\",\"content\":\"Once upon a time\"}]}'

Speaks the wire formats of OpenAI (/v1), Anthropic (/v1/messages) and Ollama (/api); /docs describes
them. The first SIGTERM or Ctrl-C lets requests finish, the second ends at once.";

/// Arguments of `bitnet serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServeArgs {
    /// A model to serve, loaded when it is first asked for; repeat for several. NAME is the file's
    /// name if not given [default: builtin]
    #[arg(short, long = "model", env = "BITNET_MODEL", value_name = "[NAME=]MODEL")]
    models: Vec<String>,
    /// Load the first model before taking requests
    #[arg(long)]
    preload: bool,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    log: LogArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Where to listen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Listening")]
struct ListenArgs {
    /// Address to listen on
    #[arg(long, env = "BITNET_HOST", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 lets the system choose
    #[arg(long, env = "BITNET_PORT", default_value_t = 8080)]
    port: u16,
    /// Listen on a Unix socket instead
    #[cfg(unix)]
    #[arg(long, env = "BITNET_UNIX_SOCKET", value_name = "PATH", conflicts_with_all = ["host", "port"])]
    unix: Option<PathBuf>,
    /// Certificate chain for HTTPS, in PEM
    #[cfg(feature = "tls")]
    #[arg(long, env = "BITNET_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key for HTTPS, in PEM
    #[cfg(feature = "tls")]
    #[arg(long, env = "BITNET_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// Who may call.
#[derive(Debug, Args)]
#[command(next_help_heading = "Access")]
struct AccessArgs {
    /// A key callers must send; repeat for several. Other users of this machine can read it in the
    /// list of processes: prefer a file or the environment
    #[arg(long = "api-key", env = "BITNET_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_keys: Vec<String>,
    /// A file with one key a line; empty lines and lines that begin with # are left out
    #[arg(long, env = "BITNET_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// A web origin that may call from browsers, such as `https://app.example`; '*' for all
    #[arg(long = "cors-origin", env = "BITNET_CORS_ORIGIN", value_name = "ORIGIN")]
    cors_origins: Vec<String>,
    /// A host name to answer to, besides localhost
    #[arg(long = "allow-host", env = "BITNET_ALLOW_HOST", value_name = "NAME")]
    allowed_hosts: Vec<String>,
}

/// How much may be asked at a time.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Sequences computed together
    #[arg(long, env = "BITNET_PARALLEL", value_name = "N", default_value_t = 16)]
    parallel: usize,
    /// Requests in work or waiting; one more is answered with 429
    #[arg(long, env = "BITNET_MAX_REQUESTS", value_name = "N", default_value_t = 512)]
    max_requests: usize,
    /// Memory for a model's KV cache, in MiB; taken as it fills
    #[arg(long, env = "BITNET_KV_MEMORY", value_name = "MIB", default_value_t = 2048)]
    kv_memory: u64,
    /// Memory for weights of loaded models, in MiB; the model in use is always kept
    #[arg(long, env = "BITNET_MODEL_MEMORY", value_name = "MIB", default_value_t = 8192)]
    model_memory: u64,
    /// Time a model stays in memory after its last request, such as 5m; negative: until others need
    /// the room. Requests of Ollama's clients may choose another
    #[arg(
        long,
        env = "BITNET_KEEP_ALIVE",
        value_name = "DURATION",
        default_value = "-1",
        allow_hyphen_values = true
    )]
    keep_alive: KeepAlive,
    /// Seconds a request may take
    #[arg(long, env = "BITNET_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 3600)]
    request_timeout: u64,
    /// Seconds requests may take to finish after a signal to stop
    #[arg(long, env = "BITNET_DRAIN_GRACE", value_name = "SECONDS", default_value_t = 30)]
    drain_grace: u64,
    /// Bytes of a request's body
    #[arg(long, env = "BITNET_MAX_BODY", value_name = "BYTES", default_value_t = 8 << 20)]
    max_body: usize,
    /// Connections at a time
    #[arg(long, env = "BITNET_MAX_CONNECTIONS", value_name = "N", default_value_t = 1024)]
    max_connections: usize,
}

/// What is logged. Prompts and answers never are.
#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
struct LogArgs {
    /// How lines are written
    #[arg(long, env = "BITNET_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: LogFormatArg,
    /// A level, or a filter such as 'info,bitnet_server::access=off'
    #[arg(long, env = "BITNET_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Send OpenTelemetry spans to the collector at this address (OTLP over HTTP), such as
    /// http://127.0.0.1:4318
    #[cfg(feature = "otel")]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormatArg {
    Text,
    Json,
}

/// Serves until a signal comes.
pub(crate) fn run(args: ServeArgs, term: &Term) -> anyhow::Result<Outcome> {
    #[cfg(feature = "otel")]
    let traces = args.log.init()?;
    #[cfg(not(feature = "otel"))]
    args.log.init()?;
    let mut engine_config = args.engine.config(args.limits.parallel);
    engine_config.memory_pool_size = MemorySize::MB(args.limits.kv_memory);
    engine_config.max_cached_bytes = MemorySize::MB(args.limits.model_memory);
    engine_config.max_waiting = args.limits.max_requests;
    let config = server_config(&args)?;
    engine_config.max_cached_models = engine_config.max_cached_models.max(config.models.len());
    let engine = InferenceEngine::with_config(engine_config).map_err(as_usage)?;
    for warning in engine.warnings() {
        term.warn(warning);
    }
    let preload = args.preload.then(|| config.models[0].1.clone());
    let state = AppState::new(engine.clone(), config).map_err(|e| Usage::error(e.to_string()))?;
    // Models run on threads of their own; these two only move bytes.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the server's threads")?;
    let outcome = runtime.block_on(serve(state, engine, preload));
    runtime.shutdown_timeout(Duration::from_secs(1));
    #[cfg(feature = "otel")]
    if let Some(error) = traces.and_then(|traces| traces.shutdown().err()) {
        term.warn(&format!("the last spans were not sent: {error}"));
    }
    outcome
}

impl LogArgs {
    fn format(&self) -> LogFormat {
        match self.log_format {
            LogFormatArg::Text => LogFormat::Text,
            LogFormatArg::Json => LogFormat::Json,
        }
    }

    #[cfg(not(feature = "otel"))]
    fn init(&self) -> anyhow::Result<()> {
        bitnet_server::init_logging(self.format(), &self.log)
            .map_err(|e| Usage::error(e.to_string()))
    }

    #[cfg(feature = "otel")]
    fn init(&self) -> anyhow::Result<Option<bitnet_server::Traces>> {
        let done = match &self.otlp_endpoint {
            None => bitnet_server::init_logging(self.format(), &self.log).map(|()| None),
            Some(endpoint) => {
                bitnet_server::init_logging_and_traces(self.format(), &self.log, endpoint).map(Some)
            }
        };
        done.map_err(|e| Usage::error(e.to_string()))
    }
}

async fn serve(
    state: AppState,
    engine: InferenceEngine,
    preload: Option<PathBuf>,
) -> anyhow::Result<Outcome> {
    let listener = bitnet_server::bind(state.config()).await.context("cannot listen")?;
    if let Some(path) = preload {
        engine.load_model(&path).await?;
    }
    // Before the log says that it listens: who reads that may send a signal at once.
    let stopped = bitnet_server::drain_on_signal(state.lifecycle().clone());
    let stopped = stopped.context("cannot listen for signals")?;
    match (listener.local_addr(), &state.config().listen) {
        (Some(address), _) => tracing::info!("listening on {}://{address}", scheme(&state)),
        (None, listen) => tracing::info!("listening on {listen:?}"),
    }
    let app = bitnet_server::router(state.clone());
    tokio::select! {
        served = bitnet_server::serve(listener, app, state.clone()) => {
            served.context("the listener failed")?;
            Ok(Outcome::Done)
        }
        () = stopped => Ok(Outcome::Interrupted),
    }
}

fn scheme(state: &AppState) -> &'static str {
    #[cfg(feature = "tls")]
    if state.config().tls.is_some() {
        return "https";
    }
    let _ = state;
    "http"
}

fn server_config(args: &ServeArgs) -> anyhow::Result<ServerConfig> {
    let mut config = ServerConfig {
        listen: Listen::Tcp(SocketAddr::new(args.listen.host, args.listen.port)),
        keep_alive: args.limits.keep_alive,
        api_keys: args.access.api_keys.clone(),
        cors_origins: args.access.cors_origins.clone(),
        allowed_hosts: args.access.allowed_hosts.clone(),
        ..ServerConfig::default()
    };
    #[cfg(unix)]
    if let Some(path) = &args.listen.unix {
        config.listen = Listen::Unix(path.clone());
    }
    #[cfg(feature = "tls")]
    if let (Some(certificates), Some(key)) = (&args.listen.tls_cert, &args.listen.tls_key) {
        config.tls = Some((certificates.clone(), key.clone()));
    }
    if let Some(path) = &args.access.api_key_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the keys in {}", path.display()))?;
        let keys = text.lines().map(str::trim);
        let keys = keys.filter(|line| !line.is_empty() && !line.starts_with('#'));
        config.api_keys.extend(keys.map(str::to_owned));
        if config.api_keys.is_empty() {
            return Err(Usage::error(format!("{} holds no key", path.display())));
        }
    }
    if !args.models.is_empty() {
        config.models = args.models.iter().map(|model| named(model)).collect();
    }
    config.limits.max_requests = args.limits.max_requests;
    config.limits.max_requests_per_key = args.limits.max_requests;
    config.limits.request_timeout = Duration::from_secs(args.limits.request_timeout);
    config.limits.drain_grace = Duration::from_secs(args.limits.drain_grace);
    config.limits.max_body_bytes = args.limits.max_body;
    config.limits.max_connections = args.limits.max_connections;
    Ok(config)
}

/// `NAME=PATH`, or a path that gives its own name.
pub(super) fn named(model: &str) -> (String, PathBuf) {
    if model == BUILTIN_MODEL {
        return (BUILTIN_MODEL.to_owned(), PathBuf::from(BUILTIN_MODEL));
    }
    match model.split_once('=') {
        // A path may hold a '=' too; a name holds no separator.
        Some((name, path)) if !name.is_empty() && !name.contains(['/', '\\']) => {
            (name.to_owned(), PathBuf::from(path))
        }
        _ => {
            let path = Path::new(model);
            let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
            let name = stem.map_or(model.into(), |stem| stem.to_string_lossy());
            (name.into_owned(), path.to_path_buf())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn models_are_named_by_hand_or_by_their_file() {
        for (given, name, path) in [
            ("builtin", "builtin", "builtin"),
            ("models/a.b.gguf", "a.b", "models/a.b.gguf"),
            ("chat=models/a.gguf", "chat", "models/a.gguf"),
            ("chat=a=b.gguf", "chat", "a=b.gguf"),
            ("models/a=b.gguf", "a=b", "models/a=b.gguf"),
            ("=x.gguf", "=x", "=x.gguf"),
        ] {
            let (found, at) = named(given);
            assert_eq!((found.as_str(), at.to_str().unwrap()), (name, path));
        }
    }
}
