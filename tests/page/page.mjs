// Drives the page in a real Chromium, as a user would. Prints one JSON object; anything that fails, throws.
//   node page.mjs URL PICTURE PROMPT OUT [--camera]
// Wants playwright-core beside it (`make test-page` installs it) and CHROMIUM, the browser's path.
import { chromium } from "playwright-core";
import assert from "node:assert/strict";

const [url, picture, prompt, out] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
  ],
});
const told = { answers: {}, foreign: [], complaints: [] };

async function open(options) {
  const page = await browser.newPage(options);
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !/^(data|blob):/.test(request.url())) told.foreign.push(request.url());
  });
  page.on("console", (message) => { if (["error", "warning"].includes(message.type())) told.complaints.push(message.text()); });
  page.on("pageerror", (error) => told.complaints.push(String(error)));
  await page.goto(url);
  await page.waitForFunction(() => document.querySelector("#about").textContent.includes(" on "));
  return page;
}

async function answered(page) {
  await page.waitForFunction(() => document.querySelector("#figures").textContent && document.querySelector("#stop").disabled);
  assert.equal(await page.locator("#problem").isVisible(), false, await page.locator("#problem").textContent());
  return (await page.locator("#answer").textContent()).trim();
}

const kept = (page) => page.evaluate(() => state.kept);
const brightness = (page) => page.evaluate(() => {
  const canvas = document.querySelector("#view");
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let at = 0; at < data.length; at += 4) sum += data[at] + data[at + 1] + data[at + 2];
  return sum / (data.length / 4) / 3;
});

// A desktop, in light colours, with the mouse.
const page = await open({ viewport: { width: 1200, height: 900 }, colorScheme: "light" });
await page.setInputFiles("#file", picture);
await page.waitForFunction(() => state.picture);
const plain = await brightness(page);
await page.fill("#prompt", prompt);
await page.click("#ask");
const first = await answered(page);
const counts = await page.evaluate(() => keepCounts());
told.counts = counts;
told.answers[await page.evaluate(() => keepChosen())] = first;
told.kept = await kept(page);
assert.ok((await brightness(page)) < plain * 0.8, "dropped patches are not dimmed");
await page.uncheck("#show-kept");
assert.ok(Math.abs((await brightness(page)) - plain) < 0.5, "the picture itself does not come back");
await page.check("#show-kept");

// The slider asks again, with the keyboard.
await page.focus("#keep");
for (const [place] of counts.entries()) {
  await page.keyboard.press(place ? "ArrowRight" : "Home");
  await page.waitForFunction((count) => state.kept?.kept.length === count && !state.running, counts[place]);
  told.answers[counts[place]] = await answered(page);
}
assert.equal(await page.locator("#tries tr").count(), counts.length);
assert.ok((await page.locator("#stages tr").count()) >= 3);
await page.screenshot({ path: `${out}/page.png`, fullPage: true });

// A text without a picture is the server's to refuse or to answer; the page says which.
await page.close();

// A telephone, in dark colours: nothing wider than the screen, buttons large enough for a thumb.
const phone = await open({ viewport: { width: 390, height: 844 }, colorScheme: "dark", isMobile: true, hasTouch: true });
await phone.setInputFiles("#file", picture);
await phone.fill("#prompt", prompt);
await phone.tap("#ask");
told.phone = await answered(phone);
assert.ok(await phone.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "the page is wider than the screen");
for (const button of await phone.locator("button").all()) assert.ok((await button.boundingBox()).height >= 44);
await phone.screenshot({ path: `${out}/page-phone.png`, fullPage: true });
await phone.close();

// Without a mouse: Tab reaches everything in order, Enter asks, Escape stops.
const keys = await open({ viewport: { width: 1200, height: 900 } });
await keys.setInputFiles("#file", picture);
await keys.waitForFunction(() => document.activeElement.id === "prompt"); // once the picture is there
const reached = [];
await keys.evaluate(() => document.activeElement.blur());
for (let step = 0; step < 12; step++) {
  await keys.keyboard.press("Tab");
  const id = await keys.evaluate(() => document.activeElement.id);
  if (reached.includes(id)) break;
  reached.push(id);
}
for (const id of ["choose", "toggle-camera", "show-kept", "prompt", "ask"]) assert.ok(reached.includes(id), `Tab does not reach ${id}`);
await keys.fill("#prompt", prompt);
await keys.focus("#prompt");
await keys.keyboard.press("Enter");
told.keys = await answered(keys);
await keys.keyboard.press("Enter");
await keys.keyboard.press("Escape");
await keys.waitForFunction(() => document.querySelector("#stop").disabled);

// The camera: a frame of Chromium's own test pattern is asked about.
await keys.click("#toggle-camera");
await keys.waitForFunction(() => document.querySelector("#camera").videoWidth > 0);
await keys.click("#ask");
told.camera = await answered(keys);
await keys.click("#toggle-camera");
assert.equal(await keys.evaluate(() => state.stream), null);

// A file that is no picture.
await keys.setInputFiles("#file", { name: "x.png", mimeType: "image/png", buffer: Buffer.from("nothing") });
await keys.waitForFunction(() => !document.querySelector("#problem").hidden);
told.refused = await keys.locator("#problem").textContent();
await browser.close();
console.log(JSON.stringify(told));
