// Drives docs/examples/browser/index.html in a real Chromium, on WASM. Prints one JSON object.
//   node page.mjs URL NODE_MODULES SHOT < questions.json
// questions.json is [{picture, prompt}]. What the page loads from its CDN comes from NODE_MODULES; anything else
// that is not from URL is told as foreign. Wants playwright-core beside it and CHROMIUM, the browser's path.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [url, modules, shot] = process.argv.slice(2);
const CDN = "https://cdn.jsdelivr.net/npm/";
const TYPES = { js: "text/javascript", mjs: "text/javascript", wasm: "application/wasm" };
const told = { answers: [], foreign: [], complaints: [], about: "" };

// What jsdelivr answers: of a bare package the file that its package.json names for it.
function fromPackages(request) {
  const path = request.slice(CDN.length).replace(/^((?:@[^/]+\/)?[^/@]+)@[^/]+/, "$1");
  const file = path === "@huggingface/transformers" ? `${path}/dist/transformers.min.js` : path;
  return { body: readFileSync(join(modules, file)), contentType: TYPES[file.split(".").at(-1)] };
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});
const page = await browser.newPage({ viewport: { width: 720, height: 800 } });
await page.route("**", (route) => {
  const request = route.request().url();
  if (request.startsWith(CDN)) {
    return route.fulfill({ ...fromPackages(request), headers: { "access-control-allow-origin": "*" } });
  }
  if (!request.startsWith(url) && !/^(data|blob):/.test(request)) told.foreign.push(request);
  return route.continue();
});
page.on("console", (message) => { if (message.type() === "error") told.complaints.push(message.text()); });
page.on("pageerror", (error) => told.complaints.push(String(error)));
page.setDefaultTimeout(240000);
await page.goto(url);
await page.waitForFunction(() => document.querySelector("#about").textContent.includes(" on ")).catch((error) => {
  throw new Error(`the page does not get ready: ${JSON.stringify(told)}: ${error}`);
});
told.about = await page.locator("#about").textContent();

for (const { picture, prompt } of JSON.parse(readFileSync(0))) {
  await page.setInputFiles("#file", picture);
  await page.waitForFunction(() => !document.querySelector("#ask").disabled);
  await page.fill("#prompt", prompt);
  await page.click("#ask");
  await page.waitForFunction(() => document.querySelector("#figures").textContent, null, { timeout: 120000 });
  const text = (await page.locator("#answer").textContent()).trim();
  const figures = await page.locator("#figures").textContent();
  const tokens = JSON.parse(await page.locator("#figures").getAttribute("data-tokens"));
  told.answers.push({ text, figures, tokens });
}
await page.screenshot({ path: shot, type: "jpeg", quality: 60 });
await browser.close();
console.log(JSON.stringify(told));
