"""A written folder against the bundle that it was made of: kept tokens, their rows, an answer's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import Value, VtpError
from vtp.export.layouts.transformers_js.rehearsal import Rehearsal
from vtp.export.layouts.transformers_js.words import example_prompt
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.compare import compare
from vtp.runtime.example_input import sample_for
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

STEPS = 16


def hold_against(bundle: Bundle, folder: Path, ids: Sequence[int]) -> dict[str, Any]:
    """Look at one picture and answer one question twice: the bundle by its stages, the folder as its client.

    ids  the question's, with K image tokens

    Both decoders are given the bundle's rows and its greedy tokens. Raises VtpError where anything is apart
    by more than rounding; returns what was compared, as `vtp.json` keeps it.
    """
    manifest = bundle.manifest
    pixels = preprocess(sample_for(manifest.image), manifest.image)
    _, prompt = example_prompt(bundle)
    client = Rehearsal(folder)
    features, kept = client.look(pixels.astype(np.float32))
    with ExitStack() as stack:
        runner = StageRunner(bundle, "ort-cpu", None)
        stack.callback(runner.close)
        own = pixels.astype(_dtype(bundle))
        values = runner.prefill(manifest.visual.keep[0], own, prompt.ids, prompt.image_start, Timings())
        vision = _compare_vision(manifest, values, features, kept)
        answer = _compare_answer(manifest, runner, values, client, features, ids)
    return {"mode": "full", "engine": "ort-cpu", **vision, **answer}


def _compare_vision(
    manifest: Manifest, values: Mapping[str, Value], features: np.ndarray, kept: np.ndarray | None
) -> dict[str, Any]:
    """Hold rows and choice against the bundle's, and put the bundle's rows into `features`.

    In float32 every kept token must be the same. In float16 joined graphs do not round between encoder and
    pruner, and of near-equal tokens, which noise is full of, others are kept: a quarter must be the same.
    """
    wanted = values["kept_embeds" if "kept_embeds" in values else "image_embeds"].numpy()[0]
    wanted = wanted.astype(np.float32)
    rows = features[:, : wanted.shape[1]]
    if kept is not None:
        chosen = values["keep_indices"].numpy()[0]
        shared = len(set(chosen.tolist()) & set(kept.tolist()))
        least = len(chosen) // 4 if manifest.dtype == "float16" else len(chosen)
        if shared < least:
            raise VtpError(
                f"fidelity check failed: of the {len(chosen)} tokens that the bundle keeps, the folder for "
                f"transformers.js keeps {shared}"
            )
        if shared < len(chosen):
            rows[:] = wanted
            return {"kept": len(chosen), "shared": shared}
    found = compare(rows, wanted, _limits(manifest))
    if not found.ok:
        raise VtpError(
            "fidelity check failed: image_features of the folder for transformers.js are not the bundle's: "
            f"{found.why}"
        )
    rows[:] = wanted
    return {"kept": len(rows), "shared": len(rows), "features": found.relative}


def _compare_answer(
    manifest: Manifest,
    runner: StageRunner,
    values: Mapping[str, Value],
    client: Rehearsal,
    features: np.ndarray,
    ids: Sequence[int],
) -> dict[str, Any]:
    """Hold the logits of every token of an answer against the bundle's."""
    wanted, position = values["logits"].numpy()[0, 0], int(values["next_position"].numpy()[0])
    rows = client.logits(ids, features)
    given, equal, worst, number = next(rows), 0, 0.0, 0
    for number in range(STEPS):
        found = compare(given, wanted, _limits(manifest))
        if not found.ok:
            raise VtpError(
                f"fidelity check failed: logits of token {number + 1} of the folder for transformers.js are "
                f"not the bundle's: {found.why}"
            )
        token, worst = int(wanted.argmax()), max(worst, found.relative)
        equal += int(given.argmax()) == token
        if token in manifest.text.eos_token_ids:
            break
        given = rows.send(token)
        wanted = runner.step(manifest.visual.keep[0], token, position + number)
    return {"tokens": number + 1, "equal": equal, "relative": worst}


def _limits(manifest: Manifest) -> str:
    return "int4" if manifest.quantization else manifest.dtype


def _dtype(bundle: Bundle) -> str:
    encoder = bundle.manifest.stages_of("encoder")[0]
    return bundle.manifest.graphs[encoder.file].inputs["pixel_values"].dtype
