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

/// Cased letters: general categories Lu, Ll and Lt, as far as DeepSeek's list of ranges has them.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

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
        &[
            "[\r\n]",
            DEEPSEEK_LETTERS,
            "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        ],
    ),
    (&["deepseek-coder"], &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]),
    (
        &["deepseek-v3", "hunyuan-dense"],
        &[
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
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
