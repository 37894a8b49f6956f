//! How a command ends: its exit code and, if it failed, the message a person reads.
//!
//! 0 done, 1 failed, 2 used wrongly (clap's own code for a wrong command line), 130 interrupted.

use std::io;
use std::process::ExitCode;

use crate::term::Term;

/// How a command ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It did what it was asked.
    Done,
    /// Ctrl-C stopped it.
    Interrupted,
}

/// What Unix shells report for a program that SIGINT ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// The command line was understood but cannot be meant: exit code 2.
#[derive(Debug)]
pub(crate) struct Usage(String);

impl Usage {
    /// A wrong use; the message says what was expected.
    pub(crate) fn error(message: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self(message.into()))
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Reports an error and returns the exit code.
pub(crate) fn code(result: anyhow::Result<Outcome>, term: &Term) -> ExitCode {
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            term.error(&message(&error));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// The chain of causes, without a cause that the next one begins with: "model PATH: PATH: cannot open".
fn message(error: &anyhow::Error) -> String {
    let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    let told = |i: usize| {
        let subject = causes[i].strip_prefix("model ").unwrap_or(&causes[i]);
        causes.get(i + 1).is_some_and(|next| next.starts_with(subject))
    };
    let parts: Vec<&str> =
        (0..causes.len()).filter(|&i| !told(i)).map(|i| causes[i].as_str()).collect();
    parts.join(": ")
}

/// Whether our reader has gone, as `head` does once it has its lines: nothing to complain about.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match cause.downcast_ref::<io::Error>() {
        Some(io) => io.kind() == io::ErrorKind::BrokenPipe,
        None => cause
            .downcast_ref::<serde_json::Error>()
            .is_some_and(|json| json.io_error_kind() == Some(io::ErrorKind::BrokenPipe)),
    })
}
