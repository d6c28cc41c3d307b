"""What clients must get: the bundles that are served, and the answers of vtp-run to the same questions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vtp.runtime import NO_PICTURE, Pipeline

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "scenes/examples/scene.png"
PROMPT = "what color is the star ?"
MOST = 40  # tokens of an answer
MOST_OF_FORM = 200  # of one that is held to a schema
SCHEMA = {
    "title": "Seen",
    "description": "What is seen in the picture.",
    "type": "object",
    "properties": {
        "color": {"type": "string", "enum": ["red", "green", "blue"]},
        "sure": {"type": "boolean"},
    },
    "required": ["color", "sure"],
    "additionalProperties": False,
}

#: Bundle -> flags of vtp-export: the built-in model, whose answers are right and short, and a random one with
#: two keep-counts, whose answers are long and full of odd characters.
BUNDLES = {
    "scenes": ["--method", "vispruner", "--keep-tokens", "64"],
    "tiny": ["--method", "vispruner", "--keep-tokens", "3,6", "--max-length", "512"],
}


def command(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))


def make_bundles(root: Path) -> dict[str, Path]:
    """Export what is not there yet; name -> folder."""
    for name, flags in BUNDLES.items():
        if not (root / name / "manifest.json").is_file():
            model = [] if name == "scenes" else ["--model", str(_random_model(root / "model"))]
            export = [command("vtp-export"), *model, *flags, "--verify", "none", "-o", str(root / name)]
            subprocess.run(export, check=True, capture_output=True)
    return {name: root / name for name in BUNDLES}


def _random_model(folder: Path) -> Path:
    from tests.models.tiny import save_tiny

    save_tiny(folder, layers=3)
    return folder


def answers_of(bundle: Path) -> dict[str, Any]:
    """What vtp-run says, and what the runtime says to the same words before the picture and without."""
    run = [command("vtp-run"), str(bundle), "--image", str(PICTURE), "--prompt", PROMPT, "--json"]
    done = subprocess.run([*run, "--max-new-tokens", str(MOST)], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    turn = {"role": "user", "content": [{"type": "text", "text": PROMPT}, {"type": "image"}]}
    with Pipeline.load(bundle) as pipeline:
        after = pipeline.generate([PICTURE], messages=[turn], max_new_tokens=MOST)
        alone = pipeline.generate(NO_PICTURE, PROMPT, max_new_tokens=MOST)
        held = pipeline.generate([PICTURE], PROMPT, max_new_tokens=MOST_OF_FORM, response_format=SCHEMA)
        visual, length = pipeline.manifest.visual, pipeline.manifest.model.max_length
    texts = {"text": result["raw_text"], "text first": after.raw_text, "text only": alone.raw_text}
    context = length - visual.count + max(visual.keep)
    found = {"object": json.loads(held.text), "context": context, "least kept": min(visual.keep)}
    return {**result, **texts, **found}


def facts_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Facts that clients may report of an answer, by name."""
    before, kept = answer["visual_tokens"]["before"], answer["visual_tokens"]["after"]
    usage = [answer["prompt_tokens"] + kept, len(answer["token_ids"])]
    finish = {"eos": "stop"}.get(answer["finish_reason"], answer["finish_reason"])
    return {
        "usage": usage,
        "stream's usage": usage,
        "finish": finish,
        "stream's finish": finish,
        "visual": [before, kept],
        "detail low": answer["least kept"],
        "capabilities": ["completion", "vision"],
        "context": answer["context"],
        "load": "load",
    }


#: Errors by name, as each client's own classes say them: any of these.
ERRORS: dict[str, list[list[Any]]] = {
    "unknown model": [
        ["NotFoundError", 404, "model"],
        ["NotFoundError", 404],
        ["APICallError", 404],
        ["ResponseError", 404, True],
    ],
    "n 2": [["BadRequestError", 400, "n"]],
    "bad picture": [
        ["BadRequestError", 400, "messages.0.content.0.image_url.url"],
        ["ResponseError", 400, True],
    ],
    "long prompt": [["BadRequestError", 400, "messages"]],
    "bad schema": [["BadRequestError", 400, "response_format"]],
    "keep 1000": [["BadRequestError", 400, "vtp.keep_tokens"]],
}
