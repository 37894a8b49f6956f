//! The tokens a sequence holds so far, with the counts the penalties need, kept up to date one
//! token at a time in both directions.

use std::collections::HashMap;

use crate::options::GenerationOptions;

/// Prompt and generated tokens; only as much as the options look at.
#[derive(Debug, Clone)]
pub(super) struct History {
    /// Prompt, then generated tokens; empty if no option looks back.
    tokens: Vec<u32>,
    n_generated: usize,
    /// Size of the repetition penalty's window; 0 if the penalty is off.
    window: usize,
    in_window: HashMap<u32, u32>,
    counts_generated: bool,
    generated: HashMap<u32, u32>,
    keeps_tokens: bool,
}

impl History {
    pub(super) fn new(options: &GenerationOptions, prompt: &[u32]) -> Self {
        let repetition = options.repetition_penalty != 1.0;
        let counts_generated = options.presence_penalty != 0.0 || options.frequency_penalty != 0.0;
        let mut history = Self {
            tokens: Vec::new(),
            n_generated: 0,
            window: if repetition { options.penalty_last_n as usize } else { 0 },
            in_window: HashMap::new(),
            counts_generated,
            generated: HashMap::new(),
            keeps_tokens: repetition || counts_generated || options.dry.is_some(),
        };
        if history.keeps_tokens {
            history.tokens = prompt.to_vec();
            for &token in &prompt[prompt.len().saturating_sub(history.window)..] {
                increment(&mut history.in_window, token);
            }
        }
        history
    }

    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn n_generated(&self) -> usize {
        self.n_generated
    }

    /// The distinct tokens in the repetition penalty's window.
    pub(super) fn in_window(&self) -> impl Iterator<Item = u32> {
        self.in_window.keys().copied()
    }

    /// The distinct generated tokens, with how often each occurs.
    pub(super) fn generated(&self) -> impl Iterator<Item = (u32, u32)> {
        self.generated.iter().map(|(&token, &count)| (token, count))
    }

    pub(super) fn push(&mut self, token: u32) {
        self.n_generated += 1;
        if !self.keeps_tokens {
            return;
        }
        if self.window > 0 {
            increment(&mut self.in_window, token);
            if let Some(leaving) = self.tokens.len().checked_sub(self.window) {
                decrement(&mut self.in_window, self.tokens[leaving]);
            }
        }
        if self.counts_generated {
            increment(&mut self.generated, token);
        }
        self.tokens.push(token);
    }

    pub(super) fn rollback(&mut self, n: usize) {
        for _ in 0..n.min(self.n_generated) {
            self.n_generated -= 1;
            let Some(token) = self.tokens.pop() else { continue };
            if self.window > 0 {
                decrement(&mut self.in_window, token);
                if let Some(returning) = self.tokens.len().checked_sub(self.window) {
                    increment(&mut self.in_window, self.tokens[returning]);
                }
            }
            if self.counts_generated {
                decrement(&mut self.generated, token);
            }
        }
    }
}

fn increment(counts: &mut HashMap<u32, u32>, token: u32) {
    *counts.entry(token).or_default() += 1;
}

fn decrement(counts: &mut HashMap<u32, u32>, token: u32) {
    if let Some(count) = counts.get_mut(&token) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&token);
        }
    }
}
