// Markdown inside a line: code, emphasis, links. Makes nodes from text and never reads HTML; pictures
// are shown as links, so that an answer cannot make the browser load anything.

import { el } from "./dom.js";

const MAX_DEPTH = 8;
const SPECIAL = /[\\`*_~[!<h]/g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const DELIMITERS = [["***", "strong", "em"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** Nodes for a text. */
export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at >= text.length) break;
    const found = depth < MAX_DEPTH ? take(text, at, depth) : null;
    if (!found) {
      plain += text[at];
      at += 1;
    } else if (typeof found.node === "string") {
      plain += found.node;
      at = found.end;
    } else {
      push(found.node);
      at = found.end;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** What begins at `at`, and where it ends; null if it is plain text. */
function take(text, at, depth) {
  switch (text[at]) {
    case "\\":
      return PUNCTUATION.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return code(text, at);
    case "!":
      return text[at + 1] === "[" ? bracket(text, at + 1, depth) : null;
    case "[":
      return bracket(text, at, depth);
    case "<":
      return angle(text, at);
    case "h":
      return bare(text, at);
    default:
      return emphasis(text, at, depth);
  }
}

function code(text, at) {
  const ticks = /`+/y;
  ticks.lastIndex = at;
  const fence = ticks.exec(text)[0];
  let end = at + fence.length;
  for (;;) {
    end = text.indexOf(fence, end);
    if (end < 0) return { node: fence, end: at + fence.length };
    if (text[end + fence.length] !== "`" && text[end - 1] !== "`") break;
    end += 1;
  }
  let inside = text.slice(at + fence.length, end).replaceAll("\n", " ");
  if (inside.startsWith(" ") && inside.endsWith(" ") && inside.trim()) inside = inside.slice(1, -1);
  return { node: el("code", {}, inside), end: end + fence.length };
}

/** `[label](address "title")`, and the same after `!`. */
function bracket(text, at, depth) {
  const close = matching(text, at, "[", "]");
  if (close < 0 || text[close + 1] !== "(") return null;
  const end = matching(text, close + 1, "(", ")");
  if (end < 0) return null;
  const label = text.slice(at + 1, close);
  const [address] = text.slice(close + 2, end).trim().split(/\s+"/);
  const href = safe(address.replace(/^<|>$/g, ""));
  if (!href) return null;
  return { node: link(href, inline(label || address, depth + 1)), end: end + 1 };
}

function matching(text, at, open, close) {
  let depth = 0;
  const limit = Math.min(text.length, at + 4000);
  for (let i = at; i < limit; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === open) depth += 1;
    else if (text[i] === close && --depth === 0) return i;
  }
  return -1;
}

function angle(text, at) {
  const found = /<(https?:\/\/[^\s<>]{1,2000}|mailto:[^\s<>]{1,200})>/y;
  found.lastIndex = at;
  const match = found.exec(text);
  const href = match && safe(match[1]);
  return href ? { node: link(href, [match[1]]), end: at + match[0].length } : null;
}

function bare(text, at) {
  if (/\w/.test(text[at - 1] ?? "")) return null;
  const found = /https?:\/\/[^\s<>"'`]{2,2000}/y;
  found.lastIndex = at;
  let address = found.exec(text)?.[0].replace(/[.,;:!?*_~]+$/, "");
  if (!address) return null;
  // A bracket that the address did not open belongs to the sentence.
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  const href = safe(address);
  return href ? { node: link(href, [address]), end: at + address.length } : null;
}

function emphasis(text, at, depth) {
  const word = (char) => /[\p{L}\p{N}]/u.test(char ?? "");
  for (const [mark, outer, inner] of DELIMITERS) {
    if (!text.startsWith(mark, at)) continue;
    const start = at + mark.length;
    if (/\s/.test(text[start] ?? " ")) continue;
    if (mark[0] === "_" && word(text[at - 1])) continue;
    const end = closing(text, start, mark, word);
    if (end < 0) continue;
    const inside = inline(text.slice(start, end), depth + 1);
    const node = el(outer, {}, ...(inner ? [el(inner, {}, ...inside)] : inside));
    return { node, end: end + mark.length };
  }
  // A run of marks that opens nothing is text, all of it: looking at each would take quadratic time.
  const run = new RegExp(`\\${text[at]}+`, "y");
  run.lastIndex = at;
  const marks = run.exec(text)[0];
  return { node: marks, end: at + marks.length };
}

function closing(text, start, mark, word) {
  const limit = Math.min(text.length, start + 4000);
  for (let end = start + 1; end < limit; end += 1) {
    if (text[end] === "`") {
      const close = text.indexOf("`", end + 1);
      if (close > 0) end = close;
      continue;
    }
    if (!text.startsWith(mark, end) || /\s/.test(text[end - 1])) continue;
    // `*` is not closed by the half of a `**`.
    if (mark.length === 1 && text[end + 1] === mark) {
      end += 1;
      continue;
    }
    if (mark[0] === "_" && word(text[end + mark.length])) continue;
    return end;
  }
  return -1;
}

/** The address if it is of a kind that is safe to follow. */
function safe(address) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    return new URL(address).href;
  } catch {
    return null;
  }
}

function link(href, children) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
