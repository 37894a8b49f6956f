// Colours for code: comments, strings, numbers and keywords of the common languages, found by one
// regular expression. It does not parse; a wrong colour is the worst it can do.

import { el } from "./dom.js";

const KEYWORDS = new Set(
  ("abstract and as assert async await bool break case catch char class const continue def default del do " +
    "double elif else end enum except export extends extern false False final finally float fn for from func " +
    "function global go if impl implements import in include instanceof int interface is lambda let local long " +
    "loop match mod module mut namespace new nil None nonlocal not null or package pass private protected pub " +
    "public raise return self Self short static struct super switch template then this throw throws trait true " +
    "True try type typedef typeof undefined union unsafe use using var virtual void where while with yield " +
    "SELECT FROM WHERE INSERT INTO UPDATE DELETE CREATE TABLE JOIN ON GROUP BY ORDER LIMIT VALUES AND OR NOT " +
    "fi done esac echo").split(" "),
);
const HASH_COMMENTS = /^(py|python|sh|bash|zsh|shell|ruby|rb|yaml|yml|toml|r|perl|make|makefile|dockerfile|elixir)$/;
const DASH_COMMENTS = /^(sql|lua|haskell|hs|elm|ada)$/;
const PLAIN = /^(text|txt|plain|plaintext|console|output|markdown|md)$/;
const MAX_CHARS = 50_000;

/** Nodes for a piece of code in a language (as fences name it). */
export function highlight(code, language) {
  const name = language.toLowerCase();
  if (code.length > MAX_CHARS || PLAIN.test(name) || !name) return [code];
  const comment = HASH_COMMENTS.test(name) ? "#[^\\n]*" : DASH_COMMENTS.test(name) ? "--[^\\n]*" : "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
  const strings = "\"(?:[^\"\\\\\\n]|\\\\.)*\"?|'(?:[^'\\\\\\n]|\\\\.)*'|`(?:[^`\\\\]|\\\\[^])*`?";
  const token = new RegExp(`(${comment})|(${strings})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`, "g");
  const nodes = [];
  let at = 0;
  for (const found of code.matchAll(token)) {
    const [text, isComment, isString, isNumber, word] = found;
    const kind = isComment ? "c" : isString ? "s" : isNumber ? "n" : KEYWORDS.has(word) ? "k" : null;
    if (!kind) continue;
    if (found.index > at) nodes.push(code.slice(at, found.index));
    nodes.push(el("span", { className: `tok-${kind}` }, text));
    at = found.index + text.length;
  }
  nodes.push(code.slice(at));
  return nodes;
}
