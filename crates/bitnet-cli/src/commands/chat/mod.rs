//! `bitnet chat`: a conversation at the terminal.
//!
//! `conversation` holds what was said and turns it into a prompt; `editor` reads what the user
//! types; `slash` understands the commands that begin with `/`.

pub(crate) mod conversation;
mod editor;
mod session;
mod slash;

use std::path::PathBuf;

use bitnet_inference::GenerationOptions;
use clap::Args;

use crate::exit::Outcome;
use crate::flags::{DraftArg, EngineArgs, ModelArg, SamplingArgs};
use crate::interrupt::Interrupt;
use crate::term::Term;
use conversation::Conversation;
use session::Session;

const EXAMPLES: &str = "\
Examples:
  bitnet chat -m model.gguf
  bitnet chat -m model/ --system \"Answer in one sentence.\" --temperature 0.3
  bitnet chat -m model.gguf --load talk.json

-n is 1024 unless given. In a chat: /help lists the commands; a trailing \\ or \"\"\" continues on the next line; Ctrl-C stops an
answer; Ctrl-D leaves. A model without a chat template gets a plain 'User: … Assistant: …' text.";

/// Tokens of an answer unless -n says otherwise.
const DEFAULT_MAX_TOKENS: u32 = 1024;

/// Arguments of `bitnet chat`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Instructions before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Go on with a conversation that /save wrote
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Neither read nor write the history of typed lines
    #[arg(long)]
    no_history: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    draft: DraftArg,
}

/// Loads the model and talks until the user leaves.
pub(crate) fn run(args: ChatArgs, term: &Term) -> anyhow::Result<Outcome> {
    let base = GenerationOptions::default().max_tokens(DEFAULT_MAX_TOKENS);
    let options = args.sampling.options(base)?;
    let interrupt = Interrupt::install()?;
    let (engine, model) = args.draft.load(&args.engine, &args.model.model, term)?;
    let mut conversation = Conversation::new(&model, args.system);
    if let Some(path) = &args.load {
        conversation.load(path)?;
    }
    if let Some(note) = conversation.note() {
        term.note(note);
    }
    term.note(&format!("{} · /help lists the commands, Ctrl-D leaves", model.get_model_id()));
    let (interrupt, warned) = (&interrupt, model.warnings().len());
    Session {
        engine,
        model,
        conversation,
        options,
        interrupt,
        term,
        usage: None,
        warned,
        failed: false,
    }
    .talk(args.no_history)?;
    Ok(Outcome::Done)
}
