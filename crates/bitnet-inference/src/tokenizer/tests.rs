//! Whole tokenizers: golden ids, the `tokenizers` crate as reference, hostile files and texts.

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use bitnet_quant::text::GgufVocabulary;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const BUILTIN: &[u8] = include_bytes!("../../builtin/tokenizer.json");
const TINY: &[u8] =
    include_bytes!("../../../../fixtures/goldens/bitnet-tiny/online/tokenizer.json");

/// HF's default: add what the post-processor adds, read control tokens in the text.
const PYTHON: EncodeOptions = EncodeOptions { add: AddSpecial::Both, parse_special: true };

fn assets(json: &[u8]) -> TextAssets {
    let source = TokenizerSource::HuggingFace(json.to_vec().into());
    TextAssets { tokenizer: Some(source), ..TextAssets::default() }
}

fn tokenizer(json: &[u8]) -> Tokenizer {
    Tokenizer::from_assets(&assets(json)).unwrap()
}

fn from_value(json: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_assets(&assets(json.to_string().as_bytes()))
}

/// Three kinds of tokenizer, each beside the one that the `tokenizers` crate makes of its file.
static KINDS: LazyLock<Vec<(Tokenizer, tokenizers::Tokenizer)>> = LazyLock::new(|| {
    let both = |json: &[u8]| (tokenizer(json), tokenizers::Tokenizer::from_bytes(json).unwrap());
    vec![both(BUILTIN), both(TINY), both(metaspace_json().to_string().as_bytes())]
});

/// Texts with everything pre-tokenizers look at.
fn texts() -> impl Strategy<Value = String> {
    r"([ \t\n\r]{0,4}|[a-zA-Z]{1,6}|'s|'LL|[0-9]{1,4}|[!?.,:$+<>|]{1,2}|日本|é|e\u{301}|ß|🦊|\u{3000}|<s>|</s>|<unk>|the ){0,16}"
}

/// A Llama-2 style tokenizer: visible spaces, byte fallback, no words.
fn metaspace_json() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut pieces: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    pieces.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    pieces.extend(
        ["▁", "t", "h", "e", "th", "▁th", "▁the", "he", "▁t", "a", "▁a", "aa", "aaaa"]
            .map(String::from),
    );
    for (id, piece) in pieces.into_iter().enumerate() {
        vocab.insert(piece, id.into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": ["▁ t", "t h", "h e", "▁ th", "▁th e", "▁ a", "▁t h", "a a", "aa aa"]}
    })
}

#[test]
fn golden_ids() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/goldens");
    for model in ["bitnet-tiny", "llama-ternary-tiny"] {
        let read = |file: &str| std::fs::read(goldens.join(model).join(file)).unwrap();
        let golden: Value = serde_json::from_slice(&read("text.json")).unwrap();
        let tokenizer = tokenizer(&read("packed_multiply/tokenizer.json"));
        for case in golden["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, PYTHON).unwrap(), ids, "{text}");
            assert_eq!(tokenizer.decode(&ids, true), text);
        }
        let chat = &golden["chat"];
        let ids: Vec<u32> = serde_json::from_value(chat["ids"].clone()).unwrap();
        let rendered = chat["rendered"].as_str().unwrap();
        assert_eq!(tokenizer.encode(rendered, EncodeOptions::CHAT).unwrap(), ids);
    }
    let story: Value =
        serde_json::from_slice(&std::fs::read(goldens.join("story/golden.json")).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(story["ids"].clone()).unwrap();
    let text = story["text"].as_str().unwrap();
    assert_eq!(tokenizer(BUILTIN).encode(text, EncodeOptions::PROMPT).unwrap(), ids);
}

