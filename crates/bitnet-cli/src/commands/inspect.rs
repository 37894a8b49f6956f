//! `bitnet inspect`: what a model file is, without running it.

mod metadata;

use std::collections::BTreeMap;
use std::io::{self, Write};

use bitnet_quant::checkpoint::{Checkpoint, TensorEntry};
use bitnet_quant::config::{HiddenAct, ModelConfig, RopeScaling};
use bitnet_quant::gguf::GgufFile;
use bitnet_quant::text::{TextAssets, TokenizerSource};
use clap::Args;
use serde_json::{Value, json};

use crate::exit::{Outcome, Usage};
use crate::files::InputArgs;
use crate::term::{Style, Term, bytes, count, counted, printable};

const EXAMPLES: &str = "\
Examples:
  bitnet inspect builtin
  bitnet inspect model.gguf --tensors
  bitnet inspect model.gguf --metadata
  bitnet inspect model/ --json | jq .config.num_hidden_layers

Nothing is computed and no weight is decoded, so that a file of any size is shown at once.";

/// Longest part of a chat template shown without --json.
const TEMPLATE_SHOWN: usize = 400;

/// Arguments of `bitnet inspect`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    input: InputArgs,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// List every metadata key of a GGUF file
    #[arg(long)]
    metadata: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Opens the files and prints what they say.
pub(crate) fn run(args: InspectArgs, term: &Term) -> anyhow::Result<Outcome> {
    let checkpoint = args.input.open()?;
    let file = match args.metadata {
        true => match checkpoint.gguf()? {
            None => return Err(Usage::error("--metadata belongs to GGUF files")),
            file => file,
        },
        false => None,
    };
    let mut out = io::stdout().lock();
    if args.json {
        let mut all = as_json(&checkpoint, args.tensors);
        if let Some(file) = &file {
            let key = |(key, value): &(String, _)| (key.clone(), metadata::as_json(value));
            all["metadata"] = file.metadata().entries().iter().map(key).collect();
        }
        writeln!(out, "{all:#}")?;
    } else {
        let text = as_text(&checkpoint, args.tensors, file.as_ref(), term);
        out.write_all(text.as_bytes())?;
    }
    Ok(Outcome::Done)
}

/// Tensors of one number format.
#[derive(Default)]
struct Format {
    tensors: u64,
    weights: u64,
    bytes: u64,
}

fn formats(tensors: &[TensorEntry]) -> BTreeMap<&str, Format> {
    let mut formats: BTreeMap<&str, Format> = BTreeMap::new();
    for tensor in tensors {
        let format = formats.entry(&tensor.type_name).or_default();
        format.tensors += 1;
        format.weights += tensor.shape.iter().map(|&size| size as u64).product::<u64>();
        format.bytes += tensor.bytes;
    }
    formats
}

/// Bits of file for each weight the model uses.
fn bits_per_weight(checkpoint: &Checkpoint, tensors: &[TensorEntry]) -> f64 {
    let total: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    total as f64 * 8.0 / checkpoint.total_weight_count() as f64
}

/// Kind and number of tokens.
fn tokenizer(text: &TextAssets) -> Option<(String, Option<usize>)> {
    Some(match text.tokenizer.as_ref()? {
        TokenizerSource::HuggingFace(json) => {
            // The engine checks tokenizers when it loads them; here a damaged one is only shown.
            let json: Value = serde_json::from_slice(json).unwrap_or_default();
            let kind = json["model"]["type"].as_str().unwrap_or("of unknown kind");
            let vocabulary = &json["model"]["vocab"];
            let size = vocabulary.as_object().map(|v| v.len());
            let size = size.or_else(|| vocabulary.as_array().map(Vec::len));
            let new = |token: &&Value| {
                token["content"].as_str().is_some_and(|t| vocabulary.get(t).is_none())
            };
            let added =
                json["added_tokens"].as_array().map_or(0, |added| added.iter().filter(new).count());
            (format!("{kind} (tokenizer.json)"), size.map(|size| size + added))
        }
        TokenizerSource::Gguf(vocabulary) => {
            let kind = match (vocabulary.model.as_str(), &vocabulary.pre) {
                ("gpt2", Some(pre)) => format!("byte-level BPE, pre-tokenizer {pre} (GGUF)"),
                ("gpt2", None) => "byte-level BPE (GGUF)".to_owned(),
                ("llama", _) => "SentencePiece (GGUF)".to_owned(),
                (other, _) => format!("{other} (GGUF)"),
            };
            (kind, Some(vocabulary.tokens.len()))
        }
    })
}

