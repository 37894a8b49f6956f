//! A generation as it reaches a terminal: chunk by chunk, until it ends or Ctrl-C stops it.

use bitnet_inference::{Chunk, FinishReason, GeneratedToken, TokenStream, Usage};

use crate::interrupt::Interrupt;

/// What a generation gave, complete or not.
pub(crate) struct Answer {
    /// The text, without a stop string.
    pub(crate) text: String,
    /// Every token, the ending one included.
    pub(crate) tokens: Vec<GeneratedToken>,
    /// Why it ended; `None` if Ctrl-C stopped it.
    pub(crate) finish_reason: Option<FinishReason>,
    /// The stop string that ended it.
    pub(crate) stop_string: Option<String>,
    /// What it took so far.
    pub(crate) usage: Usage,
}

impl Answer {
    /// Whether Ctrl-C stopped it.
    pub(crate) fn interrupted(&self) -> bool {
        self.finish_reason.is_none()
    }

    /// Why it ended, in a word.
    pub(crate) fn ending(&self) -> &'static str {
        match self.finish_reason {
            Some(FinishReason::Stop) => "stop",
            Some(FinishReason::Length) => "length",
            None => "interrupted",
        }
    }
}

/// Follows `stream` to its end; `show` gets each chunk as it comes.
///
/// # Errors
/// The first error of the generation or of `show`.
pub(crate) fn follow(
    mut stream: TokenStream,
    interrupt: &Interrupt,
    mut show: impl FnMut(&Chunk) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    let caught = interrupt.catch();
    let (mut text, mut tokens) = (String::new(), Vec::new());
    while let Some(Some(chunk)) = caught.wait(stream.next_chunk()) {
        let chunk = chunk?;
        show(&chunk)?;
        text.push_str(&chunk.text);
        tokens.extend(chunk.token);
    }
    Ok(Answer {
        text,
        tokens,
        finish_reason: stream.outcome().map(|(reason, _)| reason),
        stop_string: stream.stop_string().map(str::to_owned),
        usage: stream.usage(),
    })
}
