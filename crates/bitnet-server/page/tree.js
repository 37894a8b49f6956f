// A conversation as a tree: each turn knows its parent, and editing a message or asking again adds a
// sibling, so that nothing is lost. What is shown is the path of selected turns from the root.
// Knows no page and no server.

let last = 0;
const newId = () => `${Date.now().toString(36)}${(last++).toString(36)}${Math.random().toString(36).slice(2, 6)}`;

/** A conversation without turns. */
export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", system: "", created: now, updated: now, turns: {}, selected: {} };
}

const ROOT = "root";
const keyOf = (parent) => parent ?? ROOT;

/** Turns with this parent, oldest first. */
export function siblings(conversation, parent) {
  return Object.values(conversation.turns).filter((turn) => turn.parent === parent);
}

/** Adds a turn below `parent` (null for the root) and selects it. */
export function addTurn(conversation, parent, role, text) {
  const turn = { id: newId(), parent, role, text };
  conversation.turns[turn.id] = turn;
  conversation.selected[keyOf(parent)] = turn.id;
  conversation.updated = Date.now();
  if (!conversation.title && role === "user") conversation.title = titleFor(text);
  return turn;
}

/** Selects a turn among its siblings. */
export function select(conversation, turn) {
  conversation.selected[keyOf(turn.parent)] = turn.id;
}

/** The selected turns from the root. */
export function path(conversation) {
  const turns = [];
  let id = conversation.selected[ROOT];
  while (id && conversation.turns[id]) {
    turns.push(conversation.turns[id]);
    id = conversation.selected[id];
  }
  return turns;
}

/** The messages to send for an answer below `turn`. */
export function messages(conversation, turn) {
  const turns = path(conversation);
  const until = turns.findIndex(({ id }) => id === turn.id) + 1;
  // An answer that failed before its first token says nothing to the model.
  const said = turns.slice(0, until).filter(({ text }) => text !== "");
  const list = said.map(({ role, text }) => ({ role, content: text }));
  const system = conversation.system.trim();
  return system ? [{ role: "system", content: system }, ...list] : list;
}

/** The first words of a text. */
export function titleFor(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 48 ? `${line.slice(0, 47).trimEnd()}…` : line || "New chat";
}
