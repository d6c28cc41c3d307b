"""README.md of a bundle on the hub, from its manifest: what was pruned, fidelity, sizes, how to run it.

A manifest may be a stranger's: whatever words it holds are shown as words, never as Markdown, HTML or YAML.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from vtp.engines.errors import shown
from vtp.runtime.bundle.fewer_bits import bits_of
from vtp.runtime.bundle.manifest import Manifest, ThenInfo
from vtp.runtime.commands.tables import markdown_table
from vtp.runtime.hub.names import HubName, is_repo

NONE = "none"
# What Markdown takes for more than itself within a line, or makes a link of; it lets one escape any of these.
_PUNCTUATION = re.compile(r"([!-*:-@\[-`{-~]|(?i:(?<=www))\.)")
_WORD = 100  # characters of a name or value that are shown
_TAGS = ("vtp", "onnx", "visual-token-pruning")


def card(manifest: Manifest, name: HubName, base_model: str | None = None) -> str:
    """The text of README.md.

    name        where the bundle will lie; its revision is not shown
    base_model  the model's name on the hub; None: what the manifest calls the model, if that is such a name
    """
    parts = [
        front_matter(manifest, "vtp", base_model),
        f"# {_words(name.name)}: {_counts(manifest)} visual tokens",
        _pruned(manifest),
        _run(manifest, name.repo),
        "## Fidelity",
        "\n".join(_fidelity(manifest.parity)),
        "## Sizes",
        _sizes(manifest),
        _made(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(manifest: Manifest, library: str, base_model: str | None = None) -> str:
    """The YAML that the hub reads; every text in it is a JSON string, which YAML takes as it is."""
    task = "image-text-to-text" if manifest.image.frames is None else "video-text-to-text"
    tags = [*_TAGS, *([] if manifest.method.name == NONE else [shown(manifest.method.name, _WORD)])]
    lines = [f"library_name: {library}", f"pipeline_tag: {task}", f"tags: {json.dumps(tags)}"]
    base = base_model or manifest.model.name
    if is_repo(base):
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---"])


def _counts(manifest: Manifest) -> str:
    visual = manifest.visual
    if manifest.method.name == NONE:
        return f"all {visual.count}"
    return f"{visual.count} → {', '.join(map(str, visual.keep))}"


def _pruned(manifest: Manifest) -> str:
    method, visual, tower = manifest.method, manifest.visual, manifest.tower
    said = (
        f"A bundle of vtp (visual token pruning): {_words(manifest.model.name)} "
        f"({_words(manifest.model.architecture)}) as ONNX graphs for target {_words(manifest.target)}, in "
        f"{_words(manifest.dtype)}. "
    )
    if method.name == NONE:
        said += f"Nothing was pruned: a picture has all of its {visual.count} visual tokens."
    else:
        options = ", ".join(f"{_words(key)} = {_words(value)}" for key, value in method.options.items())
        keeps = " or ".join(map(str, visual.keep))
        said += (
            f"Of the {visual.count} visual tokens of a picture {keeps} are kept (default "
            f"{visual.default_keep}), chosen without training by {_words(method.name)}"
            f"{f' ({_words(method.paper)})' if method.paper else ''} at site {_words(method.site)}"
            f"{f' with {options}' if options else ''}; positions are {_words(method.positions)}."
        )
        dealt = method.share in ("tile", "frame")
        said += f" Each {method.share} keeps its share of them (`--share {method.share}`)." if dealt else ""
        said += _then(method.then)
        said += " They draw the attention of the dropped ones (`--restore`)." if method.restore else ""
    if tower is not None:
        said += f" Tower {_words(tower.name)}: its last block works on {tower.rows} of {tower.of} rows."
    return said


def _then(then: ThenInfo | None) -> str:
    if then is None:
        return ""
    left = " or ".join(map(str, then.keep))
    by = f"{_words(then.name)}{f' ({_words(then.paper)})' if then.paper else ''}"
    return f" Of these, {left} go on from decoder layer {then.layer} on, chosen by {by} (`--then`)."


def _run(manifest: Manifest, repo: str) -> str:
    video = manifest.image.frames is not None
    medium, argument = (
        ("--video video.mp4", '"video.mp4"') if video else ("--image picture.png", '"picture.png"')
    )
    build = [] if manifest.target == "ort" else [f"vtp-build {repo} --engine tensorrt"]
    shell = "\n".join(
        [
            "pip install 'vtp-edge[ort,hub]'",
            *build,
            f'vtp-run {repo} {medium} --prompt "what color is the star ?"',
        ]
    )
    return f"""## Run it

