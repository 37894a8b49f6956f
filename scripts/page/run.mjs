// Starts servers and a browser, runs the tests, says what failed. The tests are in tests.mjs.

import { spawn } from "node:child_process";
import { readdirSync } from "node:fs";
import { createRequire } from "node:module";
import process from "node:process";
import { createInterface } from "node:readline";

const require = createRequire(process.env.PAGE_MODULES);
const { chromium } = require("playwright-core");

/** A server on a port of the system's choice. */
function serve(...args) {
  const child = spawn(process.env.BITNET, ["serve", "--port", "0", "--log-format", "json", ...args], { stdio: ["ignore", "ignore", "pipe"] });
  const url = new Promise((resolve, reject) => {
    child.on("exit", (code) => reject(new Error(`the server ended with ${code}`)));
    createInterface({ input: child.stderr }).on("line", (line) => {
      const found = /listening on (http:\/\/[^"\s]+)/.exec(line);
      if (found) resolve(found[1]);
    });
  });
  return { child, url };
}

const servers = { open: serve("--model", "builtin", "--model", "twin=builtin", "--threads", "1"), keyed: serve("--api-key", "sk-page", "--threads", "1") };
const flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
let failed = 0;
let browser;
try {
  const urls = { open: await servers.open.url, keyed: await servers.keyed.url };
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: flags });
  const { tests } = await import("./tests.mjs");
  const wanted = tests.filter(({ name }) => process.argv.slice(2).every((word) => name.includes(word)));
  if (wanted.length === 0) throw new Error("no test has such a name");
  for (const { name, options = {}, server = "open", expected, run } of wanted) {
    const context = await browser.newContext({ viewport: { width: 1280, height: 860 }, ...options });
    if (process.env.PAGE_FILES) await useFiles(context, urls[server]);
    const page = await context.newPage();
    page.setDefaultTimeout(20_000);
    const troubles = watch(page, urls[server]);
    const start = performance.now();
    try {
      await page.goto(urls[server]);
      await run({ page, context, url: urls[server], axe: () => axe(page), shot: (file) => page.screenshot({ path: `${process.env.SCREENSHOTS}/${file}.png` }) });
      if (expected) troubles.splice(0, troubles.length, ...troubles.filter((trouble) => !expected.test(trouble)));
      if (troubles.length > 0) throw new Error(troubles.join("\n"));
      console.log(`ok      ${name} (${Math.round(performance.now() - start)} ms)`);
    } catch (error) {
      failed += 1;
      await page.screenshot({ path: `${process.env.SCREENSHOTS}/failed.png` }).catch(() => {});
      console.log(`FAILED  ${name}\n${error.stack}`);
    }
    await context.close();
  }
  console.log(failed ? `${failed} of ${wanted.length} failed` : `all ${wanted.length} passed`);
} finally {
  await browser?.close();
  for (const { child, url } of Object.values(servers)) {
    url.catch(() => {});
    child.kill();
  }
}
process.exit(failed ? 1 : 0);

/** Has the browser see the files of $PAGE_FILES in place of those in the program, to try them quickly. */
async function useFiles(context, url) {
  const files = [[`${url}/`, "index.html"], ...readdirSync(process.env.PAGE_FILES).map((name) => [`${url}/page/${name}`, name])];
  for (const [address, name] of files) {
    await context.route(address, async (route) => route.fulfill({ response: await route.fetch(), path: `${process.env.PAGE_FILES}/${name}` }));
  }
}

/** Collects what no test may cause: script errors, broken policy, requests to others. */
function watch(page, own) {
  const troubles = [];
  page.on("pageerror", (error) => troubles.push(`error in the page: ${error.message}`));
  page.on("console", (message) => {
    // Browsers write each answer above 399 here; tests that provoke one look at the page instead.
    if (message.type() === "error" && !message.text().startsWith("Failed to load resource")) troubles.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    if (!request.url().startsWith(own) && !/^(data|blob):/.test(request.url())) troubles.push(`request to ${request.url()}`);
  });
  return troubles;
}

/** Fails with what axe-core finds wrong. */
async function axe(page) {
  // Through the debugger, which the page's policy does not bind.
  await page.evaluate(`${require("axe-core").source}; undefined`);
  const { violations } = await page.evaluate("axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] })");
  const lines = violations.flatMap(({ id, help, nodes }) => nodes.map(({ target, failureSummary }) => `${id}: ${help}: ${target}\n  ${failureSummary}`));
  if (lines.length > 0) throw new Error(`accessibility:\n${lines.join("\n")}`);
}
