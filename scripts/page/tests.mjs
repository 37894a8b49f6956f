// What the page must do. Each test has a browser of its own; `watch` in run.mjs fails any that makes a
// script error, breaks the page's policy, or asks another server for anything.

import assert from "node:assert/strict";

const DARK = { colorScheme: "dark" };
const PHONE = { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true };
const RICH = `Ternary weights are **−1**, **0** or **+1**: *no multiplications*.

\`\`\`rust
/// Adds, subtracts or skips.
pub fn dot(trits: &[i8], x: &[i32]) -> i32 {
    let mut sum = 0; // "exact"
    for (t, v) in trits.iter().zip(x) { sum += i32::from(*t) * v; }
    sum
}
\`\`\`

## Why it is fast

1. Memory traffic shrinks by about **8×**.
2. Sums are exact.
   - threads may split the work
   - batches may be of any size

| packing | bits |
|:--|--:|
| I2_S | 2.0 |

> A model of two billion weights fits in half a gigabyte.

- [x] read the file

See https://example.org/paper and [the text](https://example.org/docs).`;

/** Answers chat requests in the server's place with this text, in pieces. */
async function answerWith(page, text, size = 7) {
  const pieces = text.match(new RegExp(`[^]{1,${size}}`, "gu")) ?? [];
  const chunk = (choices, tokens) => `data: ${JSON.stringify({ choices, usage: { prompt_tokens: 3, completion_tokens: tokens } })}\n\n`;
  const body = pieces.map((content, i) => chunk([{ index: 0, delta: { content } }], i + 1)).join("");
  const end = chunk([{ index: 0, delta: {}, finish_reason: "stop" }], pieces.length);
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body: `${body}${end}data: [DONE]\n\n` }));
}

async function say(page, text) {
  await page.getByLabel("Message", { exact: true }).fill(text);
  await page.keyboard.press("Enter");
}

/** Waits until the last answer is whole; its text. */
async function answered(page) {
  const last = page.locator(".message.assistant").last();
  await last.locator(".stats, .error").first().waitFor();
  return last.locator(".text").innerText();
}

async function set(page, fields) {
  await page.getByRole("button", { name: "Settings" }).click();
  for (const [label, value] of Object.entries(fields)) {
    const field = page.getByLabel(label, { exact: true });
    await field.fill(String(value));
    await field.blur();
  }
  await page.keyboard.press("Escape");
}

/** The chat requests the page sends from now on. */
function requests(page) {
  const bodies = [];
  page.on("request", (request) => {
    if (request.url().endsWith("/v1/chat/completions")) bodies.push(request.postDataJSON());
  });
  return bodies;
}

async function ready(page) {
  await page.locator("#model option").first().waitFor({ state: "attached" });
}

const list = (page) => page.getByRole("navigation").getByRole("listitem");