```sh
{shell}
```

```python
from vtp import Pipeline
pipe = Pipeline.load("{repo}")
print(pipe.generate({argument}, "what color is the star ?").text)
```"""


def _fidelity(parity: Mapping[str, Any]) -> Iterator[str]:
    """What the export measured, or vtp-calib; figures that are none are left out."""
    mode = parity.get("mode")
    if mode in ("full", "layers"):
        yield (
            "Greedy answers on ONNX Runtime's CPU provider, held against transformers with every token, or "
            "against the same pruning in torch:\n"
        )
        yield markdown_table(["kept", "tokens equal", "logits within, of a row's length"], _compared(parity))
    elif mode == "accuracy":
        rows = [[_number(_triple(parity, when)), when] for when in ("before", "after")]
        yield (
            f"Scores of vtp-calib quantize on {_number(parity.get('questions'))} questions (metric "
            f"{_words(parity.get('metric', ''))}), as shares of 1:\n"
        )
        yield markdown_table(["score", "quantisation"], rows)
    else:
        yield "Not checked (`--verify none`)."


def _compared(parity: Mapping[str, Any]) -> Iterator[list[str]]:
    cases = parity.get("generation")
    for keep, case in (cases if isinstance(cases, dict) else {}).items():
        found = case if isinstance(case, dict) else {}
        equal, tokens = _number(found.get("equal")), _number(found.get("tokens"))
        yield [_words(keep), f"{equal} of {tokens}", _number(found.get("relative"))]


def _triple(parity: Mapping[str, Any], when: str) -> Any:
    found = parity.get(when)
    return found[0] if isinstance(found, list) and found else None


def _sizes(manifest: Manifest) -> str:
    """Each graph with its weights, and all files together."""
    sizes: dict[str, int] = {}
    for path, info in manifest.files.items():
        graph = PurePosixPath(path.removesuffix(".data")).name
        sizes[graph] = sizes.get(graph, 0) + info.bytes
    rows = [[_words(path), f"{size / 1e6:.2f}"] for path, size in sizes.items()]
    total = sum(sizes.values())
    return markdown_table(["file, with its weights", "MB"], [*rows, ["all", f"{total / 1e6:.2f}"]])


def _made(manifest: Manifest) -> str:
    versions = ", ".join(f"{_words(name)} {_words(one)}" for name, one in manifest.versions.items())
    extra = []
    if manifest.quantization:
        made = ", ".join(f"{part} {_words(bits)}" for part, bits in bits_of(manifest.quantization).items())
        extra.append(
            f"It was quantised by vtp-calib quantize{f' ({made})' if made else ''}; manifest.json has every "
            "figure. "
        )
    if manifest.calibration:
        extra.append(
            "Its default keep-count was chosen by vtp-calib keep; manifest.json has what was measured. "
        )
    return (
        f"## Made with\n\n{versions}. {''.join(extra)}manifest.json has every option, size and sha256; vtp "
        "compares them when it fetches this bundle. The model's own licence holds for its weights."
    )


def _number(value: Any) -> str:
    """A figure, or "?" for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "?"
    return str(value) if isinstance(value, int) and abs(value) < 10**9 else f"{value:.4g}"


def _words(value: object) -> str:
    """Text from a manifest as Markdown that says just that."""
    return _PUNCTUATION.sub(r"\\\1", shown(value, _WORD))
