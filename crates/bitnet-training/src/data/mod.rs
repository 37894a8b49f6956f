//! From files of text to batches of token windows.
//!
//! ```text
//! files ── text ──▶ pieces and chats ── tokens ──▶ token file ── windows ──▶ shuffled windows
//!                                                                                  │ mixture
//!                                                                               batches
//! ```
//!
//! A corpus is tokenized once, into a file beside the run, and read from there as it is needed:
//! memory does not grow with the text. Everything that follows from the seed is computed from it and
//! from a counter, so that a resumed run sees the windows an uninterrupted one would have seen.
//!
//! Knows tokenizers and chat templates; knows no model.

mod mixture;
mod shuffle;
mod text;
mod tokens;
mod windows;

pub use mixture::{Corpus, Mixture, MixtureState, Share, Stage};
pub(crate) use text::hex;
pub use text::{DocumentReader, Item, Seen, open_text};
pub use tokens::{Encoder, FileInfo, Tokens, TokensInfo};
pub use windows::Windows;
