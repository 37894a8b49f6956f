// Talking to the server that sent this page: its key, its models, its metrics, its streams.
// Paths are relative, so that the page also works behind a proxy that gives it a folder.

const KEY = "bitnet.key";

function stores() {
  try {
    return [sessionStorage, localStorage];
  } catch {
    return []; // storage is turned off; the key then lasts as long as the page
  }
}

let key = stores().map((store) => store.getItem(KEY)).find(Boolean) ?? "";

/** Whether a key is known. */
export const hasKey = () => key !== "";

/** Uses a key from now on; `keep` beyond this tab. An empty one forgets. */
export function setKey(value, keep = false) {
  key = value.trim();
  for (const store of stores()) store.removeItem(KEY);
  const [session, local] = stores();
  if (key && session) (keep ? local : session).setItem(KEY, key);
}

/** What the server, or the way to it, had to say against a request. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    const init = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
    response = await fetch(path, body ? { ...init, body: JSON.stringify(body) } : init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const { message = `The server answered ${response.status}.`, code = null } = answer.error ?? {};
  throw new ApiError(message, response.status, code);
}

/** The models on offer. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** `/metrics` as it is. */
export async function metricsText(signal) {
  return (await request("metrics", { signal })).text();
}

/** The chunks of a streamed chat answer. */
export async function* chat(body, signal) {
  const stream_options = { include_usage: true, continuous_usage_stats: true };
  const response = await request("v1/chat/completions", { body: { ...body, stream: true, stream_options }, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 0, chunk.error.code);
    yield chunk;
  }
  throw new ApiError("The connection ended in the middle of the answer.");
}

/** The `data` of server-sent events. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
