//! What a person sees of a run: a bar with loss, speed and time left, and what is said beside it.
//!
//! Where standard error is no terminal, a line now and then takes the place of the bar.

use std::time::{Duration, Instant};

use bitnet_training::recipe::Length;
use bitnet_training::run::{Event, Line, Start};
use indicatif::ProgressBar;

use crate::term::{Term, Unit, bytes, count, duration, printable, rate};

/// Parts of the bar: fine enough for any length.
const PARTS: u64 = 10_000;
/// How much the newest step changes the mean that is shown.
const NEW: f64 = 0.05;
/// Time between two lines where there is no bar.
const LINE_EVERY: Duration = Duration::from_secs(20);

/// The bar's label while a tokenizer is made.
const MAKING_TOKENIZER: &str = "tokenizer";

/// Shows a run.
pub(super) struct Watch<'a> {
    term: &'a Term,
    bar: Option<ProgressBar>,
    /// What the bar counts now.
    label: &'static str,
    last_line: Option<Instant>,
    loss: Option<f64>,
    speed: Option<f64>,
    begun: Option<(Instant, f64)>,
}

impl<'a> Watch<'a> {
    /// Nothing is shown yet.
    pub(super) fn new(term: &'a Term) -> Self {
        Self { term, bar: None, label: "", last_line: None, loss: None, speed: None, begun: None }
    }

    /// Shows an event.
    pub(super) fn hear(&mut self, event: &Event<'_>) {
        match event {
            Event::TrainingTokenizer(read) => {
                if self.label != MAKING_TOKENIZER {
                    self.say("making a tokenizer");
                }
                self.reading(MAKING_TOKENIZER, "words to count and merge", *read);
            }
            Event::TrainedTokenizer(made) => self.say(&format!(
                "made a tokenizer of {} tokens from {} of text",
                count(made.vocab_size as u64),
                bytes(made.text_bytes)
            )),
            Event::Tokenizing { name, bytes } => self.reading("tokenizing", name, *bytes),
            Event::Started(start) => self.started(start),
            Event::Stepped(line) => self.stepped(line),
            Event::Measuring { done, windows } => {
                let bar = self.bar("measuring", Unit::Items);
                bar.set_length(*windows as u64);
                bar.set_position(*done as u64);
            }
            Event::Measured(found) => self.say(&format!(
                "step {}: {:.4} bits per byte of held-out text",
                count(found.step),
                found.bits_per_byte
            )),
            Event::Sampled(sampled) => {
                self.say(&format!("> {}{}", sampled.prompt, sampled.text));
            }
            Event::Saved(path) => self.term.detail(&format!("saved {}", path.display())),
            Event::Exported(path) => self.term.detail(&format!("wrote {}", path.display())),
            _ => {}
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn reading(&mut self, label: &'static str, message: &str, read: u64) {
        let bar = self.bar(label, Unit::Bytes);
        bar.set_length(read);
        bar.set_position(read);
        bar.set_message(printable(message).into_owned());
    }

    fn started(&mut self, start: &Start) {
        let length = match start.length {
            Length::Steps(steps) => format!("{} steps", count(steps)),
            Length::Tokens(tokens) => format!("{} tokens", count(tokens)),
            Length::Time(time) => duration(time),
        };
        self.say(&format!(
            "{}: {} weights, {} of them ternary; {} tokens of text; {length}, {} × {} tokens a step{}",
            start.name,
            count(start.parameters as u64),
            count(start.ternary as u64),
            count(start.corpus_tokens),
            start.step.0,
            start.step.1,
            match start.steps_done {
                0 => String::new(),
                steps => format!("; going on after step {}", count(steps)),
            }
        ));
    }

    fn stepped(&mut self, line: &Line) {
        let mean =
            |old: Option<f64>, new: f64| Some(old.map_or(new, |old| old + NEW * (new - old)));
        self.loss = mean(self.loss, line.loss);
        self.speed = mean(self.speed, line.tokens_per_second);
        let (since, at) = *self.begun.get_or_insert((Instant::now(), line.progress));
        let done = line.progress - at;
        let left = match done > 0.0 {
            true => {
                let left = since.elapsed().as_secs_f64() * (1.0 - line.progress) / done;
                format!("  {} left", duration(Duration::from_secs_f64(left.min(1e9))))
            }
            false => String::new(),
        };
        let message = format!(
            "loss {:.3}  {} tok/s{left}",
            self.loss.unwrap_or(line.loss),
            rate(self.speed.unwrap_or(line.tokens_per_second))
        );
        let bar = self.bar("training", Unit::Items);
        bar.set_length(PARTS);
        bar.set_position((line.progress * PARTS as f64) as u64);
        bar.set_message(message.clone());
        let hidden = bar.is_hidden();
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY);
        if hidden && (due || line.progress >= 1.0) {
            self.last_line = Some(Instant::now());
            let percent = line.progress * 100.0;
            self.term.note(&format!("step {}  {percent:.1} %  {message}", count(line.step)));
        }
    }

    fn bar(&mut self, label: &'static str, unit: Unit) -> &ProgressBar {
        if self.label != label {
            self.finish();
            self.label = label;
        }
        self.bar.get_or_insert_with(|| self.term.bar(label, 0, unit))
    }

    fn say(&self, text: &str) {
        self.aside(|| self.term.note(text));
    }

    /// Writes beside the bar.
    fn aside(&self, write: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}