proptest! {
    #[test]
    fn equals_the_tokenizers_crate(text in texts()) {
        for (tokenizer, reference) in &*KINDS {
            let expected = reference.encode(text.as_str(), true).unwrap();
            prop_assert_eq!(tokenizer.encode(&text, PYTHON).unwrap(), expected.get_ids());
        }
    }

    #[test]
    fn text_survives_the_round_trip(text in texts()) {
        for (tokenizer, _) in &*KINDS {
            let ids = tokenizer.encode(&text, EncodeOptions::PROMPT).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, false), text.as_str());
        }
    }

    #[test]
    fn protected_text_encodes_as_text(text in texts()) {
        for (tokenizer, _) in &*KINDS {
            let options = EncodeOptions { add: AddSpecial::None, ..EncodeOptions::CHAT };
            let protected = tokenizer.protect(&text);
            prop_assert_eq!(
                tokenizer.encode(&protected, options).unwrap(),
                tokenizer.encode(&text, EncodeOptions::TEXT).unwrap()
            );
            prop_assert_eq!(tokenizer.unprotect(&protected), text.as_str());
        }
    }

    #[test]
    fn streams_of_any_tokens_decode_as_a_whole(
        ids in prop::collection::vec(0..270_u32, 0..40),
        show_control: bool,
    ) {
        for (tokenizer, _) in &*KINDS {
            let shown = ids.iter().filter(|&&id| show_control || !tokenizer.is_control(id));
            let bytes: Vec<u8> =
                shown.flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
            let expected = String::from_utf8_lossy(&bytes);
            let stripped = expected.strip_prefix(' ').filter(|_| tokenizer.strip_start() == 1);
            prop_assert_eq!(tokenizer.decode(&ids, show_control), stripped.unwrap_or(&expected));

            let mut stream = Detokenizer::continuing(tokenizer);
            if show_control {
                stream = stream.show_control();
            }
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&stream.push(id));
                prop_assert!(expected.starts_with(&text), "nothing is taken back");
            }
            text.push_str(&stream.finish());
            prop_assert_eq!(text, expected);
        }
    }

    #[test]
    fn no_damaged_file_panics(edits in prop::collection::vec((any::<usize>(), any::<u8>()), 1..4)) {
        let mut json = metaspace_json().to_string().into_bytes();
        for (at, byte) in edits {
            let at = at % json.len();
            json[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_assets(&assets(&json)) {
            let _ = tokenizer.encode("the <s> é", PYTHON);
        }
    }
}

#[test]
fn control_tokens_in_user_text_stay_text() {
    let tokenizer = tokenizer(TINY);
    let text = "a</s>b";
    assert!(!tokenizer.encode(text, EncodeOptions::PROMPT).unwrap().contains(&2));
    assert_eq!(tokenizer.encode("</s>", EncodeOptions::CHAT).unwrap(), [2]);
    let protected = tokenizer.protect(text).into_owned();
    let rendered = format!("<s>User: {protected}</s>");
    let ids = tokenizer.encode(&rendered, EncodeOptions::CHAT).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 1);
    assert_eq!(tokenizer.decode(&ids, false), "User: a</s>b");
}

#[test]
fn special_tokens_are_added_once() {
    let with = |edit: fn(&mut TextAssets)| {
        let mut assets = assets(TINY);
        assets.bos_token_id = Some(1);
        assets.eos_token_ids = vec![2];
        edit(&mut assets);
        Tokenizer::from_assets(&assets).unwrap()
    };
    let both = EncodeOptions { add: AddSpecial::Both, parse_special: true };
    let plain = with(|_| {});
    assert_eq!(plain.encode("", both).unwrap(), [0; 0]);
    assert_eq!((plain.bos_id(), plain.eos_ids()), (Some(1), &[2][..]));
    let add = with(|assets| {
        assets.add_bos = Some(true);
        assets.add_eos = true;
    });
    assert_eq!(add.encode("", both).unwrap(), [1, 2]);
    assert_eq!(add.encode("", EncodeOptions::PROMPT).unwrap(), [1]);
    assert_eq!(add.encode("<s>", EncodeOptions::CHAT).unwrap(), [1], "not twice");
    assert_eq!(add.encode("<s>", EncodeOptions::TEXT).unwrap().first(), Some(&30));
    let template = assets(metaspace_json().to_string().as_bytes());
    let never = TextAssets { add_bos: Some(false), bos_token_id: Some(1), ..template };
    let never = Tokenizer::from_assets(&never).unwrap();
    assert_eq!(never.encode("", both).unwrap(), [0; 0]);
    let outside = TextAssets { bos_token_id: Some(320), ..assets(TINY) };
    let error = Tokenizer::from_assets(&outside).unwrap_err();
    assert!(matches!(error, TokenizerError::Invalid { .. }));
    let none = Tokenizer::from_assets(&TextAssets::default()).unwrap_err();
    assert_eq!(none, TokenizerError::Missing);
}

