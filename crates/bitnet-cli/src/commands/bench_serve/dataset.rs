//! What is asked: random words of a chosen number, or prompts from a file. Request `i` of a seed is
//! always the same.

use std::path::Path;

use anyhow::Context;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::Endpoint;

/// Common words, so that tokenizers give each about one token.
const WORDS: [&str; 64] = [
    "the", "time", "river", "house", "people", "water", "light", "small", "green", "under",
    "story", "morning", "garden", "mother", "stone", "winter", "bird", "road", "night", "fire",
    "paper", "window", "summer", "mountain", "letter", "table", "bread", "children", "silver",
    "forest", "sea", "horse", "city", "music", "door", "cloud", "field", "friend", "market",
    "boat", "colour", "voice", "hand", "tree", "island", "clock", "rain", "ship", "bridge",
    "apple", "gold", "wind", "star", "song", "wheel", "king", "school", "village", "snow", "lamp",
    "glass", "wood", "dream", "north",
];

/// What all requests have in common.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) model: String,
    pub(crate) endpoint: Endpoint,
    pub(crate) words: usize,
    pub(crate) shared_words: usize,
    pub(crate) tokens: u32,
    pub(crate) spread: f64,
    pub(crate) may_stop: bool,
    pub(crate) temperature: Option<f64>,
    pub(crate) seed: u64,
}

/// A source of requests.
#[derive(Debug)]
pub(crate) struct Dataset {
    pub(crate) shape: Shape,
    prefix: String,
    rows: Vec<Row>,
}

/// A line of a file.
#[derive(Debug, Deserialize)]
struct Row {
    prompt: Option<String>,
    messages: Option<Value>,
    max_tokens: Option<u32>,
}

impl Dataset {
    /// Random words.
    pub(crate) fn synthetic(shape: Shape) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(shape.seed);
        let mut prefix = words(&mut rng, shape.shared_words);
        if !prefix.is_empty() {
            prefix.push(' ');
        }
        Self { shape, prefix, rows: Vec::new() }
    }

    /// The prompts of a file.
    ///
    /// # Errors
    /// A file that cannot be read; a line that is no such object; no line at all.
    pub(crate) fn read(path: &Path, shape: Shape) -> anyhow::Result<Self> {
        let text = crate::files::read_text(path)?;
        let mut rows = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = || format!("{}, line {}", path.display(), i + 1);
            let row: Row = serde_json::from_str(line).with_context(place)?;
            match (&row.prompt, &row.messages, shape.endpoint) {
                (Some(_), None, _) | (None, Some(_), Endpoint::Chat) => rows.push(row),
                (None, Some(_), Endpoint::Completions) => {
                    anyhow::bail!("{}: `messages` need --endpoint chat", place())
                }
                _ => anyhow::bail!("{}: expected one of `prompt` and `messages`", place()),
            }
        }
        anyhow::ensure!(!rows.is_empty(), "{} holds no prompt", path.display());
        Ok(Self { shape, prefix: String::new(), rows })
    }

    /// Prompts of the file; `None` for random words.
    pub(crate) fn n_rows(&self) -> Option<usize> {
        (!self.rows.is_empty()).then_some(self.rows.len())
    }

    /// The body of request `i`; files begin anew after their last line.
    pub(crate) fn body(&self, i: usize) -> String {
        let shape = &self.shape;
        let mut rng = ChaCha8Rng::seed_from_u64(shape.seed);
        rng.set_stream(i as u64 + 1);
        let tokens = spread(&mut rng, f64::from(shape.tokens), shape.spread) as u32;
        let mut body = json!({
            "model": shape.model,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let (content, max_tokens) = match self.rows.get(i % self.rows.len().max(1)) {
            Some(row) => match &row.messages {
                Some(messages) => (Err(messages), row.max_tokens.unwrap_or(tokens)),
                None => {
                    (Ok(row.prompt.clone().unwrap_or_default()), row.max_tokens.unwrap_or(tokens))
                }
            },
            None => {
                let n = spread(&mut rng, shape.words as f64, shape.spread) as usize;
                (Ok(format!("{}{}", self.prefix, words(&mut rng, n))), tokens)
            }
        };
        match (content, shape.endpoint) {
            (Err(messages), _) => body["messages"] = messages.clone(),
            (Ok(text), Endpoint::Chat) => {
                body["messages"] = json!([{"role": "user", "content": text}])
            }
            (Ok(text), Endpoint::Completions) => body["prompt"] = text.into(),
        }
        body["max_tokens"] = max_tokens.into();
        if !shape.may_stop {
            body["ignore_eos"] = true.into();
        }
        if let Some(temperature) = shape.temperature {
            body["temperature"] = temperature.into();
        }
        body.to_string()
    }
}

fn words(rng: &mut ChaCha8Rng, n: usize) -> String {
    let word = |_| WORDS[(rng.next_u32() >> 26) as usize];
    (0..n).map(word).collect::<Vec<_>>().join(" ")
}

/// A number from `n · (1 - spread)` to `n · (1 + spread)`, at least 1.
fn spread(rng: &mut ChaCha8Rng, n: f64, spread: f64) -> f64 {
    (n * (1.0 + spread * (2.0 * uniform(rng) - 1.0))).round().max(1.0)
}

/// A number in `[0, 1)`.
pub(crate) fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(endpoint: Endpoint) -> Shape {
        Shape {
            model: "m".into(),
            endpoint,
            words: 20,
            shared_words: 3,
            tokens: 10,
            spread: 0.5,
            may_stop: false,
            temperature: None,
            seed: 7,
        }
    }

    #[test]
    fn requests_differ_but_share_their_prefix_and_stay_the_same() {
        let dataset = Dataset::synthetic(shape(Endpoint::Completions));
        let prompt = |i: usize| {
            let body: Value = serde_json::from_str(&dataset.body(i)).unwrap();
            assert!((5..=15).contains(&body["max_tokens"].as_u64().unwrap()));
            body["prompt"].as_str().unwrap().to_owned()
        };
        let first = |text: &str| text.split(' ').take(3).map(str::to_owned).collect::<Vec<_>>();
        assert_ne!(prompt(0), prompt(1));
        assert_eq!(first(&prompt(0)), first(&prompt(1)));
        assert_eq!(prompt(0), prompt(0));
        let lengths: Vec<_> = (0..200).map(|i| prompt(i).split(' ').count() - 3).collect();
        assert!(lengths.iter().all(|n| (10..=30).contains(n)));
        assert!(lengths.contains(&10) && lengths.contains(&30), "both ends are reached");
    }

    #[test]
    fn files_are_read_line_by_line_and_begin_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"b\"}], \"max_tokens\": 3}";
        std::fs::write(&path, format!("{{\"prompt\": \"a\"}}\n\n{row}\n")).unwrap();
        let dataset = Dataset::read(&path, shape(Endpoint::Chat)).unwrap();
        let content = |i| {
            let body: Value = serde_json::from_str(&dataset.body(i)).unwrap();
            body["messages"][0]["content"].as_str().unwrap().to_owned()
        };
        assert_eq!([content(0), content(1), content(2)], ["a", "b", "a"]);
        assert!(dataset.body(1).contains("\"max_tokens\":3"));
        for (text, part) in [("", "no prompt"), ("{}", "expected one of"), ("[", "line 1")] {
            std::fs::write(&path, text).unwrap();
            let error = Dataset::read(&path, shape(Endpoint::Chat)).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
        std::fs::write(&path, row).unwrap();
        assert!(Dataset::read(&path, shape(Endpoint::Completions)).is_err());
    }
}
