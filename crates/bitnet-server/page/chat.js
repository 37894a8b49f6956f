// The chat view: the conversation that is open, its answer in the making, and the composer.

import { Answer } from "./answer.js";
import { announce, byId, el, icon } from "./dom.js";
import { MessageView, figure, welcome } from "./messages.js";
import * as store from "./store.js";
import { addTurn, messages, newConversation, path, select } from "./tree.js";

const scroller = byId("scroller");
const list = byId("messages");
const prompt = byId("prompt");
const send = byId("send");
const speed = byId("speed");

/** Closer to the end than this many pixels counts as reading along. */
const NEAR = 80;

export class Chat {
  #answer = null;
  #views = new Map();
  #follow = true;
  #frame = 0;

  /** `host` gives the model and the request's options, and hears of changes to the conversation. */
  constructor(host) {
    this.host = host;
    this.conversation = newConversation();
    byId("composer").onsubmit = (event) => {
      event.preventDefault();
      if (this.#answer) this.stop();
      else this.#submit();
    };
    prompt.onkeydown = (event) => this.#key(event);
    prompt.oninput = () => this.#composerChanged();
    scroller.onscroll = () => this.#scrolled();
    byId("to-bottom").onclick = () => this.#toEnd();
    this.render();
  }

  /** Whether an answer is being written. */
  get busy() {
    return this.#answer !== null;
  }

  /** Shows another conversation; what is being written for this one ends. */
  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.#follow = true;
    this.render();
    this.#toEnd();
    prompt.focus({ preventScroll: true });
  }

  /** Ends the answer that is being written. */
  stop() {
    this.#answer?.stop();
  }

  /** Draws all messages anew. */
  render() {
    this.#views.clear();
    const turns = path(this.conversation);
    const actions = {
      again: (turn) => this.#answerTo(this.conversation.turns[turn.parent]),
      edit: (turn, text) => this.#say(turn.parent, text),
      show: (turn) => {
        this.stop();
        select(this.conversation, turn);
        this.#save();
        this.render();
      },
    };
    const elements = turns.map((turn) => {
      const view = new MessageView(this.conversation, turn, actions);
      this.#views.set(turn.id, view);
      return view.element;
    });
    const pick = (idea) => {
      prompt.value = idea;
      this.#submit();
    };
    list.replaceChildren(...(elements.length ? elements : [welcome(this.host.model(), pick)]));
    this.#composerChanged();
  }

  #submit() {
    const text = prompt.value;
    if (!text.trim() || !this.host.model()) return;
    prompt.value = "";
    const last = path(this.conversation).at(-1);
    this.#say(last?.id ?? null, text);
  }

  /** Adds what a person said, and answers it. */
  #say(parent, text) {
    this.stop();
    const turn = addTurn(this.conversation, parent, "user", text);
    this.#answerTo(turn);
  }

  async #answerTo(question) {
    this.stop();
    const { conversation } = this;
    const model = this.host.model();
    const request = { ...this.host.options(), model, messages: messages(conversation, question) };
    const turn = addTurn(conversation, question.id, "assistant", "");
    turn.model = conversation.model = model;
    const answer = new Answer(turn, () => this.#answerChanged(answer));
    this.#answer = answer;
    this.#follow = true;
    this.render();
    this.#views.get(turn.id).refresh(true);
    this.#toEnd();
    announce("Answering");
    await this.#save(conversation);
    await answer.run(request);
    if (this.#answer === answer) this.#answer = null;
    this.#finished(conversation, answer);
    await this.#save(conversation);
  }

  /** Redraws at most once a frame, however fast tokens come. */
  #answerChanged(answer) {
    if (this.#frame || this.#answer !== answer) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#answer !== answer) return;
      this.#views.get(answer.turn.id)?.refresh(true);
      this.#showSpeed(answer.speed(), true);
      if (this.#follow) this.#toEnd();
    });
  }

  #finished(conversation, { turn }) {
    if (this.conversation !== conversation) return;
    this.#views.get(turn.id)?.refresh(false);
    if (this.#answer) return; // the next one has begun
    this.#showSpeed(turn.rate ?? null, false);
    this.#composerChanged();
    if (this.#follow) this.#toEnd();
    if (turn.status === 401) this.host.needKey();
    announce(turn.error ? "" : `Answer of ${turn.tokens ?? 0} tokens is complete`);
  }

  #showSpeed(rate, live) {
    speed.textContent = rate ? `${figure(rate)} tok/s` : "";
    speed.toggleAttribute("data-live", live);
  }

  async #save(conversation = this.conversation) {
    await store.save(conversation);
    this.host.changed();
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      if (!this.#answer) this.#submit();
    } else if (event.key === "ArrowUp" && prompt.value === "") {
      const mine = path(this.conversation).findLast(({ role }) => role === "user");
      const button = mine && this.#views.get(mine.id)?.tools.querySelector("[aria-label=Edit]");
      if (button) {
        event.preventDefault();
        button.click();
      }
    }
  }

  #composerChanged() {
    const busy = this.#answer !== null;
    send.ariaLabel = busy ? "Stop" : "Send";
    send.replaceChildren(icon(busy ? "i-stop" : "i-send"));
    send.disabled = !busy && prompt.value.trim() === "";
    if (!CSS.supports("field-sizing", "content")) {
      prompt.style.height = "auto";
      prompt.style.height = `${prompt.scrollHeight}px`;
    }
  }

  #scrolled() {
    this.#follow = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    byId("to-bottom").hidden = this.#follow;
  }

  #toEnd() {
    scroller.scrollTop = scroller.scrollHeight;
  }
}

/** One conversation in the list. */
export function conversationItem(conversation, current, { open, rename, remove }) {
  const title = conversation.title || "New chat";
  const attrs = current ? { "aria-current": "true" } : {};
  const button = el("button", { type: "button", className: "open", title, onclick: open, attrs }, title);
  const tool = (name, label, onclick) => el("button", { type: "button", title: label, onclick, attrs: { "aria-label": `${label}: ${title}` } }, icon(name));
  const edit = () => {
    const input = el("input", { type: "text", value: title, maxLength: 120, attrs: { "aria-label": "Title" } });
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      rename(keep && input.value.trim() ? input.value.trim() : title);
    };
    input.onkeydown = (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    };
    input.onblur = () => finish(true);
    item.replaceChildren(input);
    input.select();
  };
  const tools = el("span", { className: "tools" }, tool("i-edit", "Rename", edit), tool("i-trash", "Delete", remove));
  const item = el("li", { className: "conversation" }, button, tools);
  if (current) item.dataset.current = "";
  return item;
}
