// The official clients of Node against a running server: other parsers of the same streams.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import process from "node:process";

const require = createRequire(process.env.CLIENT_MODULES);
const url = process.env.BITNET_URL;
const messages = [{ role: "user", content: "Once upon a time" }];

async function openai() {
  const { OpenAI } = require("openai");
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-local", maxRetries: 0 });
  const body = { model: "builtin", messages, max_completion_tokens: 8, temperature: 0 };
  const whole = await client.chat.completions.create(body);
  assert.equal(whole.usage.completion_tokens, 8);
  let text = "";
  let usage = null;
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, 8);
  const helper = client.chat.completions.stream(body);
  assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);

  const request = { model: "builtin", input: "Once upon a time", max_output_tokens: 8, temperature: 0 };
  const response = await client.responses.create(request);
  const kinds = [];
  for await (const event of await client.responses.create({ ...request, stream: true })) kinds.push(event.type);
  assert.equal(kinds[0], "response.created");
  assert.ok(response.output_text.length > 0);
  const vector = (await client.embeddings.create({ model: "builtin", input: "a dog" })).data[0].embedding;
  assert.equal(vector.length, 256, "base64 is decoded to numbers");
  await assert.rejects(client.chat.completions.create({ ...body, temperature: 3 }), (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");

  const controller = new AbortController();
  const stream = await client.chat.completions.create({ ...body, max_completion_tokens: 400, stream: true }, { signal: controller.signal });
  for await (const _ of stream) controller.abort();
}

async function anthropic() {
  const Anthropic = require("@anthropic-ai/sdk").default;
  const client = new Anthropic({ baseURL: url, apiKey: "sk-local", maxRetries: 0 });
  const body = { model: "builtin", max_tokens: 8, messages, temperature: 0 };
  const whole = await client.messages.create(body);
  assert.equal(whole.stop_reason, "max_tokens");
  const final = await client.messages.stream(body).finalMessage();
  assert.equal(final.content[0].text, whole.content[0].text);
  assert.ok((await client.messages.countTokens({ model: "builtin", messages })).input_tokens > 0);
}

async function ollama() {
  const { Ollama } = require("ollama");
  const client = new Ollama({ host: url });
  const body = { model: "builtin", messages, options: { num_predict: 8, temperature: 0 } };
  const whole = await client.chat(body);
  let text = "";
  for await (const part of await client.chat({ ...body, stream: true })) text += part.message.content;
  assert.equal(text, whole.message.content);
  assert.equal((await client.list()).models[0].model, "builtin");
  await client.embed({ model: "builtin", input: "a", keep_alive: "1h30m" });
  assert.equal((await client.ps()).models.length, 1);
}

for (const [name, test] of Object.entries({ openai, anthropic, ollama })) {
  await test();
  console.log(`ok  ${name} (node)`);
}
