"""`VtpForImageTextToText`: a bundle with transformers' `from_pretrained` and `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import AUTO, UsageError, VtpError
from vtp.engines.disk.files import is_file
from vtp.engines.errors import quoted, shown
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.hub.names import hub_name
from vtp.runtime.media.given import as_array
from vtp.runtime.pipeline import Pipeline
from vtp.runtime.result import Result
from vtp.runtime.shell import command_line
from vtp.runtime.transformers_api.inputs import IMPLIED, TENSORS, read_rows
from vtp.runtime.transformers_api.settings import read_settings

# What callers of transformers' from_pretrained often give.
_OF_TORCH = ("device_map", "torch_dtype", "dtype", "attn_implementation", "quantization_config")
_CHOSEN = "a bundle's numbers are chosen when it is exported, and its device by engine="


class VtpForImageTextToText:
    """Takes the tensors of the model's own, unmodified processor, and gives ids as transformers does.

    The picture is pruned inside: `input_ids` hold a place for each of the N visual tokens, as processors
    write them, and so do the ids that come back. `results` has the pipeline's results of the last call, a row
    each: visual tokens before and after, which were kept, timings. transformers and torch are needed for the
    processor only, and not imported here.
    """

    device = "cpu"  # where inputs are wanted, whichever engine runs

    def __init__(self, pipeline: Pipeline) -> None:
        """Answer with a pipeline; most users call `from_pretrained`."""
        if pipeline.manifest.image.frames is not None:
            raise UsageError(
                "this bundle answers about videos, whose tensors are not served here; use Pipeline"
            )
        self.pipeline = pipeline
        self.results: list[Result] = []

    @classmethod
    def from_pretrained(
        cls, bundle: str | Path, *, engine: str = AUTO, threads: int | None = None, **loading: Any
    ) -> VtpForImageTextToText:
        """Open a bundle that vtp-export made of the model.

        engine, threads, loading  as `Pipeline.load` takes them

        Raises VtpError as `Pipeline.load` does, and for the folder of a model that is not exported;
        UsageError for device_map and the like.
        """
        if odd := next((name for name in _OF_TORCH if name in loading), None):
            raise UsageError(f"{odd} is not served: {_CHOSEN}; leave it out")
        of_the_hub = hub_name(bundle) is not None
        if not of_the_hub and is_file(Path(bundle, "config.json")) and not is_file(Path(bundle, MANIFEST)):
            line = command_line("vtp-export", "--model", Path(bundle), "-o", "bundle")
            raise VtpError(f"{quoted(str(bundle))} is a model, not a bundle; export it: {shown(line)}")
        return cls(Pipeline.load(bundle, engine, threads, **loading))

    def eval(self) -> VtpForImageTextToText:
        """Itself: a bundle cannot be trained."""
        return self

    def generate(self, inputs: Any = None, **given: Any) -> Any:
        """Continue every row of `input_ids`, in transformers' manner.

        input_ids        integers [B,S] (also as the first argument): a torch tensor or an array
        attention_mask, pixel_values, image_sizes, image_grid_thw, pixel_attention_mask  as the model's
                         processor gives them; token_type_ids and mm_token_type_ids follow from the ids
        max_new_tokens   128 unless given; or max_length, which counts the prompt as well
        do_sample        False: greedy. True: temperature (1.0) and top_p (1.0) are used, repeatable with
                         `seed`, and no top_k: transformers' own default is 50
        repetition_penalty, keep_tokens, budget_ms, timeout_ms  as in `Pipeline.generate`
        pad_token_id     what stands behind rows that ended early (default: the bundle's first end token)

        Returns ids [B, S + new] of the kind that was given: the prompt, the answer, its end token. Raises
        UsageError, in one line, for what is not served, and for pictures of another size than the
        bundle's: it is made for one.
        """
        if inputs is not None:
            if "input_ids" in given:
                raise UsageError("input_ids are given twice; give them once")
            given["input_ids"] = inputs
        if (ids := given.pop("input_ids", None)) is None:
            raise UsageError(
                "input_ids are missing; give what the model's processor returns: generate(**inputs)"
            )
        tensors = {name: given.pop(name, None) for name in TENSORS}
        for name in IMPLIED:
            given.pop(name, None)
        manifest = self.pipeline.manifest
        rows = read_rows(manifest, ids, tensors)
        prompt = as_array("input_ids", ids)
        options, pad = read_settings(given, prompt.shape[1], manifest.text.eos_token_ids)
        self.results = self._answer(rows, options)
        return _like(ids, _joined(prompt, [result.token_ids for result in self.results], pad))

    def _answer(self, rows: list[Any], options: dict[str, Any]) -> list[Result]:
        """The pipeline's results; it takes prompts that are tokenized and pictures that are ready as well."""
        if len(rows) == 1:
            prompt, pictures = rows[0]
            return [self.pipeline.generate(pictures, prompt, **options)]
        prompts, pictures = [row[0] for row in rows], [row[1] for row in rows]
        return self.pipeline.generate_batch(pictures, prompts, **options)


def _joined(prompt: np.ndarray, answers: list[list[int]], pad: int) -> np.ndarray:
    """Prompts and answers [B, S + longest]."""
    longest = max(map(len, answers))
    new = [[*ids, *[pad] * (longest - len(ids))] for ids in answers]
    return np.concatenate([prompt, np.array(new, prompt.dtype).reshape(len(prompt), longest)], axis=1)


def _like(given: Any, ids: np.ndarray) -> Any:
    """Ids as what was given: torch's tensors make others of their kind, and torch is not needed here."""
    return given.new_tensor(ids.tolist()) if hasattr(given, "new_tensor") else ids
