// ollama js: list, show, chat and generate, streamed or not, errors.
import { readFileSync } from "node:fs";
import { Ollama } from "ollama";

const task = JSON.parse(process.env.VTP_TASK);
const client = new Ollama({ host: task.url });
const options = { num_predict: task.max_tokens, temperature: 0 };
const image = readFileSync(task.picture).toString("base64");
const messages = [{ role: "user", content: task.prompt, images: [image] }];

const answers = {}, facts = {};
for (const model of task.models) {
  const done = await client.chat({ model, messages, options });
  const pieces = [];
  for await (const part of await client.chat({ model, messages, options, stream: true })) pieces.push(part);
  const generated = { model, prompt: task.prompt, images: [image], options };
  const parts = [];
  for await (const part of await client.generate({ ...generated, stream: true })) parts.push(part);
  answers[model] = {
    chat: done.message.content,
    "chat stream": pieces.map((part) => part.message.content).join(""),
    generate: (await client.generate(generated)).response,
    "generate stream": parts.map((part) => part.response).join(""),
  };
  facts[model] = {
    usage: [done.prompt_eval_count, done.eval_count],
    finish: done.done_reason,
    "stream's finish": pieces.at(-1).done_reason,
    pieces: pieces.length - 1,
    capabilities: (await client.show({ model })).capabilities,
  };
}
const objects = {};
for (const model of task.schema ? task.models : []) {
  const held = { format: task.schema, options: { ...options, num_predict: task.max_tokens_of_form } };
  const made = await client.generate({ model, prompt: task.prompt, images: [image], ...held });
  const done = await client.chat({ model, messages, ...held });
  objects[model] = { chat: JSON.parse(done.message.content), generate: JSON.parse(made.response) };
}
let refused = ["nothing"];
try {
  await client.chat({ model: "no-such-model", messages });
} catch (error) {
  refused = [error.name, error.status_code, !error.message.includes("{")];
}
const models = (await client.list()).models.map((model) => model.model.replace(":latest", ""));
console.log(JSON.stringify({ answers, facts, objects, models, errors: { "unknown model": refused } }));
