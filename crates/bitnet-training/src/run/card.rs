//! The model card: what was trained, on what, for how long, how well it does, and what it writes.
//!
//! Numbers come from the run; samples stand as they were drawn. No paths of the machine are in it.

use std::fmt::Write;
use std::path::Path;

use bitnet_quant::config::HiddenAct;
use sha2::{Digest, Sha256};

use super::{Measured, Sampled};
use crate::checkpoint::Position;
use crate::data::{Corpus, hex};
use crate::model::{Model, ParameterKind, Precision};
use crate::recipe::{Recipe, ScheduleName, TrainRecipe};

/// Everything a card tells.
pub(super) struct Facts<'a> {
    pub(super) name: &'a str,
    pub(super) recipe: &'a Recipe,
    pub(super) model: &'a Model,
    pub(super) position: &'a Position,
    pub(super) corpora: &'a [Corpus],
    /// Windows used of each corpus.
    pub(super) used: &'a [u64],
    pub(super) measured: Option<&'a Measured>,
    pub(super) eval_text: Option<&'a str>,
    pub(super) samples: &'a [Sampled],
    pub(super) has_plot: bool,
}

/// The card as Markdown.
pub(super) fn write(facts: &Facts<'_>) -> String {
    let mut card = String::new();
    // Writing to a String cannot fail.
    let _ = parts(facts, &mut card);
    card
}

fn parts(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    head(facts, card)?;
    shape(facts, card)?;
    training(facts, card)?;
    data(facts, card)?;
    quality(facts, card)?;
    samples(facts, card)?;
    use_it(facts, card)
}

fn head(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    writeln!(card, "---")?;
    if let Some(license) = &facts.recipe.license {
        writeln!(card, "license: {}", serde_json::json!(license))?;
    }
    let tags = match facts.model.precision() {
        Precision::Ternary => "bitnet, ternary",
        Precision::Float => "float",
    };
    writeln!(card, "pipeline_tag: text-generation\ntags: [{tags}]\n---\n")?;
    writeln!(card, "# {}\n", facts.name)?;
    if let Some(description) = &facts.recipe.description {
        writeln!(card, "{}\n", description.trim())?;
    }
    Ok(())
}

fn shape(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    let config = facts.model.config();
    let count = |wanted: ParameterKind| {
        let found = facts.model.named_parameters().filter(|(p, _)| p.kind == wanted);
        thousands(found.map(|(_, values)| values.len() as u64).sum())
    };
    let kind = match facts.model.precision() {
        Precision::Ternary => "ternary (−1, 0, +1), one scale a matrix; activations 8 bits a token",
        Precision::Float => "float",
    };
    let family = if config.sub_norms { "BitNet b1.58 (with sub-norms)" } else { "Llama" };
    let act = match config.hidden_act {
        HiddenAct::Relu2 => "relu²",
        HiddenAct::Silu => "SiLU",
    };
    let head = if config.tie_word_embeddings { "tied to the embedding" } else { "separate" };
    writeln!(card, "## Model\n\n| | |\n|---|---|")?;
    writeln!(card, "| architecture | {family}, {act}, head {head} |")?;
    writeln!(
        card,
        "| shape | {} layers, hidden {}, feed-forward {}, {} query and {} key/value heads of {} |",
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim
    )?;
    let all = facts.model.named_parameters().map(|(_, values)| values.len() as u64).sum();
    writeln!(card, "| parameters | {} |", thousands(all))?;
    writeln!(card, "| projections | {} weights, {kind} |", count(ParameterKind::Projection))?;
    writeln!(card, "| embedding and head | {} weights |", count(ParameterKind::Table))?;
    writeln!(card, "| norms | {} weights |", count(ParameterKind::Norm))?;
    writeln!(card, "| vocabulary | {} tokens |", thousands(config.vocab_size as u64))?;
    writeln!(
        card,
        "| context | {} tokens; trained with windows of {} |\n",
        config.max_position_embeddings, facts.recipe.train.window
    )
}

fn training(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    let (train, position) = (&facts.recipe.train, facts.position);
    writeln!(card, "## Training\n\n| | |\n|---|---|")?;
    if let Some(from) = &facts.recipe.from {
        writeln!(card, "| began with | {} |", file_name(from))?;
    }
    if let Some(distill) = &facts.recipe.distill {
        writeln!(
            card,
            "| taught by | {}; losses: tokens {}, its logits {} at temperature {}, relations {} |",
            file_name(&distill.teacher),
            distill.token,
            distill.logits,
            distill.temperature,
            distill.attention
        )?;
    }
    writeln!(card, "| tokens | {} |", thousands(position.tokens))?;
    writeln!(card, "| steps | {} |", thousands(position.step))?;
    writeln!(card, "| time | {} |", hours(position.seconds))?;
    writeln!(card, "| CPU threads | {} |", facts.recipe.options().threads)?;
    writeln!(
        card,
        "| batch | {} windows of {} tokens |",
        train.rows * train.accumulate,
        train.window
    )?;
    writeln!(card, "| learning rate | {} |", schedule(train))?;
    writeln!(
        card,
        "| optimizer | AdamW, betas {} and {}, epsilon {:e}, weight decay {}, gradients clipped at {} |",
        train.betas[0], train.betas[1], train.epsilon, train.weight_decay, train.clip
    )?;
    writeln!(card, "| seed | {} |", facts.recipe.seed)?;
    writeln!(card, "| made with | bitnet {} |\n", env!("CARGO_PKG_VERSION"))?;
    if facts.has_plot {
        writeln!(card, "![loss](loss.svg)\n")?;
    }
    Ok(())
}