fn rope_scaling(config: &ModelConfig) -> Value {
    match &config.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
        } => json!({
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
        }),
        RopeScaling::Factors(factors) => json!({ "type": "factors", "factors": factors }),
    }
}

fn hidden_act(config: &ModelConfig) -> &'static str {
    match config.hidden_act {
        HiddenAct::Relu2 => "relu2",
        HiddenAct::Silu => "silu",
    }
}

/// The hyper-parameters under the names of a `config.json`.
fn config_json(config: &ModelConfig) -> Value {
    json!({
        "architecture": config.architecture.to_string(),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling(config),
        "hidden_act": hidden_act(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "sub_norms": config.sub_norms,
        "qk_norm": config.qk_norm,
        "attention_bias": config.attention_bias,
    })
}

fn as_json(checkpoint: &Checkpoint, list_tensors: bool) -> Value {
    let (config, text) = (checkpoint.config(), checkpoint.text());
    let tensors = checkpoint.tensors();
    let weights = checkpoint.weight_count();
    let by_format = formats(&tensors).into_iter().map(|(name, format)| {
        let Format { tensors, weights, bytes } = format;
        (name.to_owned(), json!({ "tensors": tensors, "weights": weights, "bytes": bytes }))
    });
    let tokenizer = tokenizer(text).map(|(kind, size)| {
        let special: BTreeMap<_, _> = text.special_tokens.iter().cloned().collect();
        json!({
            "kind": kind,
            "size": size,
            "special_tokens": special,
            "bos_token_id": text.bos_token_id,
            "eos_token_ids": text.eos_token_ids,
            "add_bos": text.add_bos,
            "add_eos": text.add_eos,
        })
    });
    let overrides = checkpoint
        .overrides()
        .iter()
        .map(|o| json!({ "what": o.what, "found": o.found, "used": o.used, "why": o.why }));
    let mut all = json!({
        "name": config.name,
        "format": checkpoint.file_format().to_string(),
        "config": config_json(config),
        "weights": {
            "total": weights.ternary + weights.float,
            "ternary": weights.ternary,
            "float": weights.float,
            "bytes": tensors.iter().map(|tensor| tensor.bytes).sum::<u64>(),
            "bits_per_weight": bits_per_weight(checkpoint, &tensors),
            "formats": by_format.collect::<serde_json::Map<_, _>>(),
        },
        "tokenizer": tokenizer,
        "chat_template": text.chat_template,
        "overrides": overrides.collect::<Vec<_>>(),
    });
    if list_tensors {
        let tensor = |t: &TensorEntry| {
            json!({
                "name": t.name,
                "file_name": t.file_name,
                "type": t.type_name,
                "shape": t.shape,
                "bytes": t.bytes,
                "bits_per_weight": t.bits_per_weight,
            })
        };
        all["tensors"] = tensors.iter().map(tensor).collect();
    }
    all
}

/// Lines of a label and a value, and lists below headings.
struct Page<'a> {
    text: String,
    term: &'a Term,
}

impl Page<'_> {
    fn heading(&mut self, text: &str) {
        self.text.push_str(&format!("\n{}\n", self.term.out(Style::Label, text)));
    }

    /// Both may come from a file and hold anything.
    fn line(&mut self, label: &str, value: impl AsRef<str>) {
        let (label, value) = (printable(label), printable(value.as_ref()));
        self.text.push_str(&format!("  {label:15} {value}\n"));
    }
}

