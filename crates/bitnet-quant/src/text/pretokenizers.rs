//! The pre-tokenizers a GGUF file may name, as the patterns the original tokenizers split with.
//!
//! A GGUF vocabulary holds tokens and merges but only the name of the pattern. Each pattern of a
//! list is applied to the pieces the one before it left; matches and what lies between them are
//! pieces. The text is then mapped to the byte alphabet.

/// The pattern of GPT-2.
pub const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The pattern of Llama 3: case-blind contractions, numbers in threes, newlines with what they end.
pub const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// As Qwen 2, with combining marks counted to the letters.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// o200k: words split where lower case turns into upper case.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Punctuation as Falcon's tokenizer splits it: Unicode punctuation and the ASCII symbols.
const FALCON_PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|`]+";

/// The cased letters DeepSeek's tokenizer lists: those of the blocks that its list leaves out
/// (from Armenian small letters to mathematical alphabets) are taken away again.
const DEEPSEEK_LETTERS: &str = r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}\x{A790}-\x{A7FF}\x{AB30}-\x{AB6F}\x{10570}-\x{105BF}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7FF}\x{1DF00}-\x{1DFFF}]]+";

/// ASCII and full-width punctuation, quotation marks, the ideographic space, comma and full stop.
const DEEPSEEK_PUNCTUATION: &str =
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+";

/// Ideographs and Hangul, and what lies between U+0800 and the ideographs.
const DEEPSEEK_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";

/// Ideographs and kana.
const DEEPSEEK3_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+";

/// A list of names that mean the same, and the patterns they mean.
type Entry = (&'static [&'static str], &'static [&'static str]);

const TABLE: &[Entry] = &[
    (
        &[
            "gpt-2",
            "gpt2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "exaone4",
            "trillion",
            "granite-docling",
        ],
        &[GPT2],
    ),
    (
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "lfm2",
            "dbrx",
            "smaug-bpe",
            "glm4",
            "chatglm-bpe",
        ],
        &[LLAMA3],
    ),
    (&["qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "solar-open"], &[QWEN2]),
    (&["qwen35"], &[QWEN35]),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        &[r"\p{N}", GPT2],
    ),
    (&["gpt-4o", "llama4"], &[GPT4O]),
    (&["tekken"], &[TEKKEN]),
    (&["falcon"], &[FALCON_PUNCTUATION, GPT2, "[0-9][0-9][0-9]"]),
    (&["falcon_e", "falcon-e"], &[FALCON_PUNCTUATION, GPT2, "[0-9]"]),
    (&["default"], &[FALCON_PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    (
        &["deepseek-llm"],
        &["[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_CJK, r"\p{N}+"],
    ),
    (&["deepseek-coder"], &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"]),
    (
        &["deepseek-v3", "hunyuan-dense"],
        &[
            r"\p{N}{1,3}",
            DEEPSEEK3_CJK,
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
        ],
    ),
];

/// The patterns a name stands for.
pub fn patterns(name: &str) -> Option<&'static [&'static str]> {
    TABLE.iter().find(|(names, _)| names.contains(&name)).map(|(_, patterns)| *patterns)
}

/// Whether a word that is a token as a whole is taken as it is, without merging, and whether a
/// prompt begins with `bos` unless the file says otherwise.
pub fn llama3_rules(name: &str) -> bool {
    ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"]
        .contains(&name)
}

/// All names, for error messages.
pub fn supported() -> String {
    TABLE.iter().flat_map(|(names, _)| *names).copied().collect::<Vec<_>>().join(", ")
}

/// The name of a list of patterns, and of the rules that come with it.
pub fn name_of(patterns: &[&str], llama3_rules: bool) -> Option<&'static str> {
    let (names, _) = TABLE.iter().find(|(_, known)| *known == patterns)?;
    let with_rules = names.iter().find(|name| self::llama3_rules(name) == llama3_rules);
    Some(with_rules.unwrap_or(&names[0]))
}

/// The first name of each list with its patterns.
pub fn all() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    TABLE.iter().map(|(names, patterns)| (names[0], *patterns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_find_their_name() {
        for (name, patterns) in all() {
            assert_eq!(name_of(patterns, llama3_rules(name)), Some(name));
        }
        assert_eq!(name_of(&[LLAMA3], true), Some("llama-bpe"));
        assert_eq!(name_of(&[LLAMA3], false), Some("dbrx"));
        assert_eq!(name_of(&["x"], false), None);
    }
}
