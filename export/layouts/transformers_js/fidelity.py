"""A written folder against the bundle that it was made of: the logits of one answer, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import VtpError
from vtp.export.layouts.transformers_js.rehearsal import Rehearsal
from vtp.export.layouts.transformers_js.words import example_prompt
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.compare import compare
from vtp.runtime.example_input import sample_for
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

STEPS = 16


def hold_against(bundle: Bundle, folder: Path, ids: Sequence[int]) -> dict[str, Any]:
    """Answer one question twice: the bundle by its stages, the folder as transformers.js drives it.

    ids  the question's, with K image tokens

    Both are fed the bundle's greedy tokens. Raises VtpError where logits are apart by more than rounding;
    returns how many tokens were compared, how many choices were equal, and the worst relative difference.
    """
    manifest = bundle.manifest
    keep, limits = manifest.visual.keep[0], "int4" if manifest.quantization else manifest.dtype
    pixels = preprocess(sample_for(manifest.image), manifest.image)
    _, prompt = example_prompt(bundle)
    client = Rehearsal(folder)
    rows = client.logits(ids, client.image_features(pixels.astype(np.float32)))
    given, equal, worst, number = next(rows), 0, 0.0, 0
    with ExitStack() as stack:
        runner = StageRunner(bundle, "ort-cpu", None)
        stack.callback(runner.close)
        values = runner.prefill(
            keep, pixels.astype(_dtype(bundle)), prompt.ids, prompt.image_start, Timings()
        )
        wanted, position = values["logits"].numpy()[0, 0], int(values["next_position"].numpy()[0])
        for number in range(STEPS):
            found = compare(given, wanted, limits)
            if not found.ok:
                raise VtpError(
                    f"fidelity check failed: logits of token {number + 1} of the folder for transformers.js "
                    f"are not the bundle's: {found.why}"
                )
            token, worst = int(wanted.argmax()), max(worst, found.relative)
            equal += int(given.argmax()) == token
            if token in manifest.text.eos_token_ids:
                break
            given = rows.send(token)
            wanted = runner.step(keep, token, position + number)
    return {
        "mode": "full",
        "engine": "ort-cpu",
        "tokens": number + 1,
        "equal": equal,
        "relative": worst,
    }


def _dtype(bundle: Bundle) -> str:
    encoder = bundle.manifest.stages_of("encoder")[0]
    return bundle.manifest.graphs[encoder.file].inputs["pixel_values"].dtype
