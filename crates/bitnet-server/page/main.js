// Puts the page together: conversations, models, views, key. The chat is in chat.js, the charts in
// metrics.js.

import * as api from "./api.js";
import { Chat, conversationItem } from "./chat.js";
import { byId, el, toast } from "./dom.js";
import { Metrics } from "./metrics.js";
import { applyTheme, openSettings, options } from "./settings.js";
import * as store from "./store.js";
import { newConversation } from "./tree.js";

const app = document.querySelector(".app");
const picker = byId("model");
let conversations = [];

applyTheme();

const chat = new Chat({
  model: () => picker.value,
  options,
  needKey: () => askForKey(),
  changed: () => {
    store.settings.set("open", chat.conversation.id);
    return listConversations();
  },
});
const metrics = new Metrics(byId("view-metrics"), { needKey: () => askForKey() });

// Conversations

async function listConversations() {
  conversations = await store.conversations();
  const items = conversations.map((conversation) => {
    const current = conversation.id === chat.conversation.id;
    return conversationItem(conversation, current, {
      open: () => open(conversation),
      rename: (title) => rename(conversation, title),
      remove: () => remove(conversation),
    });
  });
  const none = el("li", { className: "empty-list" }, "Nothing here yet");
  // A title that is being edited stays as it is.
  if (!byId("conversations").querySelector("input")) byId("conversations").replaceChildren(...(items.length ? items : [none]));
}

function open(conversation) {
  if (conversation.id !== chat.conversation.id) {
    chat.open(conversation);
    if (conversation.model && [...picker.options].some(({ value }) => value === conversation.model)) picker.value = conversation.model;
  }
  store.settings.set("open", conversation.id);
  location.hash = "#chat";
  closeMenu();
  listConversations();
}

async function rename(conversation, title) {
  const target = conversation.id === chat.conversation.id ? chat.conversation : conversation;
  target.title = title;
  byId("conversations").replaceChildren();
  await store.save(target);
  await listConversations();
}

async function remove(conversation) {
  if (conversation.id === chat.conversation.id) chat.open(newConversation());
  await store.remove(conversation.id);
  await listConversations();
  const undo = async () => {
    await store.save(conversation);
    await listConversations();
  };
  toast(`Deleted “${conversation.title || "New chat"}”`, { label: "Undo", run: undo });
}

function newChat() {
  open(newConversation());
  byId("prompt").focus();
}

// Another tab may have changed what is listed, or what is open here.
store.onChange(async (id) => {
  await listConversations();
  const fresh = conversations.find((conversation) => conversation.id === id);
  if (fresh && id === chat.conversation.id && !chat.busy) chat.open(fresh);
});

// Models

async function listModels() {
  try {
    const all = await api.models();
    const wanted = picker.value || store.settings.get("model");
    picker.replaceChildren(...all.map(({ id }) => el("option", { value: id }, id)));
    if (all.some(({ id }) => id === wanted)) picker.value = wanted;
    document.title = `${picker.value} · BitNet`;
    if (Object.keys(chat.conversation.turns).length === 0) chat.render();
  } catch (error) {
    if (error.status === 401) askForKey();
    else {
      toast(error.message, { label: "Try again", run: listModels });
    }
  }
  byId("docs-link").hidden = api.hasKey();
}
picker.onchange = () => {
  store.settings.set("model", picker.value);
  document.title = `${picker.value} · BitNet`;
  if (Object.keys(chat.conversation.turns).length === 0) chat.render();
};

// Key

function askForKey() {
  byId("key-reason").textContent = api.hasKey()
    ? "The server did not take the key it was sent."
    : "It goes into the requests to this server and nowhere else.";
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}
byId("key-cancel").onclick = () => byId("key-dialog").close();
byId("key-form").onsubmit = (event) => {
  event.preventDefault();
  api.setKey(byId("key").value, byId("key-keep").checked);
  byId("key-dialog").close();
  listModels();
};

// Views, menu, keys

function showView() {
  const name = location.hash === "#metrics" ? "metrics" : "chat";
  byId("view-chat").hidden = name !== "chat";
  byId("view-metrics").hidden = name !== "metrics";
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "metrics") metrics.start();
  else metrics.stop();
  closeMenu();
}
window.onhashchange = showView;

function openMenu() {
  app.dataset.menu = "";
  document.querySelector(".page").inert = true;
  byId("open-sidebar").ariaExpanded = "true";
  byId("close-sidebar").focus();
}
function closeMenu() {
  if (!("menu" in app.dataset)) return;
  delete app.dataset.menu;
  document.querySelector(".page").inert = false;
  byId("open-sidebar").ariaExpanded = "false";
  byId("open-sidebar").focus();
}
byId("open-sidebar").onclick = openMenu;
byId("close-sidebar").onclick = byId("scrim").onclick = closeMenu;
byId("new-chat").onclick = newChat;
byId("open-settings").onclick = () =>
  openSettings({
    conversation: chat.conversation,
    needKey: askForKey,
    changed: async (system) => {
      chat.conversation.system = system;
      if (Object.keys(chat.conversation.turns).length > 0) await store.save(chat.conversation);
    },
  });
document.onkeydown = (event) => {
  if (document.querySelector("dialog[open]")) return; // keys are the dialog's
  if (event.key === "Escape") {
    if ("menu" in app.dataset) closeMenu();
    else if (chat.busy) chat.stop();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    newChat();
  }
};

showView();
await listConversations();
const last = conversations.find(({ id }) => id === store.settings.get("open"));
if (last) open(last);
if (!(await store.persistent())) byId("fine-print").textContent = "This browser keeps no data: conversations last as long as this page.";
await listModels();