export const tests = [
  {
    name: "an answer streams and says its speed",
    async run({ page, shot }) {
      await ready(page);
      await set(page, { "Longest answer": 40, Seed: 7 });
      const sent = requests(page);
      await say(page, "Once upon a time");
      const text = await answered(page);
      assert.ok(text.length > 20, text);
      const stats = await page.locator(".stats").innerText();
      assert.match(stats, /^40 tokens · [\d.,]+ tok\/s · first after [\d.]+ m?s · cut off by the length limit$/);
      assert.match(await page.locator("#speed").innerText(), /tok\/s$/);
      assert.deepEqual(sent[0].messages, [{ role: "user", content: "Once upon a time" }]);
      assert.equal(sent[0].max_completion_tokens, 40);
      assert.equal(sent[0].seed, 7);
      assert.equal(sent[0].temperature, undefined);
      await shot("story");
    },
  },
  {
    name: "text appears while the answer is written, and stopping ends it on the server",
    async run({ page, url }) {
      await ready(page);
      // So many answers to the end of the context that they are stopped long before.
      const running = async () => /^bitnet_sequences_running\{model_name="twin"\} ([\d.]+)/m.exec(await (await fetch(`${url}/metrics`)).text())?.[1];
      await page.getByLabel("Model").selectOption("twin");
      await page.route("**/v1/chat/completions", (route) => route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true, n: 100 }) }));
      for (const stop of ["Escape", "button"]) {
        await say(page, "Tell me a story");
        await page.waitForFunction(() => [...document.querySelectorAll(".message.assistant .text")].at(-1)?.innerText.length > 30);
        assert.equal(await page.locator(".message.assistant").last().getAttribute("aria-busy"), "true");
        assert.match(await page.locator("#speed[data-live]").innerText(), /tok\/s$/);
        if (stop === "Escape") await page.keyboard.press("Escape");
        else await page.getByRole("button", { name: "Stop" }).click();
        await answered(page);
        assert.match(await page.locator(".stats").last().innerText(), /stopped$/);
        const deadline = Date.now() + 3000;
        while ((await running()) !== "0" && Date.now() < deadline);
        assert.equal(await running(), "0");
      }
    },
  },
  {
    name: "answering again and editing keep every version",
    async run({ page, axe, shot }) {
      await ready(page);
      await set(page, { "Longest answer": 12 });
      await say(page, "The king");
      const first = await answered(page);
      await page.getByRole("button", { name: "Answer again" }).click();
      await page.getByLabel("Version 2 of 2").waitFor();
      const second = await answered(page);
      assert.notEqual(first, second, "without a seed two answers differ");
      await page.getByRole("button", { name: "Earlier version" }).click();
      assert.equal(await answered(page), first);

      const sent = requests(page);
      await page.getByRole("button", { name: "Edit", exact: true }).click();
      await page.getByLabel("Edit message").fill("The queen");
      await axe();
      await page.keyboard.press("Control+Enter");
      await page.locator(".message.user").getByText("The queen").waitFor();
      await answered(page);
      assert.deepEqual(sent[0].messages, [{ role: "user", content: "The queen" }]);
      await shot("versions");
      await page.getByRole("button", { name: "Earlier version" }).first().click();
      assert.equal(await page.locator(".message.user .body").innerText(), "The king");
      assert.equal(await answered(page), first);
      await page.reload();
      assert.equal(await page.locator(".message.user .body").innerText(), "The king");
    },
  },
  {
    name: "conversations are kept, renamed, deleted and brought back",
    async run({ page }) {
      await ready(page);
      await answerWith(page, "Yes.");
      await say(page, "First question");
      await answered(page);
      await page.keyboard.press("Alt+n");
      await page.getByRole("heading", { name: "Begin a story" }).waitFor();
      await say(page, "Second question");
      await answered(page);
      assert.equal(await list(page).count(), 2);
      await page.reload();
      assert.equal(await page.locator(".message.user .body").innerText(), "Second question");
      await page.getByRole("button", { name: "First question", exact: true }).click();
      assert.equal(await page.locator(".message.user .body").innerText(), "First question");

      await page.getByRole("button", { name: "Rename: First question" }).click();
      await page.getByLabel("Title").fill("Kept");
      await page.keyboard.press("Enter");
      await page.getByRole("button", { name: "Kept", exact: true }).waitFor();
      await page.getByRole("button", { name: "Delete: Kept" }).click();
      await page.getByRole("heading", { name: "Begin a story" }).waitFor();
      assert.equal(await list(page).count(), 1);
      await page.getByRole("button", { name: "Undo" }).click();
      await page.getByRole("button", { name: "Kept", exact: true }).click();
      assert.equal(await page.locator(".message.user .body").innerText(), "First question");
    },
  },
  {
    name: "two tabs agree",
    async run({ page, context, url }) {
      await ready(page);
      const other = await context.newPage();
      await other.goto(url);
      await answerWith(page, "Here.");
      await say(page, "Seen in both");
      await answered(page);
      await other.getByRole("button", { name: "Seen in both", exact: true }).click();
      assert.equal(await other.locator(".message.assistant .text").innerText(), "Here.");
    },
  },
  {
    name: "settings reach the request and can be taken back",
    async run({ page }) {
      await ready(page);
      await answerWith(page, "Yes.");
      await set(page, { "System prompt": "Be brief.", Temperature: 0.5, "Top-p": 0.9, "Min-p": 0.05, "Repetition penalty": 1.1, "Top-k": 40, "Longest answer": 9, Seed: 3, "Stop texts, one a line": "END\nSTOP" });
      const sent = requests(page);
      await say(page, "Hello");
      await answered(page);
      const { stream, stream_options, model, messages, ...rest } = sent[0];
      assert.deepEqual(messages, [{ role: "system", content: "Be brief." }, { role: "user", content: "Hello" }]);
      assert.deepEqual(rest, { temperature: 0.5, top_p: 0.9, min_p: 0.05, repetition_penalty: 1.1, top_k: 40, max_completion_tokens: 9, seed: 3, stop: ["END", "STOP"] });
      assert.equal(model, "builtin");
      await page.reload();
      await page.getByRole("button", { name: "Settings" }).click();
      assert.equal(await page.getByLabel("System prompt").inputValue(), "Be brief.");
      await page.getByRole("button", { name: "Use the server's defaults" }).click();
      await page.keyboard.press("Escape");
      await say(page, "Again");
      await page.locator(".message.assistant .stats").nth(1).waitFor();
      assert.equal(sent[1].temperature, undefined);
      assert.equal(sent[1].stop, undefined);
      // The same server takes all of them.
      await page.unroute("**/v1/chat/completions");
      await set(page, { Temperature: 0.5, "Top-p": 0.9, "Min-p": 0.05, "Repetition penalty": 1.1, "Top-k": 40, "Longest answer": 9, Seed: 3, "Stop texts, one a line": "END" });
      await say(page, "Once more");
      await page.locator(".message.assistant .stats").nth(2).waitFor();
      assert.equal(await page.locator(".error").count(), 0);
    },
  },
  {
    name: "markdown becomes elements",
    async run({ page, axe, shot }) {
      await ready(page);
      await answerWith(page, RICH);
      await say(page, "How do ternary weights work?");
      await answered(page);
      const text = page.locator(".message.assistant .text");
      for (const [selector, content] of [
        ["strong >> nth=0", "−1"], ["em", "no multiplications"], ["h3", "Why it is fast"], ["ol > li >> nth=0", "Memory traffic shrinks by about 8×."],
        ["ol ul > li >> nth=1", "batches may be of any size"], ["th >> nth=1", "bits"], ["td.right", "2.0"], ["blockquote", "A model of two billion weights fits in half a gigabyte."],
        [".tok-k >> nth=0", "pub"], [".tok-c >> nth=0", "/// Adds, subtracts or skips."], ["a >> nth=0", "https://example.org/paper"], ["a >> nth=1", "the text"],
      ]) {
        assert.equal(await text.locator(selector).innerText(), content, selector);
      }
      assert.equal(await text.locator("li.task input").isChecked(), true);
      const code = await text.locator("pre").innerText();
      assert.ok(code.startsWith("/// Adds") && code.endsWith("}"), code);
      await axe();
      await shot("rich-light");
    },
  },
  {
    name: "what a model writes can neither run nor load anything",
    async run({ page }) {
      await ready(page);
      const hostile = [
        "<script>window.owned = 1</script>", "<img src=x onerror='window.owned = 1'>", "![p](https://evil.example/p.png)", "![p](x onerror=1)",
        "[a](javascript:window.owned=1)", "[b](JaVaScRiPt:window.owned=1)", "[c](data:text/html,<script>1</script>)", "[d](  javascript:1)", "<javascript:1>",
        "[e](vbscript:x)", "[f](//evil.example)", "[g](https://ok.example/\"onmouseover=\"window.owned=1)", "<svg onload=window.owned=1>", "`<b>`", "```html\"><img src=x onerror=window.owned=1>\n<i>\n```",
        "<iframe srcdoc='<script>parent.owned=1</script>'></iframe>", "| <b> | [x](javascript:1) |\n|--|--|\n| <script>1</script> | y |",
      ].join("\n\n");
      await answerWith(page, hostile);
      await say(page, "<img src=x onerror='window.owned = 1'>");
      await answered(page);
      await page.waitForTimeout(200);
      assert.equal(await page.evaluate("window.owned"), undefined);
      const made = await page.locator("#messages").evaluate((root) => [...root.querySelectorAll("*")].map((node) => node.localName));
      for (const name of ["script", "img", "iframe", "object", "embed", "b", "i", "style", "form"]) assert.ok(!made.includes(name), name);
      const links = await page.locator("#messages a").evaluateAll((nodes) => nodes.map((node) => [node.protocol, node.rel, node.target]));
      assert.ok(links.length >= 2);
      for (const link of links) assert.deepEqual(link, ["https:", "noopener noreferrer nofollow", "_blank"]);
      const handlers = await page.locator("#messages *").evaluateAll((nodes) => nodes.flatMap((node) => node.getAttributeNames()).filter((name) => name.startsWith("on")));
      assert.deepEqual(handlers, []);
    },
  },
  {
    name: "the policy holds",
    expected: /TrustedHTML/,
    async run({ page, url }) {
      const response = await fetch(url);
      const policy = response.headers.get("content-security-policy");
      for (const part of ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"]) assert.ok(policy.includes(part), part);
      const refused = await page.evaluate(() => {
        try {
          document.createElement("p").innerHTML = "<b>x</b>";
          return false;
        } catch (error) {
          return error instanceof TypeError;
        }
      });
      assert.ok(refused, "the browser itself refuses HTML from text");
      const again = await fetch(url, { headers: { "if-none-match": response.headers.get("etag") } });
      assert.equal(again.status, 304);
    },
  },
  {
    name: "no text takes long to show",
    async run({ page }) {
      await ready(page);
      const n = 40_000;
      for (const unit of ["*", "_", "**a ", "`", "[", "[a](", "![", "<", "> ", "# ", "- ", "1. ", "|", "~~", "\\", "http://", " ", "``` ", "(_", "*a_b`"]) {
        await page.keyboard.press("Alt+n");
        await answerWith(page, unit.repeat(n / unit.length), n);
        const start = Date.now();
        await say(page, "x");
        await answered(page);
        assert.ok(Date.now() - start < 3000, `${JSON.stringify(unit)} took ${Date.now() - start} ms`);
        await page.unroute("**/v1/chat/completions");
      }
    },
  },
  {
    name: "a key is asked for, tried, and kept as told",
    server: "keyed",
    async run({ page, axe, shot }) {
      await page.getByRole("heading", { name: "This server asks for a key" }).waitFor();
      await axe();
      await shot("key");
      await page.getByLabel("API key").fill("sk-wrong");
      await page.keyboard.press("Enter");
      await page.getByText("The server did not take the key it was sent.").waitFor();
      await page.getByLabel("API key").fill("sk-page");
      await page.keyboard.press("Enter");
      await ready(page);
      await set(page, { "Longest answer": 5 });
      await say(page, "Once");
      await answered(page);
      assert.equal(await page.locator(".error").count(), 0);
      const kept = () => page.evaluate(() => [sessionStorage.getItem("bitnet.key"), localStorage.getItem("bitnet.key")]);
      assert.deepEqual(await kept(), ["sk-page", null]);
      await page.getByRole("button", { name: "Settings" }).click();
      await page.getByRole("button", { name: "Change" }).click();
      await page.getByLabel("API key").fill("sk-page");
      await page.getByLabel("Remember in this browser").check();
      await page.getByRole("button", { name: "Use this key" }).click();
      assert.deepEqual(await kept(), [null, "sk-page"]);
      await page.reload();
      await ready(page);
    },
  },
  {
    name: "metrics are drawn from what the server counts",
    async run({ page, url, axe, shot }) {
      await ready(page);
      await page.getByRole("link", { name: "Metrics" }).click();
      await page.waitForTimeout(1200);
      const body = JSON.stringify({ model: "builtin", prompt: "Once upon a time", max_tokens: 120, ignore_eos: true, n: 4 });
      for (let i = 0; i < 4; i += 1) await fetch(`${url}/v1/completions`, { method: "POST", headers: { "content-type": "application/json" }, body });
      await page.waitForTimeout(2500);
      const tile = (label) => page.locator(".tile", { hasText: label }).locator("dd").innerText();
      const text = await (await fetch(`${url}/metrics`)).text();
      const served = [...text.matchAll(/^bitnet_sequences_total\{[^}]*"(?:stop|length)"\} (\d+)/gm)].reduce((sum, [, n]) => sum + Number(n), 0);
      assert.equal(await tile("Requests served"), served.toLocaleString("en"));
      assert.match(await tile("First token"), /^[\d.]+ m?s$/);
      assert.match(await tile("Memory"), /^\d+ MiB$/);
      const drawn = await page.locator(".chart .series").count();
      assert.ok(drawn >= 10, `${drawn} lines`);
      const summary = await page.getByRole("img", { name: /^Time between tokens: p50 [\d.]+ m?s, p95 [\d.]+ m?s, p99 [\d.]+ m?s$/ }).count();
      assert.equal(summary, 1);
      await axe();
      await shot("metrics-light");
      // Nothing is read while the view is hidden.
      await page.getByRole("link", { name: "Chat" }).click();
      await page.waitForTimeout(300);
      let reads = 0;
      page.on("request", (request) => (reads += Number(request.url().endsWith("/metrics"))));
      await page.waitForTimeout(1500);
      assert.equal(reads, 0);
    },
  },
  {
    name: "it works by keyboard alone",
    async run({ page }) {
      await ready(page);
      await answerWith(page, "Fine.");
      const focused = () => page.evaluate(() => document.activeElement.getAttribute("aria-label") ?? document.activeElement.id ?? document.activeElement.textContent);
      await page.keyboard.press("Tab");
      assert.equal(await page.evaluate(() => document.activeElement.textContent), "Skip to content");
      const seen = [];
      for (let i = 0; i < 20; i += 1) {
        await page.keyboard.press("Tab");
        seen.push(await focused());
      }
      for (const name of ["new-chat", "model", "Settings", "prompt"]) assert.ok(seen.includes(name), `${name} in ${seen}`);
      await page.getByLabel("Message", { exact: true }).focus();
      await page.keyboard.type("line one");
      await page.keyboard.press("Shift+Enter");
      await page.keyboard.type("line two");
      await page.keyboard.press("Enter");
      await answered(page);
      assert.equal(await page.locator(".message.user .body").innerText(), "line one\nline two");
      await page.getByLabel("Message", { exact: true }).focus();
      await page.keyboard.press("ArrowUp");
      assert.equal(await page.getByLabel("Edit message").inputValue(), "line one\nline two");
      await page.keyboard.press("Escape");
      assert.equal(await focused(), "Edit");
      assert.equal(await page.getByRole("status").first().innerText(), "Answer of 1 tokens is complete");
    },
  },
  {
    name: "troubles are told",
    async run({ page }) {
      await ready(page);
      await page.route("**/v1/chat/completions", (route) => route.fulfill({ status: 429, json: { error: { message: "The server is busy.", type: "rate_limit_error", param: null, code: "server_busy" } } }));
      await say(page, "a");
      await page.getByRole("alert").getByText("The server is busy.").waitFor();
      await page.unroute("**/v1/chat/completions");
      await page.route("**/v1/chat/completions", (route) => route.abort());
      await page.getByRole("button", { name: "Answer again" }).click();
      await page.getByText("The server cannot be reached.").waitFor();
      await page.unroute("**/v1/chat/completions");
      await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body: 'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n' }));
      await page.getByRole("button", { name: "Answer again" }).click();
      await page.getByText("The connection ended in the middle of the answer.").waitFor();
      assert.match(await page.locator(".message.assistant .text").innerText(), /half/);
    },
  },
  ...[["light", {}], ["dark", DARK], ["phone", PHONE], ["phone-dark", { ...PHONE, ...DARK }]].map(([name, options]) => ({
    name: `accessible and whole: ${name}`,
    options,
    async run({ page, axe, shot }) {
      const fits = async () => assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "nothing sticks out");
      await ready(page);
      await fits();
      await axe();
      await shot(`${name}-welcome`);
      await answerWith(page, RICH);
      await say(page, "How do ternary weights work?");
      await answered(page);
      await fits();
      await axe();
      await shot(`${name}-chat`);
      if (options.isMobile) {
        await page.getByRole("button", { name: "Open menu" }).click();
        await page.waitForTimeout(300);
        await axe();
        await shot(`${name}-menu`);
        await page.keyboard.press("Escape");
        assert.equal(await page.evaluate(() => document.activeElement.id), "open-sidebar");
      }
      await page.getByRole("button", { name: "Settings" }).click();
      await axe();
      await fits();
      await shot(`${name}-settings`);
      await page.keyboard.press("Escape");
      await page.evaluate(() => {
        location.hash = "#metrics";
      });
      await page.waitForTimeout(2300);
      await axe();
      await fits();
      await shot(`${name}-metrics`);
    },
  })),
  {
    name: "the reference is there and loads nothing",
    async run({ page, axe }) {
      await page.getByRole("link", { name: "API reference" }).click();
      await page.getByRole("heading", { name: "Routes" }).waitFor();
      await page.getByText("POST /v1/chat/completions").click();
      await axe();
    },
  },
];
