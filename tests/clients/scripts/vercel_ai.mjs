// Vercel ai with @ai-sdk/openai-compatible, which sends no Authorization: whole answers, streams, objects.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, streamText } from "ai";

const task = JSON.parse(process.env.VTP_TASK);
const provider = createOpenAICompatible({
  name: "vtp",
  baseURL: task.url + "/v1",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const content = [
  { type: "image", image: readFileSync(task.picture) },
  { type: "text", text: task.prompt },
];
const asked = (model) => ({
  model: provider(model),
  messages: [{ role: "user", content }],
  maxOutputTokens: task.max_tokens,
  maxRetries: 0,
});

const answers = {}, facts = {};
for (const model of task.models) {
  const done = await generateText(asked(model));
  const stream = streamText(asked(model));
  const pieces = [];
  for await (const piece of stream.textStream) pieces.push(piece);
  const usage = await stream.usage;
  answers[model] = { whole: done.text, stream: pieces.join("") };
  facts[model] = {
    usage: [done.usage.inputTokens, done.usage.outputTokens],
    "stream's usage": [usage.inputTokens, usage.outputTokens],
    finish: done.finishReason,
    "stream's finish": await stream.finishReason,
    pieces: pieces.length,
  };
}
let refused = ["nothing"];
try {
  await generateText(asked("no-such-model"));
} catch (error) {
  refused = [APICallError.isInstance(error) ? "APICallError" : error.name, error.statusCode];
}
const report = { answers, facts, errors: { "unknown model": refused } };
if (task.schema) {
  const output = Output.object({ schema: jsonSchema(task.schema) });
  report.objects = {};
  for (const model of task.models) {
    const fields = { ...asked(model), maxOutputTokens: task.max_tokens_of_form, output };
    const stream = streamText(fields);
    let last;
    for await (const part of stream.partialOutputStream) last = part;
    report.objects[model] = { "Output.object": (await generateText(fields)).output, streamed: last };
  }
}
console.log(JSON.stringify(report));
