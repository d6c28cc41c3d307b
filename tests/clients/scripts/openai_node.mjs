// openai node: whole answers, streams, errors as its own classes, a stream that is left early.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const task = JSON.parse(process.env.VTP_TASK);
const client = new OpenAI({ baseURL: task.url + "/v1", apiKey: "EMPTY", maxRetries: 0 });
const url = "data:image/png;base64," + readFileSync(task.picture).toString("base64");
const shown = { type: "image_url", image_url: { url } };
const words = { type: "text", text: task.prompt };
const asked = (model, more = {}) => ({
  model,
  messages: [{ role: "user", content: [shown, words] }],
  max_tokens: task.max_tokens,
  ...more,
});

async function streamed(model) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = [];
  for await (const chunk of await client.chat.completions.create(asked(model, options))) chunks.push(chunk);
  return chunks;
}

async function refused(fields) {
  try {
    await client.chat.completions.create(fields);
  } catch (error) {
    return [error.constructor.name, error.status, error.param];
  }
  return ["nothing"];
}

const answers = {}, facts = {};
for (const model of task.models) {
  const done = await client.chat.completions.create(asked(model));
  const left = await client.chat.completions.create(asked(model, { stream: true }));
  for await (const chunk of left) if (chunk.choices[0]?.delta.content) break;
  const chunks = await streamed(model);
  const text = chunks.filter((chunk) => chunk.choices.length).map((chunk) => chunk.choices[0].delta.content ?? "");
  const helper = client.chat.completions.stream(asked(model));
  answers[model] = {
    whole: done.choices[0].message.content,
    stream: text.join(""),
    helper: (await helper.finalChatCompletion()).choices[0].message.content,
  };
  facts[model] = {
    usage: [done.usage.prompt_tokens, done.usage.completion_tokens],
    "stream's usage": [chunks.at(-1).usage.prompt_tokens, chunks.at(-1).usage.completion_tokens],
    finish: done.choices[0].finish_reason,
    "stream's finish": chunks.at(-2).choices[0].finish_reason,
    visual: Object.values(done.vtp.visual_tokens),
    pieces: text.filter((piece) => piece).length,
  };
}
const objects = {};
for (const model of task.schema ? task.models : []) {
  const response_format = { type: "json_schema", json_schema: { name: "seen", strict: true, schema: task.schema } };
  const fields = asked(model, { response_format, max_tokens: task.max_tokens_of_form });
  const parsed = await client.chat.completions.parse(fields);
  objects[model] = { parse: JSON.parse(parsed.choices[0].message.content) };
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const errors = {
  "unknown model": await refused(asked("no-such-model")),
  "n 2": await refused(asked(task.models[0], { n: 2 })),
};
console.log(JSON.stringify({ answers, facts, objects, models, errors }));