#[test]
fn lookups() {
    let tokenizer = tokenizer(TINY);
    assert_eq!(tokenizer.vocab_size(), 320);
    assert_eq!((tokenizer.token_id("</s>"), tokenizer.token_id("nothing")), (Some(2), None));
    assert!(tokenizer.is_control(2) && !tokenizer.is_control(3) && !tokenizer.is_control(9999));
    assert_eq!(tokenizer.token_bytes(tokenizer.token_id("Ġt").unwrap()), b" t");
    assert_eq!(tokenizer.token_bytes(9999), b"");
    let newlines = tokenizer.tokens_containing(&["\n"]);
    assert_eq!(newlines, [tokenizer.token_id("Ċ").unwrap()]);
}

/// The tiny tokenizer as a GGUF file would hold it.
fn gguf(model: &str) -> GgufVocabulary {
    let json: Value = serde_json::from_slice(TINY).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    for (text, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = text.clone();
    }
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()));
    GgufVocabulary {
        model: model.into(),
        pre: Some("gpt-2".into()),
        token_types: (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect(),
        merges: merges.collect(),
        tokens,
        ..GgufVocabulary::default()
    }
}

fn from_gguf(vocabulary: GgufVocabulary) -> Result<Tokenizer, TokenizerError> {
    let source = TokenizerSource::Gguf(vocabulary);
    Tokenizer::from_assets(&TextAssets { tokenizer: Some(source), ..TextAssets::default() })
}

/// A small SentencePiece vocabulary.
fn spm() -> GgufVocabulary {
    let pieces: [(&str, f32, i32); 9] = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<0x0A>", 0.0, 6),
        ("▁", -10.0, 1),
        ("a", -11.0, 1),
        ("▁a", -1.0, 1),
        ("<tool>", 0.0, 4),
        ("aa", -2.0, 1),
    ];
    GgufVocabulary {
        model: "llama".into(),
        tokens: pieces.iter().map(|p| p.0.to_owned()).collect(),
        scores: pieces.iter().map(|p| p.1).collect(),
        token_types: pieces.iter().map(|p| p.2).collect(),
        unk_token_id: Some(0),
        ..GgufVocabulary::default()
    }
}

#[test]
fn a_gguf_vocabulary_is_the_same_tokenizer() {
    let (ours, json) = (from_gguf(gguf("gpt2")).unwrap(), tokenizer(TINY));
    for text in ["Once upon a time", "naïve 日本語 🦊", "<s>x</s>", "  a\n\n b", ""] {
        let of = |tokenizer: &Tokenizer| tokenizer.encode(text, PYTHON).unwrap();
        assert_eq!(of(&ours), of(&json));
        assert_eq!(ours.decode(&of(&ours), true), text);
    }
}

#[test]
fn sentence_piece_from_gguf() {
    let tokenizer = from_gguf(spm()).unwrap();
    let encode = |text| tokenizer.encode(text, EncodeOptions::TEXT).unwrap();
    assert_eq!(encode("a a"), [6, 6]);
    assert_eq!(encode(" a"), [4, 6], "a space of the text's own is kept");
    assert_eq!(encode("aaa\n"), [6, 8, 3]);
    assert_eq!(encode("a<tool>a"), [6, 7, 6], "the text after a token begins anew");
    assert_eq!(encode("é"), [4, 0]);
    assert_eq!(tokenizer.decode(&[1, 6, 6, 3, 7], false), "a a\n<tool>");
    assert_eq!(tokenizer.decode(&[4, 6], false), " a");
    // An answer goes on where the prompt's text ends; after a control token a text begins.
    let answer = |prompt: &[u32]| Detokenizer::after(&tokenizer, prompt).push(6);
    assert_eq!([answer(&[1, 6]), answer(&[1]), answer(&[])], [" a", "a", "a"]);
    let bare = GgufVocabulary { add_space_prefix: Some(false), ..spm() };
    let bare = from_gguf(bare).unwrap();
    assert_eq!(bare.encode("a a", EncodeOptions::TEXT).unwrap(), [5, 6]);
    assert_eq!(bare.decode(&[6], false), " a");
}

