// What this browser keeps: conversations in IndexedDB, settings in localStorage. Where neither is
// allowed, memory takes their place and everything is gone with the page.

const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("bitnet") : null;

const opened = new Promise((resolve) => {
  let request;
  try {
    request = indexedDB.open("bitnet", 1);
  } catch {
    resolve(null);
    return;
  }
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = request.onblocked = () => resolve(null);
});
const memory = new Map();

async function inStore(mode, use) {
  const database = await opened;
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("conversations", mode);
    const request = use(transaction.objectStore("conversations"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** Whether conversations outlive the page. */
export const persistent = async () => (await opened) !== null;

/** All conversations, newest first. */
export async function conversations() {
  const all = (await inStore("readonly", (store) => store.getAll())) ?? [...memory.values()];
  return all.sort((a, b) => b.updated - a.updated);
}

/** Keeps a conversation as it is now. */
export async function save(conversation) {
  const copy = structuredClone(conversation);
  memory.set(copy.id, copy);
  await inStore("readwrite", (store) => store.put(copy));
  channel?.postMessage(copy.id);
}

/** Forgets a conversation. */
export async function remove(id) {
  memory.delete(id);
  await inStore("readwrite", (store) => store.delete(id));
  channel?.postMessage(id);
}

/** Calls back when another tab has changed a conversation. */
export function onChange(callback) {
  channel?.addEventListener("message", ({ data }) => callback(data));
}

const SETTINGS = "bitnet.settings";

/** The settings, and a way to keep them. */
export const settings = (() => {
  let values = {};
  try {
    values = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") ?? {};
  } catch {
    // turned off, or not ours: begin anew
  }
  return {
    get: (name) => values[name],
    set(name, value) {
      values[name] = value;
      try {
        localStorage.setItem(SETTINGS, JSON.stringify(values));
      } catch {
        // they last as long as the page
      }
    },
  };
})();
