// One answer while it is written: sends the conversation, counts tokens and time, can be stopped.
// Knows no page; `onUpdate` is called whenever the turn has changed.

import { chat } from "./api.js";

/** Rates are of the last this many milliseconds. */
const WINDOW = 1500;

/** Writes an answer into `turn`, whose text and figures grow. */
export class Answer {
  #abort = new AbortController();
  #marks = [];

  constructor(turn, onUpdate) {
    this.turn = turn;
    this.onUpdate = onUpdate;
  }

  /** Ends the answer where it is; the server stops computing it. */
  stop() {
    this.#abort.abort();
  }

  /** Tokens a second, lately; null before there are two. */
  speed() {
    const [first, last] = [this.#marks[0], this.#marks.at(-1)];
    if (!first || last.at === first.at) return null;
    return ((last.tokens - first.tokens) * 1000) / (last.at - first.at);
  }

  /** Sends `request` and returns when the answer has ended, well or not. */
  async run(request) {
    const { turn } = this;
    const start = performance.now();
    let firstToken = null;
    let lastToken = null;
    try {
      for await (const chunk of chat(request, this.#abort.signal)) {
        const choice = chunk.choices[0];
        const now = performance.now();
        if (choice?.delta?.content) {
          firstToken ??= now;
          lastToken = now;
          turn.text += choice.delta.content;
        }
        if (choice?.finish_reason) turn.finish = choice.finish_reason;
        if (chunk.usage) {
          turn.tokens = chunk.usage.completion_tokens;
          turn.promptTokens = chunk.usage.prompt_tokens;
          this.#mark(now, turn.tokens);
        }
        this.onUpdate();
      }
    } catch (error) {
      turn.finish = error.name === "AbortError" ? "stopped" : "error";
      if (turn.finish === "error") {
        turn.error = error.message;
        turn.status = error.status;
      }
    }
    if (firstToken !== null) {
      turn.firstTokenMs = firstToken - start;
      if (turn.tokens > 1 && lastToken > firstToken) turn.rate = ((turn.tokens - 1) * 1000) / (lastToken - firstToken);
    }
    this.onUpdate();
  }

  #mark(at, tokens) {
    if (this.#marks.at(-1)?.tokens === tokens) return;
    this.#marks.push({ at, tokens });
    while (this.#marks.length > 2 && at - this.#marks[0].at > WINDOW) this.#marks.shift();
  }
}