fn as_text(
    checkpoint: &Checkpoint,
    list_tensors: bool,
    file: Option<&GgufFile>,
    term: &Term,
) -> String {
    let (config, text) = (checkpoint.config(), checkpoint.text());
    let tensors = checkpoint.tensors();
    let mut page = Page { text: String::new(), term };
    page.text.push_str(&format!("{}\n", term.out(Style::Label, printable(&config.name))));
    page.line("format", checkpoint.file_format().to_string());
    page.line("architecture", config.architecture.to_string());

    page.heading("Shape");
    page.line("layers", count(config.num_hidden_layers as u64));
    page.line(
        "hidden",
        format!("{}, feed-forward {}", config.hidden_size, config.intermediate_size),
    );
    let heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    page.line("heads", format!("{} queries, {} keys, {} features each", heads.0, heads.1, heads.2));
    page.line("vocabulary", count(config.vocab_size as u64));
    page.line("context", format!("{} tokens", count(config.max_position_embeddings as u64)));
    let scaling = match rope_scaling(config) {
        Value::Null => String::new(),
        scaling => format!(", scaling {}", scaling["type"].as_str().unwrap_or_default()),
    };
    page.line("rope", format!("theta {}{scaling}", config.rope_theta));
    let mut parts = vec![hidden_act(config)];
    let optional = [
        (config.sub_norms, "sub-norms"),
        (config.qk_norm, "norms on queries and keys"),
        (config.projection_norm_eps.is_some(), "norms before projections"),
        (config.attention_bias, "attention biases"),
        (config.tie_word_embeddings, "tied head"),
    ];
    parts.extend(optional.iter().filter(|(on, _)| *on).map(|(_, name)| *name));
    page.line("parts", parts.join(", "));

    page.heading("Weights");
    let weights = checkpoint.weight_count();
    let (ternary, float) = (count(weights.ternary), count(weights.float));
    let total = count(weights.ternary + weights.float);
    page.line("total", format!("{total} ({ternary} ternary, {float} float)"));
    let size: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    let bits = bits_per_weight(checkpoint, &tensors);
    page.line("size", format!("{}, {bits:.2} bits per weight", bytes(size)));
    for (name, format) in formats(&tensors) {
        let tensors = counted(format.tensors, "tensor");
        page.line(name, format!("{tensors}, {}", bytes(format.bytes)));
    }

    page.heading("Text");
    match tokenizer(text) {
        None => page.line("tokenizer", "none: the model takes token ids only"),
        Some((kind, size)) => {
            page.line("tokenizer", kind);
            page.line("tokens", size.map_or("unknown".into(), |size| count(size as u64)));
        }
    }
    for (name, token) in &text.special_tokens {
        page.line(name, format!("{token:?}"));
    }
    if !text.eos_token_ids.is_empty() {
        let ids: Vec<_> = text.eos_token_ids.iter().map(u32::to_string).collect();
        page.line("ends at tokens", ids.join(", "));
    }
    match &text.chat_template {
        None => page.line("chat template", "none"),
        Some(template) => {
            let shown: String = template.chars().take(TEMPLATE_SHOWN).collect();
            let rest = template.chars().count() - shown.chars().count();
            let rest =
                if rest > 0 { format!(" … ({rest} more characters)") } else { String::new() };
            page.line("chat template", format!("{shown:?}{rest}"));
        }
    }

    if !checkpoint.overrides().is_empty() {
        page.heading("Overridden");
        for o in checkpoint.overrides() {
            page.line(o.what, o.why);
            page.line("  in the file", &o.found);
            page.line("  used instead", &o.used);
        }
    }
    if let Some(file) = file {
        page.heading("Metadata");
        for (key, value) in file.metadata().entries() {
            let (key, kind) = (printable(key), value.type_name());
            let value = metadata::as_text(value);
            let value = printable(&value);
            page.text.push_str(&format!("  {key:45} {kind:16} {value}\n"));
        }
    }
    if list_tensors {
        page.heading("Tensors");
        for tensor in &tensors {
            let shape: Vec<_> = tensor.shape.iter().map(usize::to_string).collect();
            let name = printable(&tensor.file_name);
            let (kind, size) = (printable(&tensor.type_name), bytes(tensor.bytes));
            page.text
                .push_str(&format!("  {name:50} {:>16} {kind:14} {size:>10}\n", shape.join(" × ")));
        }
    }
    page.text
}
