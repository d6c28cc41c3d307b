// Asks folders of layout transformers.js, with the unmodified client. Prints one JSON object by folder.
//   node ask.mjs MODELS < jobs.json
// MODELS is where the folders lie; jobs.json is [{folder, order, most, questions: [{picture, prompt}]}], and order
// is how the family's processor is called: "image, text", "text, images" or "plain" (without a chat template).
// Wants @huggingface/transformers beside it (`make test-js` installs it).
import { readFileSync } from "node:fs";
import { AutoModelForImageTextToText, AutoProcessor, env, RawImage } from "@huggingface/transformers";

env.localModelPath = process.argv[2];
env.allowRemoteModels = false;

async function inputsOf(processor, order, { picture, prompt }) {
  const image = await RawImage.read(picture);
  if (order === "plain") return processor(image, `<image>${prompt}`);
  const content = [{ type: "image" }, { type: "text", text: prompt }];
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  return order === "image, text" ? processor(image, text) : processor(text, [image]);
}

async function answers({ folder, order, most, questions }) {
  const processor = await AutoProcessor.from_pretrained(folder);
  const model = await AutoModelForImageTextToText.from_pretrained(folder);
  const token = BigInt(model.config.image_token_id);
  const found = [];
  for (const question of questions) {
    const inputs = await inputsOf(processor, order, question);
    const ids = await model.generate({ ...inputs, max_new_tokens: most });
    const start = inputs.input_ids.dims.at(-1);
    const answer = ids.slice(null, [start, null]);
    found.push({
      tokens: Array.from(answer.data, Number),
      text: processor.batch_decode(answer, { skip_special_tokens: true })[0],
      image_tokens: Array.from(inputs.input_ids.data).filter((id) => id === token).length,
    });
  }
  await model.dispose();
  return found;
}

const told = {};
for (const job of JSON.parse(readFileSync(0))) told[job.folder] = await answers(job);
console.log(JSON.stringify(told));
