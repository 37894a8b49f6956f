//! The loop of a chat: read, answer or obey, until the user leaves.

use std::io::{self, IsTerminal, Write};

use bitnet_inference::{GenerationOptions, InferenceEngine, Model, Usage};
use serde_json::Value;

use super::conversation::Conversation;
use super::editor::{Editor, Typed};
use super::slash::{self, COMMANDS, Slash};
use crate::answer;
use crate::interrupt::Interrupt;
use crate::report;
use crate::term::{Style, Term, count, counted, printable};

/// A chat in progress.
pub(crate) struct Session<'a> {
    pub(crate) engine: InferenceEngine,
    pub(crate) model: Model,
    pub(crate) conversation: Conversation,
    pub(crate) options: GenerationOptions,
    pub(crate) interrupt: &'a Interrupt,
    pub(crate) term: &'a Term,
    /// What the last answer took.
    pub(crate) usage: Option<Usage>,
    /// Warnings of the model that were shown.
    pub(crate) warned: usize,
    /// Whether an answer failed.
    pub(crate) failed: bool,
}

/// Whether the chat goes on.
#[derive(PartialEq)]
enum Next {
    Stay,
    Leave,
}

impl Session<'_> {
    /// Talks until Ctrl-D or `/exit`. A failed answer ends the answer, not the chat.
    ///
    /// # Errors
    /// A terminal or an output that fails; at the end, an answer that failed where nobody watched.
    pub(crate) fn talk(&mut self, without_history: bool) -> anyhow::Result<()> {
        let mut editor = Editor::new(!without_history, self.term.has_color())?;
        loop {
            let next = match editor.read()? {
                Typed::End => Next::Leave,
                Typed::Cancelled => {
                    self.term.note("Ctrl-D or /exit leaves");
                    Next::Stay
                }
                Typed::Text(text) => {
                    self.conversation.ask(&text);
                    self.answer()?;
                    Next::Stay
                }
                Typed::Command(line) => match slash::parse(&line) {
                    Ok(command) => self.obey(command)?,
                    Err(expected) => {
                        self.term.error(&expected);
                        Next::Stay
                    }
                },
            };
            if next == Next::Leave {
                break;
            }
        }
        if let Err(error) = editor.save_history() {
            self.term.warn(&format!("the history was not saved: {error}"));
        }
        anyhow::ensure!(
            !self.failed || io::stdin().is_terminal(),
            "not every question was answered"
        );
        Ok(())
    }

    /// Answers the last question. If that fails, the question is taken back.
    fn answer(&mut self) -> anyhow::Result<()> {
        match self.generate() {
            Ok(text) => self.conversation.answer(&text),
            Err(error) if error.is::<io::Error>() => return Err(error),
            Err(error) => {
                self.conversation.take_back_question();
                self.failed = true;
                self.term.error(&format!("{error:#}"));
            }
        }
        Ok(())
    }

    fn generate(&mut self) -> anyhow::Result<String> {
        let context = self.model.context_length();
        let wanted = self.options.max_tokens.map_or(usize::MAX, |n| n as usize);
        let (input, forgotten) = self.conversation.fit(wanted.min(context / 4))?;
        if forgotten > 0 {
            let note = "the context is full: the oldest exchanges are no longer seen by the model";
            self.term.note(&format!("{note} ({forgotten} left out now)"));
        }
        let mut options = self.options.clone();
        options.stop.extend(self.conversation.stop_strings());
        let stream = self.engine.stream(&self.model, input, &options)?;

        let mut out = io::stdout().lock();
        let terminal = out.is_terminal();
        let mut begun = false;
        let answer = answer::follow(stream, self.interrupt, |chunk| {
            let text = if begun { &chunk.text } else { chunk.text.trim_start() };
            begun |= !text.is_empty();
            let text = if terminal { printable(text) } else { text.into() };
            out.write_all(text.as_bytes())?;
            Ok(out.flush()?)
        })?;
        // On a terminal an empty line sets the next question apart.
        out.write_all(if terminal { b"\n\n" } else { b"\n" })?;
        out.flush()?;
        drop(out);
        if answer.interrupted() {
            self.term.note("(stopped)");
        } else if answer.ending() == "length" {
            self.term.note("(cut at the length limit; /set max_tokens N changes it)");
        }
        self.warned = report::moved(&self.model, self.warned, self.term);
        self.term.detail(&report::usage_line(&answer.usage));
        self.usage = Some(answer.usage);
        Ok(answer.text)
    }

    fn obey(&mut self, command: Slash) -> anyhow::Result<Next> {
        match command {
            Slash::Help => {
                for (name, argument, meaning) in COMMANDS {
                    let usage = self.term.out(Style::Label, format!("{name:12} {argument:13}"));
                    self.print(&format!("{usage} {meaning}"))?;
                }
                self.print(
                    "A trailing \\ continues on the next line; \"\"\" begins and ends many lines.",
                )?;
            }
            Slash::System(None) => match self.conversation.system() {
                Some(text) => self.print(&printable(text))?,
                None => self.term.note("no instructions; /system TEXT sets them"),
            },
            Slash::System(Some(text)) => {
                self.conversation.set_system((!text.is_empty()).then_some(text));
            }
            Slash::Clear => self.conversation.clear(),
            Slash::Regenerate => self.regenerate()?,
            Slash::Save(path) => match self.conversation.save(&path) {
                Ok(()) => self.term.note(&format!("saved to {}", path.display())),
                Err(error) => self.term.error(&format!("{error:#}")),
            },
            Slash::Load(path) => match self.conversation.load(&path) {
                Ok(()) => {
                    let n = self.conversation.n_exchanges() as u64;
                    self.term.note(&format!("{} loaded", counted(n, "exchange")));
                }
                Err(error) => self.term.error(&format!("{error:#}")),
            },
            Slash::Set(None) => {
                self.print(&serde_json::to_string_pretty(&self.options)?)?;
            }
            Slash::Set(Some((name, value))) => match set(&self.options, &name, &value) {
                Ok(options) => self.options = options,
                Err(error) => self.term.error(&error),
            },
            Slash::Stats => self.stats()?,
            Slash::Exit => return Ok(Next::Leave),
        }
        Ok(Next::Stay)
    }

    /// Answers the last question again, with another seed where one is set: the same seed would
    /// give the same answer.
    fn regenerate(&mut self) -> anyhow::Result<()> {
        let Some(previous) = self.conversation.take_back_answer() else {
            self.term.error("there is no answer yet");
            return Ok(());
        };
        let seed = self.options.seed;
        self.options.seed = seed.map(|seed| seed.wrapping_add(1));
        match self.generate() {
            Ok(text) => self.conversation.answer(&text),
            Err(error) => {
                self.options.seed = seed;
                self.conversation.answer(&previous);
                if error.is::<io::Error>() {
                    return Err(error);
                }
                self.term.error(&format!("{error:#}"));
            }
        }
        Ok(())
    }

    fn stats(&self) -> anyhow::Result<()> {
        let Some(usage) = &self.usage else {
            self.term.note("nothing was generated yet");
            return Ok(());
        };
        self.print(&format!("last answer: {}", report::usage_line(usage)))?;
        let used = usage.prompt_tokens + usage.completion_tokens;
        let (used, context) = (count(used as u64), count(self.model.context_length() as u64));
        self.print(&format!("context: {used} of {context} tokens"))?;
        let device = self.model.device();
        self.print(&format!(
            "{} on {}, {}",
            self.model.get_model_id(),
            device.name,
            report::kernel(device)
        ))
    }

    fn print(&self, line: &str) -> anyhow::Result<()> {
        Ok(writeln!(io::stdout().lock(), "{line}")?)
    }
}

