// The sheet with the system prompt, sampling, key and appearance. Fields left empty are not sent: the
// server's defaults hold then, and are shown in their place.

import { hasKey, setKey } from "./api.js";
import { byId, el, iconButton } from "./dom.js";
import { settings } from "./store.js";

const dialog = byId("settings");

/** Name in the request, label, what it does, default, and bounds. */
const SLIDERS = [
  ["temperature", "Temperature", "Lower is steadier, higher is wilder; 0 always takes the likeliest token.", 1, 0, 2, 0.05],
  ["top_p", "Top-p", "Keep the likeliest tokens that together reach this probability.", 1, 0, 1, 0.01],
  ["min_p", "Min-p", "Keep tokens at least this fraction as likely as the likeliest.", 0, 0, 1, 0.01],
  ["repetition_penalty", "Repetition penalty", "Above 1, recent tokens become less likely.", 1, 0.5, 2, 0.01],
];
const NUMBERS = [
  ["top_k", "Top-k", "all", 0, 1_000_000],
  ["max_completion_tokens", "Longest answer", "to the end", 1, 1_000_000],
  ["seed", "Seed", "random", 0, Number.MAX_SAFE_INTEGER],
];

const sampling = () => settings.get("sampling") ?? {};

function keep(name, value) {
  const values = { ...sampling() };
  if (value === undefined || value === null || Number.isNaN(value)) delete values[name];
  else values[name] = value;
  settings.set("sampling", values);
}

/** The fields to add to a request. */
export function options() {
  const { stop, ...values } = sampling();
  const stops = (stop ?? "").split("\n").filter((line) => line !== "");
  return stops.length ? { ...values, stop: stops } : values;
}

/** Applies the theme chosen: `light`, `dark`, or the system's. */
export function applyTheme() {
  const theme = settings.get("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** Opens the sheet. `host` has the conversation and hears of changes to it and to the key. */
export function openSettings(host) {
  const close = iconButton("i-close", "Close", () => dialog.close());
  close.className = "icon-button";
  const head = el("div", { className: "sheet-head" }, el("h2", { id: "settings-title" }, "Settings"), close);
  byId("settings-form").replaceChildren(head, conversationFields(host), samplingFields(host), keyFields(host), themeFields(), keys());
  // A click beside the sheet closes it.
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.showModal();
}

function conversationFields({ conversation, changed }) {
  const area = el("textarea", { id: "system", value: conversation.system, placeholder: "None" });
  area.onchange = () => changed(area.value);
  return el(
    "fieldset", {}, el("legend", {}, "This conversation"),
    el("div", { className: "field" }, el("label", { htmlFor: "system" }, "System prompt"), area,
      el("p", { className: "hint" }, "Stands before every message of this conversation.")),
  );
}

function samplingFields(host) {
  const reset = el("button", { type: "button", className: "quiet-button" }, "Use the server's defaults");
  reset.onclick = () => {
    settings.set("sampling", {});
    openAgain(host);
  };
  const stop = el("textarea", { id: "stop", value: sampling().stop ?? "", placeholder: "None", rows: 2 });
  stop.style.minHeight = "3.2rem";
  stop.onchange = () => keep("stop", stop.value || undefined);
  return el(
    "fieldset", {}, el("legend", {}, "Sampling"), ...SLIDERS.map(slider), el("div", { className: "pair" }, ...NUMBERS.map(number)),
    el("div", { className: "field" }, el("label", { htmlFor: "stop" }, "Stop texts, one a line"), stop),
    el("div", { className: "buttons" }, reset),
  );
}

function openAgain(host) {
  dialog.close();
  openSettings(host);
}

function slider([name, label, hint, standard, min, max, step]) {
  const value = sampling()[name];
  const shown = el("output", { htmlFor: name });
  const describe = (value) => {
    shown.textContent = value === undefined ? `${standard} (default)` : String(value);
  };
  const input = el("input", { type: "range", id: name, min, max, step, value: value ?? standard, attrs: { "aria-describedby": `${name}-hint` } });
  input.oninput = () => {
    keep(name, input.valueAsNumber);
    describe(input.valueAsNumber);
  };
  describe(value);
  return el("div", { className: "field" }, el("div", { className: "label" }, el("label", { htmlFor: name }, label), shown), input, el("p", { className: "hint", id: `${name}-hint` }, hint));
}

function number([name, label, placeholder, min, max]) {
  const value = sampling()[name] ?? "";
  const input = el("input", { type: "number", id: name, min, max, step: 1, value, placeholder });
  input.onchange = () => {
    if (input.validity.valid) keep(name, input.value === "" ? undefined : input.valueAsNumber);
    else input.reportValidity();
  };
  return el("div", { className: "field" }, el("label", { htmlFor: name }, label), input);
}

function keyFields(host) {
  const change = el("button", { type: "button", className: "quiet-button" }, hasKey() ? "Change" : "Enter a key");
  change.onclick = () => {
    dialog.close();
    host.needKey();
  };
  const forget = el("button", { type: "button", className: "quiet-button" }, "Forget");
  forget.onclick = () => {
    setKey("");
    openAgain(host);
  };
  const state = el("p", {}, hasKey() ? "A key is in use." : "No key is in use.");
  return el("fieldset", {}, el("legend", {}, "API key"), state, el("div", { className: "buttons" }, ...(hasKey() ? [forget] : []), change));
}

function themeFields() {
  const choice = (value, label) => {
    const input = el("input", { type: "radio", name: "theme", value, checked: (settings.get("theme") ?? "system") === value });
    input.onchange = () => {
      settings.set("theme", value);
      applyTheme();
    };
    return el("label", {}, input, label);
  };
  const choices = [choice("system", "System"), choice("light", "Light"), choice("dark", "Dark")];
  return el("fieldset", {}, el("legend", {}, "Appearance"), el("div", { className: "segmented" }, ...choices));
}

function keys() {
  const rows = [["Enter", "send"], ["Shift Enter", "new line"], ["Escape", "stop the answer"], ["↑", "in an empty field: edit the last message"], ["Alt N", "new chat"]];
  const row = ([names, what]) => [el("dt", {}, ...names.split(" ").flatMap((name) => [el("kbd", {}, name), " "])), el("dd", {}, what)];
  return el("fieldset", {}, el("legend", {}, "Keys"), el("dl", { className: "keys" }, ...rows.flatMap(row)));
}
