//! Reads what the user types: line editing, history, completion of commands, several lines.
//!
//! A line that ends with `\` goes on in the next one; `"""` begins and ends a text of many lines.
//! Where standard input is no terminal, lines are read as they come and nothing is prompted for.

use std::borrow::Cow;
use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Context, Helper};

use super::slash::COMMANDS;

/// Lines kept in the history file.
const HISTORY_LINES: usize = 1000;

/// What came from the keyboard.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// A line that begins with `/`.
    Command(String),
    /// Something to say to the model, of one or several lines.
    Text(String),
    /// Ctrl-C: nothing, after all.
    Cancelled,
    /// Ctrl-D, or the end of the input.
    End,
}

/// The line editor and its history.
pub(crate) struct Editor {
    lines: rustyline::Editor<Commands, FileHistory>,
    history: Option<PathBuf>,
}

impl Editor {
    /// An editor that shows its prompt in colour where `color` is set.
    ///
    /// # Errors
    /// A terminal that cannot be used.
    pub(crate) fn new(with_history: bool, color: bool) -> anyhow::Result<Self> {
        let config = Config::builder().max_history_size(HISTORY_LINES)?.build();
        let mut lines = rustyline::Editor::with_config(config)?;
        lines.set_helper(Some(Commands { color }));
        let history = if with_history { history_file() } else { None };
        if let Some(path) = &history {
            // The first chat has no history yet; a damaged one must not prevent a chat.
            let _ = lines.load_history(path);
        }
        Ok(Self { lines, history })
    }

    /// Waits for the next input.
    ///
    /// # Errors
    /// A terminal that fails.
    pub(crate) fn read(&mut self) -> anyhow::Result<Typed> {
        let lines = &mut self.lines;
        let typed = assemble(|prompt| match lines.readline(prompt) {
            Ok(line) => Ok(Line::Text(line)),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(ReadlineError::Interrupted) => Ok(Line::Cancelled),
            Err(error) => Err(error.into()),
        })?;
        if let Typed::Command(text) | Typed::Text(text) = &typed {
            self.lines.add_history_entry(text)?;
        }
        Ok(typed)
    }

    /// Writes the history, where one is kept.
    pub(crate) fn save_history(&mut self) -> anyhow::Result<()> {
        let Some(path) = &self.history else { return Ok(()) };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        Ok(self.lines.save_history(path)?)
    }
}

/// One line, or why there is none.
enum Line {
    Text(String),
    Cancelled,
    End,
}

/// Puts lines together into one input. `read` gets the prompt to show.
fn assemble(mut read: impl FnMut(&str) -> anyhow::Result<Line>) -> anyhow::Result<Typed> {
    const FENCE: &str = "\"\"\"";
    let mut text = String::new();
    let mut fenced = false;
    loop {
        let first = text.is_empty() && !fenced;
        let line = match read(if first { "> " } else { "… " })? {
            Line::Text(line) => line,
            Line::Cancelled => return Ok(Typed::Cancelled),
            Line::End if first => return Ok(Typed::End),
            Line::End => return Ok(Typed::Text(text.trim_end().to_owned())),
        };
        let mut line = line.as_str();
        if first {
            if line.trim().is_empty() {
                continue;
            }
            if line.starts_with('/') {
                return Ok(Typed::Command(line.to_owned()));
            }
            if let Some(rest) = line.trim_start().strip_prefix(FENCE) {
                fenced = true;
                line = rest;
            }
        }
        if fenced {
            if let Some(rest) = line.trim_end().strip_suffix(FENCE) {
                text.push_str(rest);
                return Ok(Typed::Text(text.trim_matches('\n').to_owned()));
            }
        } else {
            match line.strip_suffix('\\') {
                Some(rest) => line = rest,
                None => {
                    text.push_str(line);
                    return Ok(Typed::Text(text));
                }
            }
        }
        text.push_str(line);
        text.push('\n');
    }
}

/// Where the history lives: the user's state folder.
fn history_file() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let state = match cfg!(windows) {
        true => folder("LOCALAPPDATA"),
        false => {
            folder("XDG_STATE_HOME").or_else(|| folder("HOME").map(|h| h.join(".local/state")))
        }
    };
    Some(state?.join("bitnet").join("chat_history"))
}

/// Completes the names of commands.
struct Commands {
    color: bool,
}

impl Helper for Commands {}

impl Validator for Commands {}

impl Hinter for Commands {
    type Hint = String;
}

impl Completer for Commands {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..position];
        let names = COMMANDS.iter().map(|(name, ..)| *name);
        let matching = names.filter(|name| !typed.is_empty() && name.starts_with(typed));
        Ok((0, matching.map(str::to_owned).collect()))
    }
}

impl Highlighter for Commands {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        match self.color {
            true => format!("\x1b[1;36m{prompt}\x1b[0m").into(),
            false => prompt.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(lines: &[&str]) -> Typed {
        let mut lines = lines.iter();
        let read = |_: &str| {
            Ok(lines.next().map_or(Line::End, |line| match *line {
                "^C" => Line::Cancelled,
                line => Line::Text(line.to_owned()),
            }))
        };
        assemble(read).unwrap()
    }

    fn text(text: &str) -> Typed {
        Typed::Text(text.to_owned())
    }

    #[test]
    fn one_line_or_several() {
        assert_eq!(typed(&["", "  ", "hello"]), text("hello"));
        assert_eq!(typed(&["one\\", "two"]), text("one\ntwo"));
        assert_eq!(typed(&["\"\"\"", "one", "", "two", "\"\"\""]), text("one\n\ntwo"));
        assert_eq!(typed(&["\"\"\"one", "/two\"\"\""]), text("one\n/two"));
        assert_eq!(typed(&["\"\"\"all\"\"\""]), text("all"));
    }

    #[test]
    fn commands_stand_alone() {
        assert_eq!(typed(&["/help"]), Typed::Command("/help".into()));
        assert_eq!(typed(&["a\\", "/help"]), text("a\n/help"));
    }

    #[test]
    fn cancelled_and_ended() {
        assert_eq!(typed(&[]), Typed::End);
        assert_eq!(typed(&["one\\", "^C", "two"]), Typed::Cancelled);
        assert_eq!(typed(&["one\\"]), text("one"));
    }
}