#[test]
fn the_kind_of_tokenizer_decides_about_bos() {
    let prompt = |vocabulary, add_bos| {
        let assets = TextAssets {
            tokenizer: Some(TokenizerSource::Gguf(vocabulary)),
            bos_token_id: Some(1),
            add_bos,
            ..TextAssets::default()
        };
        Tokenizer::from_assets(&assets).unwrap().encode("", EncodeOptions::PROMPT).unwrap()
    };
    assert_eq!(prompt(spm(), None), [1]);
    assert_eq!(prompt(spm(), Some(false)), [0; 0]);
    assert_eq!(prompt(gguf("gpt2"), None), [0; 0]);
    assert_eq!(prompt(gguf("gpt2"), Some(true)), [1]);
    let llama3 = GgufVocabulary { pre: Some("llama-bpe".into()), ..gguf("gpt2") };
    assert_eq!(prompt(llama3, None), [1]);
}

#[test]
fn hostile_gguf_vocabularies_are_errors() {
    let edit = |mut vocabulary: GgufVocabulary, edit: fn(&mut GgufVocabulary)| {
        edit(&mut vocabulary);
        from_gguf(vocabulary)
    };
    let bpe = |f| edit(gguf("gpt2"), f);
    let spm = |f| edit(spm(), f);
    let cases: Vec<(&str, Result<Tokenizer, TokenizerError>)> = vec![
        ("no tokens", bpe(|v| *v = GgufVocabulary { model: "gpt2".into(), ..Default::default() })),
        ("model", bpe(|v| v.model = "bert".into())),
        ("pre", bpe(|v| v.pre = Some("martian".into()))),
        ("few types", bpe(|v| v.token_types.truncate(5))),
        ("merge of one part", bpe(|v| v.merges.push("ab".into()))),
        ("long token", bpe(|v| v.tokens[9] = "x".repeat(1 << 20))),
        ("no scores", spm(|v| v.scores.clear())),
        ("few scores", spm(|v| v.scores.truncate(2))),
        ("NaN score", spm(|v| v.scores[5] = f32::NAN)),
        ("bad byte", spm(|v| v.tokens[3] = "<0x-1>".into())),
        ("bad byte", spm(|v| v.tokens[3] = "<0xZZ>".into())),
    ];
    for (name, result) in cases {
        let error = result.err().unwrap_or_else(|| panic!("{name} was accepted"));
        assert!(error.to_string().len() < 1000, "{name}: {error}");
    }
    // Odd, but harmless.
    spm(|v| v.tokens[5] = String::new()).unwrap().encode("a", PYTHON).unwrap();
    spm(|v| v.tokens[5] = "▁a".into()).unwrap().encode("a a", PYTHON).unwrap();
    bpe(|v| v.tokens[9] = v.tokens[8].clone()).unwrap().encode("ab", PYTHON).unwrap();
    bpe(|v| v.token_types.clear()).unwrap().encode("<s>", PYTHON).unwrap();
    bpe(|v| v.merges.push("quux quuux".into())).unwrap().encode("quux", PYTHON).unwrap();
    bpe(|v| v.merges.push("z z".into())).unwrap().encode("zz", PYTHON).unwrap();
}

