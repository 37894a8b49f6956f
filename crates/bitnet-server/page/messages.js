// The messages of a conversation on the page. Turns come from the tree; what a person does with one
// of them goes back through `actions`.

import { copy, el, icon, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";
import { siblings } from "./tree.js";

/** A number as people read it. */
export const figure = (value) => (value === 0 ? "0" : value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(1));
/** Milliseconds as people read them. */
export const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`);

/** The element of one turn. */
export class MessageView {
  constructor(conversation, turn, actions) {
    Object.assign(this, { conversation, turn, actions });
    const who = turn.role === "user" ? "You" : turn.model ?? "Answer";
    this.body = el("div", { className: "body" });
    this.tools = el("div", { className: "tools" });
    const heading = el("h2", { className: "visually-hidden" }, who);
    this.element = el("article", { className: `message ${turn.role}` }, heading, this.body, this.tools);
    if (turn.role === "assistant") {
      this.text = el("div", { className: "text" });
      this.markdown = new Markdown(this.text);
      this.body.append(this.text);
    }
    this.refresh(false);
  }

  /** Shows the turn as it is; `live` while it grows. */
  refresh(live) {
    const { turn } = this;
    this.element.ariaBusy = String(live);
    if (turn.role === "user") {
      this.body.textContent = turn.text;
    } else {
      this.markdown.update(turn.text);
      this.waiting?.remove();
      this.waiting = null;
      if (live && turn.text === "") {
        this.waiting = el("span", { className: "thinking", attrs: { role: "img", "aria-label": "Waiting for the first token" } }, el("i"), el("i"), el("i"));
        this.body.append(this.waiting);
      }
      if (turn.error && !this.error) {
        this.error = el("p", { className: "error", attrs: { role: "alert" } }, turn.error);
        this.body.append(this.error);
      }
    }
    if (!live || !this.wasLive) this.#showTools(live);
    this.wasLive = live;
  }

  #showTools(live) {
    const { turn, actions } = this;
    if (live) {
      this.tools.replaceChildren();
      return;
    }
    const button = iconButton("i-copy", "Copy", () => copy(turn.text, button));
    const change =
      turn.role === "user"
        ? iconButton("i-edit", "Edit", () => this.#edit())
        : iconButton("i-again", "Answer again", () => actions.again(turn));
    this.tools.replaceChildren(...[this.#versions(), button, change, this.#stats()].filter(Boolean));
  }

  /** `‹ 2/3 ›` where a message was edited or answered again. */
  #versions() {
    const all = siblings(this.conversation, this.turn.parent);
    if (all.length < 2) return null;
    const at = all.findIndex(({ id }) => id === this.turn.id);
    const step = (by, name, label) => {
      const button = iconButton(name, label, () => this.actions.show(all[at + by]));
      button.disabled = !all[at + by];
      return button;
    };
    const count = el("span", { attrs: { "aria-label": `Version ${at + 1} of ${all.length}` } }, `${at + 1}/${all.length}`);
    return el("span", { className: "versions" }, step(-1, "i-left", "Earlier version"), count, step(1, "i-right", "Later version"));
  }

  #stats() {
    const { tokens, rate, firstTokenMs, finish } = this.turn;
    const parts = [];
    if (tokens) parts.push(`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`);
    if (rate) parts.push(`${figure(rate)} tok/s`);
    if (firstTokenMs !== undefined) parts.push(`first after ${duration(firstTokenMs)}`);
    if (finish === "length") parts.push("cut off by the length limit");
    if (finish === "stopped") parts.push("stopped");
    return parts.length ? el("span", { className: "stats" }, parts.join(" · ")) : null;
  }

  #edit() {
    const area = el("textarea", { value: this.turn.text, attrs: { "aria-label": "Edit message" } });
    const close = () => {
      form.replaceWith(this.body);
      this.tools.hidden = false;
      this.tools.querySelector("[aria-label=Edit]")?.focus();
    };
    const cancel = el("button", { type: "button", className: "quiet-button", onclick: close }, "Cancel");
    const send = el("button", { className: "primary" }, "Send");
    const form = el("form", { className: "edit" }, area, el("div", { className: "buttons" }, cancel, send));
    form.onsubmit = (event) => {
      event.preventDefault();
      if (area.value.trim()) this.actions.edit(this.turn, area.value);
    };
    form.onkeydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    };
    this.body.replaceWith(form);
    this.tools.hidden = true;
    area.focus();
  }
}

/** What stands where no message is yet. */
export function welcome(model, onPick) {
  const builtin = model === "builtin";
  const text = builtin
    ? "The built-in model is tiny and was trained on old children's books: it continues a story without much sense. Serve a larger model to get answers."
    : "Ask something, or begin with one of these.";
  const ideas = builtin
    ? ["Once upon a time", "There was once a little girl who", "The old king looked at the sea and"]
    : ["Explain ternary weights to a ten-year-old", "Write a short poem about rain", "Sort a list in Rust, with an example"];
  const button = (idea) => el("button", { type: "button", onclick: () => onPick(idea) }, idea);
  return el(
    "div", { className: "welcome" }, icon("logo"), el("h2", {}, builtin ? "Begin a story" : "What is on your mind?"),
    el("p", {}, model ? text : "Waiting for the server's models."), el("div", { className: "suggestions" }, ...(model ? ideas.map(button) : [])),
  );
}

