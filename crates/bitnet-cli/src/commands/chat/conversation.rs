//! What was said, and the prompt it makes.
//!
//! The model's own chat template decides the prompt. A model without one gets plain text,
//! `User: …` and `Assistant: …` by turns, which base models continue tolerably.

use std::path::Path;

use anyhow::Context;
use bitnet_inference::{ChatOptions, InferenceInput, Message, Model};
use serde::{Deserialize, Serialize};

/// A conversation with a model.
pub(crate) struct Conversation {
    model: Model,
    system: Option<String>,
    /// Users and assistant by turns, a user first.
    turns: Vec<Message>,
    /// Turns at the front that the context no longer holds.
    n_forgotten: usize,
}

/// The file that `/save` writes.
#[derive(Serialize, Deserialize)]
struct Saved {
    model: String,
    messages: Vec<Message>,
}

const SYSTEM: &str = "system";
const USER: &str = "user";
const ASSISTANT: &str = "assistant";

const NO_TEMPLATE: &str =
    "this model has no chat template: it sees plain 'User: … Assistant: …' text";

impl Conversation {
    /// An empty one.
    pub(crate) fn new(model: &Model, system: Option<String>) -> Self {
        Self { model: model.clone(), system, turns: Vec::new(), n_forgotten: 0 }
    }

    /// What the user should know about the format.
    pub(crate) fn note(&self) -> Option<&'static str> {
        (!self.model.has_chat_template()).then_some(NO_TEMPLATE)
    }

    /// Texts that end an answer, where no control token of a template does.
    pub(crate) fn stop_strings(&self) -> Vec<String> {
        match self.model.has_chat_template() {
            true => Vec::new(),
            false => vec!["\nUser:".into()],
        }
    }

    /// Adds what the user says.
    pub(crate) fn ask(&mut self, text: &str) {
        self.turns.push(Message::user(text));
    }

    /// Adds what the model answered.
    pub(crate) fn answer(&mut self, text: &str) {
        self.turns.push(Message::assistant(text.trim()));
    }

    /// Takes back the last turn if it is a question that has no answer.
    pub(crate) fn take_back_question(&mut self) -> Option<String> {
        self.turns.pop_if(|turn| turn.role == USER).map(|turn| turn.content)
    }

    /// Takes back the last turn if it is an answer.
    pub(crate) fn take_back_answer(&mut self) -> Option<String> {
        self.turns.pop_if(|turn| turn.role == ASSISTANT).map(|turn| turn.content)
    }

    /// Forgets what was said; the instructions stay.
    pub(crate) fn clear(&mut self) {
        self.turns.clear();
        self.n_forgotten = 0;
    }

    /// The instructions before the conversation.
    pub(crate) fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Changes the instructions; `None` removes them.
    pub(crate) fn set_system(&mut self, text: Option<String>) {
        self.system = text;
    }

    /// Answers so far.
    pub(crate) fn n_exchanges(&self) -> usize {
        self.turns.len() / 2
    }

    /// The prompt for the next answer. Nothing that was said can pose as a control token in it.
    ///
    /// # Errors
    /// A template that refuses the conversation, a model without a tokenizer.
    pub(crate) fn prompt(&self) -> anyhow::Result<InferenceInput> {
        let system = self.system.iter().map(Message::system);
        let turns = self.turns[self.n_forgotten.min(self.turns.len())..].iter().cloned();
        let messages: Vec<_> = system.chain(turns).collect();
        Ok(self.model.chat_prompt(&messages, &ChatOptions::default())?)
    }

    /// The prompt, with `room` positions left for the answer: forgets the oldest exchanges until
    /// they fit. Also returns how many were forgotten now.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub(crate) fn fit(&mut self, room: usize) -> anyhow::Result<(InferenceInput, usize)> {
        let context = self.model.context_length();
        let mut forgotten = 0;
        loop {
            let prompt = self.prompt()?;
            let n_tokens = prompt.tokens(&self.model)?.len();
            // The last question must stay; if it alone is too long, the engine says so.
            let may_forget = self.n_forgotten + 2 < self.turns.len();
            if n_tokens + room <= context || !may_forget {
                return Ok((prompt, forgotten));
            }
            self.n_forgotten += 2;
            forgotten += 1;
        }
    }

    /// Writes the conversation as JSON.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let system = self.system.iter().map(Message::system);
        let messages = system.chain(self.turns.iter().cloned()).collect();
        let saved = Saved { model: self.model.get_model_id().to_owned(), messages };
        let json = serde_json::to_string_pretty(&saved)? + "\n";
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Replaces the conversation by one that was saved.
    ///
    /// # Errors
    /// A file that cannot be read or is no conversation.
    pub(crate) fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let json = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let saved: Saved = serde_json::from_str(&json)
            .with_context(|| format!("{}: expected a saved conversation", path.display()))?;
        let mut turns = saved.messages;
        let system = match turns.first() {
            Some(turn) if turn.role == SYSTEM => Some(turns.remove(0).content),
            _ => None,
        };
        let roles = [USER, ASSISTANT].into_iter().cycle();
        let by_turns = turns.iter().zip(roles).all(|(turn, role)| turn.role == role);
        anyhow::ensure!(
            by_turns && turns.len().is_multiple_of(2),
            "{}: expected user and assistant messages by turns, ending with the assistant",
            path.display()
        );
        (self.system, self.turns, self.n_forgotten) = (system, turns, 0);
        Ok(())
    }
}
