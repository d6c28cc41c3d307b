"""README.md and vtp.json of a folder: what was pruned and how, how to load it, and the folder's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtp.engines.disk.files import sha256
from vtp.export.hub.card import front_matter
from vtp.export.layouts.transformers_js.clients import Client
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import Manifest

RECORD = "vtp.json"
LAYOUT = "transformers.js"
VERSION = 1
_BROWSERS = "- It runs in Node and in browsers (WASM), with `device` and `dtype` left out."
_NODE = (
    "- It runs in Node alone: its pruner computes in float64, which ONNX Runtime's build for browsers does\n"
    "  not (export with `--layout transformers.js` and no `--from-bundle` for one that computes in float32)."
)


def record(bundle: Bundle, dtypes: Mapping[str, str], checked: Mapping[str, Any], folder: Path) -> str:
    """The text of vtp.json: what the bundle's manifest says of the pruning, and every file's sha256."""
    manifest = bundle.manifest
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    data = {
        "layout": LAYOUT,
        "version": VERSION,
        "model": manifest.model.name,
        "family": manifest.model.family,
        "method": asdict(manifest.method),
        "visual_tokens": {"before": manifest.visual.count, "after": manifest.visual.keep[0]},
        "grid": manifest.visual.grid,
        "tower": manifest.tower.to_json() if manifest.tower else None,
        "dtype": dict(dtypes),
        "parity": {**manifest.parity, LAYOUT: dict(checked)},
        "quantization": manifest.quantization,
        "versions": manifest.versions,
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in files
        },
    }
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def readme(bundle: Bundle, client: Client, dtypes: Mapping[str, str], browsers: bool) -> str:
    """The text of README.md; `browsers` says whether the graphs run there."""
    manifest = bundle.manifest
    height, width = manifest.image.fixed_size
    return f"""{front_matter(manifest, LAYOUT)}

# {manifest.model.name}, {_short(manifest)}

{_pruned(manifest)}

The files are for npm `@huggingface/transformers` 4, unmodified: `vision_encoder` holds the vision encoder,
the pruner and the projector in one, and gives {manifest.visual.keep[0]} rows a picture; the processor's files
say that number, so a prompt has {manifest.visual.keep[0]} image tokens. dtype: {_dtypes(dtypes)}.

```js
import {{ AutoModelForImageTextToText, AutoProcessor, load_image }} from "@huggingface/transformers";

const folder = "FOLDER_OR_HUB_ID"; // a folder: env.localModelPath is where it lies
const processor = await AutoProcessor.from_pretrained(folder);
const model = await AutoModelForImageTextToText.from_pretrained(folder);
const image = await load_image("picture.png");
{_call(client)}
const ids = await model.generate({{ ...inputs, max_new_tokens: 32 }});
const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(answer, {{ skip_special_tokens: true }})[0]);
```

- Pictures are resized to {width}x{height} by transformers.js, in Node by sharp and in a browser by its
  canvas, not to the last bit as Pillow does it. A picture of that size is used as it is.
{_BROWSERS if browsers else _NODE}
- Prompts of a batch must be equally long: a mask with padding ends the run with an error.
{_kept(manifest)}
Made by vtp-export --layout transformers.js; {RECORD} has the method, its options, what was checked, and the
sha256 of every file. The model's own licence holds for its weights.
"""


def _kept(manifest: Manifest) -> str:
    if manifest.method.name == "none":
        return ""
    return (
        f"- `vision_encoder` also gives `keep_indices`: which of the {manifest.visual.count} tokens, in rows "
        f"of {manifest.visual.grid[1]}, were kept.\n"
    )


def _short(manifest: Manifest) -> str:
    if manifest.method.name == "none":
        return f"all {manifest.visual.count} visual tokens"
    return f"{manifest.visual.count} → {manifest.visual.keep[0]} visual tokens"


def _pruned(manifest: Manifest) -> str:
    method, visual = manifest.method, manifest.visual
    if method.name == "none":
        said = f"Nothing was pruned: every picture has its {visual.count} visual tokens."
    else:
        options = ", ".join(f"{name}={value}" for name, value in method.options.items())
        said = (
            f"Of the {visual.count} visual tokens of a picture {visual.keep[0]} are kept, chosen by "
            f"{method.name} ({method.paper}) at site {method.site}{f' with {options}' if options else ''}; "
            f"positions are {method.positions}."
        )
    tower = manifest.tower
    if tower is None:
        return said
    return f"{said} Tower {tower.name}: {tower.rows} of {tower.of} rows in its last block."


def _dtypes(dtypes: Mapping[str, str]) -> str:
    kinds = set(dtypes.values())
    return kinds.pop() if len(kinds) == 1 else ", ".join(f"{name} {kind}" for name, kind in dtypes.items())


def _call(client: Client) -> str:
    if not client.chat:
        return 'const inputs = await processor(image, "<image>what color is the star ?");'
    order = (
        "text, [image]" if client.processor.startswith(("Gemma3", "Idefics3", "SmolVLM")) else "image, text"
    )
    return f"""const content = [{{ type: "image" }}, {{ type: "text", text: "what color is the star ?" }}];
const text = processor.apply_chat_template([{{ role: "user", content }}], {{ add_generation_prompt: true }});
const inputs = await processor({order});"""
