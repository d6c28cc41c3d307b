"""A bundle in plain OpenVINO: needs openvino, numpy, pillow and tokenizers, and nothing of vtp.

Usage: python plain_openvino.py BUNDLE PICTURE QUESTION

The bundle comes from `vtp-export --method fastervlm -o BUNDLE`: the built-in model, 576 visual tokens, of
which the pruner keeps 64. What differs from the program for plain onnxruntime in docs/plain.md is marked with
(1) to (4).
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from PIL import Image
from tokenizers import Tokenizer

folder, picture, question = sys.argv[1:]
core = ov.Core()
# (1) Without this the processor plugin may compute in bfloat16 or float16, and may keep other tokens.
exact = {"INFERENCE_PRECISION_HINT": "f32"}


def graph(name):
    return core.compile_model(f"{folder}/{name}.onnx", "CPU", exact)


def run(name, **feeds):
    results = graph(name)(feeds)
    return [results[output] for output in range(len(results))]


encoder = graph("vision_encoder")
size = tuple(encoder.input("pixel_values").partial_shape)[2].get_length()  # 336 for the built-in model
mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
pixels = Image.open(picture).convert("RGB").resize((size, size), Image.BICUBIC)
pixels = ((np.asarray(pixels) / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
ends = set(json.loads(Path(folder, "manifest.json").read_text())["text"]["eos_token_ids"])
tokens = Tokenizer.from_file(f"{folder}/tokenizer.json")
ids = np.array([tokens.encode(f"USER: <image>\n{question} ASSISTANT:").ids])
start = np.argmax(ids == tokens.token_to_id("<image>"), axis=1, keepdims=True)

found = encoder({"pixel_values": pixels})
features, scores = found["image_features"], found["attention_scores"]
# (2) No float64 on OpenVINO's CPU: a pruner that computes in it (vispruner, cdpruner) keeps others there.
keep, kept = run("pruner", image_features=features, attention_scores=scores)
(image,) = run("projector", image_features=kept)
(text,) = run("embed_tokens", input_ids=ids)
embeds, position, next_position = run("splice", inputs_embeds=text, image_embeds=image, image_start=start)

decoder, embed, answer, length = graph("decoder"), graph("embed_tokens"), [], 0
# (3) The cache is an input and an output: past_key_values.N.key [1, heads, capacity, width] goes in, and the
# whole of present.N.key comes out as a tensor of its own and goes in at the next step. onnxruntime can bind
# both to one.
# (4) A tensor may have several names, of which any_name is any: look for the name, do not take the first.
cache = {}
for item in decoder.inputs:
    for name in item.names:
        if name.startswith("past_key_values"):
            heads, width = (item.partial_shape[axis].get_length() for axis in (1, 3))
            cache[name] = np.zeros((1, heads, 256, width), np.float32)
while len(answer) < 12 and not ends & set(answer):
    length += embeds.shape[1]
    results = decoder(
        {
            "inputs_embeds": embeds,
            "position_ids": position,
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
            **cache,
        }
    )
    cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    answer.append(int(results["logits"][0, 0].argmax()))
    position = next_position[None] + len(answer) - 1
    embeds = embed({"input_ids": np.array([answer[-1:]])})["inputs_embeds"]
print(tokens.decode(answer))