#[test]
fn hostile_json_is_an_error() {
    let edit = |edit: fn(&mut Value)| {
        let mut json = metaspace_json();
        edit(&mut json);
        from_value(&json)
    };
    let cases: Vec<(&str, Result<Tokenizer, TokenizerError>)> = vec![
        ("unigram", edit(|j| j["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0]]}))),
        ("no vocabulary", edit(|j| j["model"] = json!({"type": "BPE"}))),
        ("huge id", edit(|j| j["model"]["vocab"]["huge"] = u32::MAX.into())),
        ("negative id", edit(|j| j["model"]["vocab"]["a"] = (-1).into())),
        ("twice the same id", edit(|j| j["model"]["vocab"]["a"] = 5.into())),
        ("merge of three", edit(|j| j["model"]["merges"] = json!([["a", "b", "c"]]))),
        ("merge of three", edit(|j| j["model"]["merges"] = json!(["a b c"]))),
        ("merge of numbers", edit(|j| j["model"]["merges"] = json!([1]))),
        ("merge to nothing", edit(|j| j["model"]["merges"] = json!(["the a"]))),
        ("merge to nothing", edit(|j| j["model"]["merges"] = json!(["▁the ▁the"]))),
        ("prefix", edit(|j| j["model"]["continuing_subword_prefix"] = "##".into())),
        ("dropout", edit(|j| j["model"]["dropout"] = 0.5.into())),
        ("unknown unk", edit(|j| j["model"]["unk_token"] = "<nope>".into())),
        ("moved token", edit(|j| j["added_tokens"][1]["id"] = 7.into())),
        (
            "huge added id",
            edit(|j| {
                j["added_tokens"][1]["id"] = u32::MAX.into();
                j["added_tokens"][1]["content"] = "<new>".into();
            }),
        ),
        (
            "normalizer",
            edit(|j| {
                j["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})
            }),
        ),
        ("normalizer", edit(|j| j["normalizer"] = json!([]))),
        (
            "pattern",
            edit(
                |j| j["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
            ),
        ),
        ("pre-tokenizer", edit(|j| j["pre_tokenizer"] = json!({"type": "UnicodeScripts"}))),
        (
            "decoder",
            edit(|j| j["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
        ),
        ("decoder", edit(|j| j["decoder"] = json!(3))),
        ("template without text", edit(|j| j["post_processor"]["single"] = json!([]))),
        ("template of unknown tokens", edit(|j| j["post_processor"]["special_tokens"] = json!({}))),
        (
            "template of a missing id",
            edit(|j| j["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([99999])),
        ),
    ];
    for (name, result) in cases {
        let error = result.err().unwrap_or_else(|| panic!("{name} was accepted"));
        assert!(error.to_string().len() < 1000, "{name}: {error}");
    }
    let deep = "[".repeat(100_000);
    let nested =
        format!(r#"{{"normalizer":{}"#, r#"{"type":"Sequence","normalizers":["#.repeat(5000));
    for bytes in [&b""[..], b"{}", b"[]", b"null", b"\xff", deep.as_bytes(), nested.as_bytes()] {
        let error = Tokenizer::from_assets(&assets(bytes)).unwrap_err();
        assert!(matches!(error, TokenizerError::Json { .. }), "{error}");
    }
    for end in (0..TINY.len()).step_by(97) {
        Tokenizer::from_assets(&assets(&TINY[..end])).unwrap_err();
    }
}

#[test]
fn a_million_added_tokens_load() {
    let mut json = metaspace_json();
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    tokens.extend((300..1_000_000).map(|id| json!({"id": id, "content": format!("<|{id}|>")})));
    let bytes = json.to_string();
    let start = Instant::now();
    let tokenizer = tokenizer(bytes.as_bytes());
    assert_eq!(tokenizer.encode("<|777777|>", EncodeOptions::TEXT).unwrap(), [777_777]);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn a_megabyte_of_anything_takes_linear_time() {
    let units = ["a", " ", "\n", "\t ", "🦊", "e\u{301}", "\u{301}", "1", "'", "</s", " a", "<"];
    let check = |tokenizer: &Tokenizer, bytes: usize| {
        for unit in units {
            let text = unit.repeat(bytes / unit.len()) + "x";
            let start = Instant::now();
            assert!(!tokenizer.encode(&text, PYTHON).unwrap().is_empty());
            let elapsed = start.elapsed();
            // A megabyte takes 0.3 s on a slow machine; quadratic time would take hours.
            assert!(elapsed < Duration::from_secs(20), "{unit:?}: {elapsed:?}");
        }
    };
    let metaspace = metaspace_json().to_string();
    for tokenizer in
        [tokenizer(BUILTIN), tokenizer(metaspace.as_bytes()), from_gguf(spm()).unwrap()]
    {
        check(&tokenizer, 1 << 20);
    }
    for name in ["llama-bpe", "deepseek-v3", "default"] {
        let vocabulary = GgufVocabulary { pre: Some(name.into()), ..gguf("gpt2") };
        check(&from_gguf(vocabulary).unwrap(), 1 << 18);
    }
}
