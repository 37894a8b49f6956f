//! The `tokenizer.*` metadata of a GGUF file, and what is known to be wrong in it.

use super::GgufFile;
use crate::checkpoint::Override;
use crate::error::{Error, Result};
use crate::text::{GgufVocabulary, TextAssets, TokenizerSource};

/// The chat format BitNet b1.58 2B4T was tuned with.
const BITNET_TEMPLATE: &str = "{% for message in messages %}\
    {{ message['role'] | capitalize }}: {{ message['content'] | trim }}<|eot_id|>\
    {% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}";

/// What only the placeholder template of the 2B4T converter contains.
const PLACEHOLDER: &str = "BITNETAssistant";

/// Control tokens that end a turn or a text in whatever vocabulary they occur.
const END_TOKENS: [&str; 7] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
];

/// Token kind of control tokens.
const CONTROL: i32 = 3;

/// Reads the text side; `family` is the file's architecture.
pub(super) fn read(
    file: &GgufFile,
    family: &str,
    vocab_size: usize,
    overrides: &mut Vec<Override>,
) -> Result<TextAssets> {
    let id = |name: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match file.get::<u32>(&key)? {
            Some(id) if id as usize >= vocab_size => {
                let expected = format!("a token below {vocab_size}");
                Err(Error::malformed(format!("key {key}"), expected, id))
            }
            id => Ok(id),
        }
    };
    let Some(mut vocabulary) = vocabulary(file, vocab_size)? else {
        return Ok(TextAssets::default());
    };
    vocabulary.unk_token_id = id("unknown")?;
    let official = matches!(family, "bitnet-b1.58" | "bitnet-25");
    let has_eot = vocabulary.tokens.iter().any(|token| token == "<|eot_id|>");
    if official && has_eot && vocabulary.pre.is_none() {
        overrides.push(Override {
            what: "pre-tokenizer",
            found: "none".into(),
            used: "llama-bpe".into(),
            why: "the converter of BitNet b1.58 2B4T left it out; its vocabulary is Llama 3's",
        });
        vocabulary.pre = Some("llama-bpe".into());
    }
    let bos_token_id = id("bos")?;
    let stated: Vec<u32> = [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten().collect();
    let eos_token_ids = end_tokens(&vocabulary, stated, overrides);

    let mut special_tokens = Vec::new();
    for (name, id) in [
        ("bos", bos_token_id),
        ("eos", id("eos")?),
        ("unk", vocabulary.unk_token_id),
        ("pad", id("padding")?),
    ] {
        let text = id.and_then(|id| vocabulary.tokens.get(id as usize));
        special_tokens.extend(text.map(|text| (format!("{name}_token"), text.clone())));
    }
    Ok(TextAssets {
        chat_template: chat_template(file, official, overrides)?,
        bos_token_id,
        eos_token_ids,
        add_bos: file.get("tokenizer.ggml.add_bos_token")?,
        add_eos: file.get("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        special_tokens,
        tokenizer: Some(TokenizerSource::Gguf(vocabulary)),
    })
}

fn vocabulary(file: &GgufFile, vocab_size: usize) -> Result<Option<GgufVocabulary>> {
    // llama.cpp's words for a model that has none.
    let model = file.get::<&str>("tokenizer.ggml.model")?;
    let Some(model) = model.filter(|&model| model != "no_vocab" && model != "none") else {
        return Ok(None);
    };
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let tokens: &[String] = file.require(&key("tokens"))?;
    if tokens.len() > vocab_size {
        let expected = format!("at most {vocab_size} tokens, as token_embd");
        return Err(Error::malformed(format!("key {}", key("tokens")), expected, tokens.len()));
    }
    let scores = file.get::<&[f32]>(&key("scores"))?.unwrap_or_default();
    let token_types: Vec<i32> = file.get(&key("token_type"))?.unwrap_or_default();
    for (name, len) in [("scores", scores.len()), ("token_type", token_types.len())] {
        if len != 0 && len != tokens.len() {
            let expected = format!("{} values, one for each token", tokens.len());
            return Err(Error::malformed(format!("key {}", key(name)), expected, len));
        }
    }
    Ok(Some(GgufVocabulary {
        model: model.to_owned(),
        pre: file.get::<&str>(&key("pre"))?.map(str::to_owned),
        tokens: tokens.to_vec(),
        scores: scores.to_vec(),
        token_types,
        merges: file.get::<&[String]>(&key("merges"))?.unwrap_or_default().to_vec(),
        unk_token_id: None,
        add_space_prefix: file.get(&key("add_space_prefix"))?,
    }))
}

/// Files name one end token though their models end turns with another.
fn end_tokens(
    vocabulary: &GgufVocabulary,
    stated: Vec<u32>,
    overrides: &mut Vec<Override>,
) -> Vec<u32> {
    let is_control = |id: usize| vocabulary.token_types.get(id).is_none_or(|&kind| kind == CONTROL);
    let mut all = stated.clone();
    for (id, text) in vocabulary.tokens.iter().enumerate() {
        if END_TOKENS.contains(&text.as_str())
            && is_control(id)
            && let Ok(id) = u32::try_from(id)
            && !all.contains(&id)
        {
            all.push(id);
        }
    }
    if all.len() > stated.len() {
        let list = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        overrides.push(Override {
            what: "end tokens",
            found: if stated.is_empty() { "none".into() } else { list(&stated) },
            used: list(&all),
            why: "the vocabulary has other tokens that end a turn",
        });
    }
    all.sort_unstable();
    all.dedup();
    all
}

fn chat_template(
    file: &GgufFile,
    official: bool,
    overrides: &mut Vec<Override>,
) -> Result<Option<String>> {
    let template = file.get::<&str>("tokenizer.chat_template")?;
    if let Some(template) = template.filter(|t| official && t.contains(PLACEHOLDER)) {
        overrides.push(Override {
            what: "chat template",
            found: template.to_owned(),
            used: BITNET_TEMPLATE.into(),
            why: "the converter of BitNet b1.58 2B4T wrote a placeholder the model was not tuned with",
        });
        return Ok(Some(BITNET_TEMPLATE.into()));
    }
    Ok(template.map(str::to_owned))
}