/// How the rate changed, in words.
fn schedule(train: &TrainRecipe) -> String {
    let TrainRecipe { rate, switch, second_rate, .. } = *train;
    let shape = match train.schedule {
        ScheduleName::TwoStage => format!(
            "two-stage: a cosine from {rate:e}, from {} % on one from {:e} without weight decay",
            percent(switch),
            rate * second_rate
        ),
        ScheduleName::Trapezoid => {
            format!("trapezoid: {rate:e}, falling in a line from {} % on", percent(switch))
        }
        ScheduleName::Cosine => format!("a cosine from {rate:e}"),
    };
    format!(
        "{shape}; warm-up {} %, floor {} % of {rate:e}",
        percent(train.warmup),
        percent(train.floor)
    )
}

fn data(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    writeln!(card, "## Data\n")?;
    writeln!(card, "| file | bytes | text | documents | SHA-256 |\n|---|---|---|---|---|")?;
    let mut listed = Vec::new();
    for file in facts.corpora.iter().flat_map(|corpus| &corpus.windows.tokens().info().files) {
        if listed.contains(&file) {
            continue;
        }
        writeln!(
            card,
            "| {} | {} | {} | {} | `{}` |",
            file.name,
            thousands(file.file_bytes),
            thousands(file.text_bytes),
            thousands(file.documents),
            file.sha256
        )?;
        listed.push(file);
    }
    writeln!(card, "\n| corpus | tokens | seen |\n|---|---|---|")?;
    for (corpus, &used) in facts.corpora.iter().zip(facts.used) {
        let (tokens, windows) = (corpus.windows.tokens(), &corpus.windows);
        writeln!(
            card,
            "| {} | {} | {:.2} times |",
            tokens.name(),
            thousands(tokens.info().tokens),
            used as f64 / windows.per_epoch() as f64
        )?;
    }
    for (index, stage) in facts.recipe.stage.iter().enumerate() {
        let corpus = |corpus: &crate::recipe::CorpusRecipe| {
            let names: Vec<String> = corpus.files.iter().map(|file| file_name(file)).collect();
            format!("{} × {}", corpus.weight, names.join(" + "))
        };
        let mix: Vec<String> = stage.mix.iter().map(corpus).collect();
        write!(card, "{}", if index == 0 { "\nStages: " } else { "; " })?;
        write!(card, "to {} % {}", percent(stage.until), mix.join(", "))?;
    }
    writeln!(card, ".\n")
}

fn quality(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    let (Some(measured), Some(text)) = (facts.measured, facts.eval_text) else { return Ok(()) };
    let name = facts.recipe.eval.text.as_deref().map(file_name).unwrap_or_default();
    writeln!(card, "## Held-out text\n")?;
    writeln!(
        card,
        "**{:.3} bits a byte** ({:.3} nats a token) on `{name}`: {} bytes, SHA-256 `{}`, in windows of {} \
         tokens; all tokens but the first count, once. Measured by the engine.\n",
        measured.bits_per_byte,
        measured.nats_per_token,
        thousands(text.len() as u64),
        hex(&Sha256::digest(text.as_bytes())),
        measured.window,
    )
}

fn samples(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    if facts.samples.is_empty() {
        return Ok(());
    }
    writeln!(
        card,
        "## Samples\n\nUnedited, the first drawn, at temperature {} with seed {}. The prompt is in bold.\n",
        facts.recipe.samples.temperature, facts.recipe.seed
    )?;
    for sample in facts.samples {
        // A quotation: what a model writes must not become headings or lists of the card.
        let text = format!("**{}**{}", escape(&sample.prompt), escape(&sample.text));
        for line in text.lines() {
            writeln!(card, "> {line}  ")?;
        }
        writeln!(card)?;
    }
    Ok(())
}

fn use_it(facts: &Facts<'_>, card: &mut String) -> std::fmt::Result {
    let prompt = facts.samples.first().map_or("Once upon a time", |sample| &sample.prompt);
    let prompt = prompt.replace(['"', '\\', '$', '`', '\n'], " ");
    writeln!(card, "## Use\n\n```console\n$ bitnet run --model . \"{prompt}\"\n```")
}

/// Text that Markdown shows as it is.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if "\\`*_{}[]<>#|~".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn percent(share: f64) -> f64 {
    (share * 1000.0).round() / 10.0
}

fn hours(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} seconds"),
        s if s < 7200.0 => format!("{:.1} minutes", s / 60.0),
        s => format!("{:.1} hours", s / 3600.0),
    }
}

/// `1234567` as `1,234,567`.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
