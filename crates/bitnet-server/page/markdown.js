// Markdown as documents have it: headings, lists, quotes, tables, fenced code. A text that grows is
// split into blocks, and only blocks that changed are made anew.

import { copy, el, icon } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 6;
// None of these can take more than linear time, whatever an answer holds.
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;

/** Shows a text that may still grow in an element. */
export class Markdown {
  #shown = [];

  constructor(container) {
    this.container = container;
  }

  /** Shows this text from now on. */
  update(text) {
    const blocks = split(text.split("\n"));
    blocks.forEach((lines, i) => {
      const source = lines.join("\n");
      const before = this.#shown[i];
      if (before?.source === source) return;
      const node = block(lines, 0);
      if (before) before.node.replaceWith(node);
      else this.container.append(node);
      this.#shown[i] = { source, node };
    });
    for (const { node } of this.#shown.splice(blocks.length)) node.remove();
  }
}

/** The lines of each block. */
function split(lines) {
  const blocks = [];
  let open = null;
  const start = (kind, line) => {
    open = { kind, lines: [line] };
    blocks.push(open.lines);
  };
  lines.forEach((line, i) => {
    if (open?.kind === "fence") {
      open.lines.push(line);
      const close = line.trim();
      if (close.startsWith(open.mark) && close.replaceAll(open.mark[0], "") === "") open = null;
      return;
    }
    const fence = FENCE.exec(line);
    if (fence && !(open?.kind === "list" && /^\s/.test(line))) {
      start("fence", line);
      open.mark = fence[1];
    } else if (line.trim() === "") {
      // A list goes on over an empty line if what follows belongs to it.
      const next = lines.slice(i + 1).find((later) => later.trim() !== "");
      const goesOn = open?.kind === "list" && next !== undefined && (/^\s{2,}/.test(next) || sameList(open.lines[0], next));
      if (goesOn) open.lines.push(line);
      else open = null;
    } else if (open?.kind === "list") {
      const ends = !/^\s/.test(line) && (HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || (ITEM.test(line) && !sameList(open.lines[0], line)));
      if (ends) begin(line, i);
      else open.lines.push(line);
    } else if (open?.kind === "quote" && !ITEM.test(line) && !HEADING.test(line)) {
      open.lines.push(line);
    } else if (open?.kind === "table" && line.includes("|")) {
      open.lines.push(line);
    } else if (open?.kind === "paragraph" && !HEADING.test(line) && !RULE.test(line) && !QUOTE.test(line) && !ITEM.test(line) && !isTable(i)) {
      open.lines.push(line);
    } else {
      begin(line, i);
    }
  });
  return blocks;

  function isTable(i) {
    return lines[i].includes("|") && isDivider(lines[i + 1] ?? "");
  }
  function begin(line, i) {
    if (HEADING.test(line) || RULE.test(line)) {
      start("single", line);
      open = null;
    } else if (QUOTE.test(line)) start("quote", line);
    else if (ITEM.test(line)) start("list", line);
    else if (isTable(i)) start("table", line);
    else start("paragraph", line);
  }
}

function isDivider(line) {
  return cells(line).every((cell) => /^:?-+:?$/.test(cell));
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function sameList(first, line) {
  const [a, b] = [ITEM.exec(first), ITEM.exec(line)];
  return Boolean(a && b) && /\d/.test(a[2]) === /\d/.test(b[2]);
}

function block(lines, depth) {
  const [first] = lines;
  const fence = FENCE.exec(first);
  if (fence) return codeBlock(lines, fence);
  const heading = HEADING.exec(first);
  if (heading) {
    // The page's own headings stand above those of an answer.
    const level = heading[1].length;
    const text = heading[2].trimEnd().replace(/(^|\s)#+$/, "");
    return el(`h${Math.min(6, Math.max(3, level + 1))}`, { className: `h${level}` }, ...inline(text));
  }
  if (RULE.test(first)) return el("hr");
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(first)) return el("blockquote", {}, ...blocksOf(lines.map((line) => QUOTE.exec(line)?.[1] ?? line), depth + 1));
    if (ITEM.test(first)) return list(lines, depth + 1);
  }
  if (lines.length > 1 && first.includes("|") && isDivider(lines[1])) return table(lines);
  return el("p", {}, ...inline(lines.join("\n").trim()));
}

function blocksOf(lines, depth) {
  return split(lines).map((inner) => block(inner, depth));
}

function codeBlock(lines, [, mark, info]) {
  const [language] = info.trim().split(/\s/);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
  const code = lines.slice(1, closed ? -1 : undefined).join("\n");
  const button = el("button", { type: "button" }, icon("i-copy"), "Copy");
  button.onclick = () => copy(code, button);
  const head = el("div", { className: "code-head" }, el("span", {}, language || "text"), button);
  const label = language ? `Code, ${language}` : "Code";
  const pre = el("pre", { tabIndex: 0, attrs: { role: "region", "aria-label": label } }, el("code", {}, ...highlight(code, language)));
  return el("div", { className: "code-block" }, head, pre);
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) {
      width = item[1].length + item[2].length + Math.max(1, item[3].length);
      items.push([item[4]]);
    } else {
      const cut = Math.min(width, line.length - line.trimStart().length);
      items.at(-1).push(line.slice(cut));
    }
  }
  const loose = lines.some((line, i) => line.trim() === "" && i < lines.length - 1);
  const nodes = items.map((item) => listItem(item, loose, depth));
  if (!/\d/.test(mark)) return el("ul", {}, ...nodes);
  return el("ol", { start: Number.parseInt(mark, 10) }, ...nodes);
}

function listItem(lines, loose, depth) {
  const task = /^\[([ xX])\]\s+(.*)$/.exec(lines[0]);
  if (task) lines = [task[2], ...lines.slice(1)];
  let children = blocksOf(lines, depth);
  if (!loose) children = children.flatMap((node) => (node.tagName === "P" ? [...node.childNodes] : [node]));
  if (!task) return el("li", {}, ...children);
  const attrs = { "aria-label": task[1] === " " ? "to do" : "done" };
  const box = el("input", { type: "checkbox", checked: task[1] !== " ", disabled: true, attrs });
  return el("li", { className: "task" }, box, " ", ...children);
}

function table(lines) {
  const align = cells(lines[1]).map((cell) => (/^:.*:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : ""));
  const head = cells(lines[0]);
  const row = (line, tag) => {
    const values = cells(line);
    return el("tr", {}, ...head.map((_, i) => el(tag, { className: align[i] ?? "" }, ...inline(values[i] ?? ""))));
  };
  const body = lines.slice(2).map((line) => row(line, "td"));
  const content = el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, ...body));
  return el("div", { className: "table", tabIndex: 0, attrs: { role: "region", "aria-label": "Table" } }, content);
}