/// `options` with one of them changed; names and values are those of its JSON form.
fn set(options: &GenerationOptions, name: &str, value: &str) -> Result<GenerationOptions, String> {
    let mut all = serde_json::to_value(options).map_err(|error| error.to_string())?;
    let fields = all.as_object_mut().ok_or("options are not an object")?;
    if !fields.contains_key(name) {
        let names: Vec<_> = fields.keys().map(String::as_str).collect();
        return Err(format!("unknown option {name}; expected one of {}", names.join(", ")));
    }
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    fields.insert(name.to_owned(), value);
    let changed: GenerationOptions =
        serde_json::from_value(all).map_err(|error| format!("{name}: {error}"))?;
    changed.validate().map_err(|error| error.to_string())?;
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_set_by_name_and_checked() {
        let options = GenerationOptions::default();
        assert_eq!(set(&options, "temperature", "0.25").unwrap().temperature, 0.25);
        assert_eq!(set(&options, "seed", "7").unwrap().seed, Some(7));
        assert_eq!(set(&options, "stop", r#"["END"]"#).unwrap().stop, ["END"]);
        assert_eq!(set(&options.clone().seed(3), "seed", "null").unwrap().seed, None);
        for (name, value, expected) in [
            ("temprature", "1", "expected one of"),
            ("temperature", "hot", "temperature"),
            ("top_p", "2", "top_p"),
        ] {
            assert!(set(&options, name, value).unwrap_err().contains(expected), "{name}");
        }
    }
}
