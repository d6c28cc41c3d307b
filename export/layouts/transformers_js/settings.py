"""config.json and generation_config.json, from the model's own and what the folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.generation_info import GenerationInfo


def config(bundle: Bundle, model: Path, dtypes: Mapping[str, str], data_files: Mapping[str, int]) -> Any:
    """The model's config.json, written out, with `transformers.js_config`.

    dtypes      what from_pretrained loads when nothing is asked, by graph ("fp32", "q4", …)
    data_files  how many data files a graph has, by its file's name
    """
    own = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    values = json.loads(own.to_json_string(use_diff=False))
    values.pop("auto_map", None)
    manifest = bundle.manifest
    image = manifest.text.image_token_id
    return {
        **values,
        "architectures": [manifest.model.architecture],
        "image_token_id": image,
        "image_token_index": image,
        # The client ends an answer there; a decoder with a window knows no more.
        "max_position_embeddings": _positions(values, manifest.model.max_length),
        "is_encoder_decoder": False,
        "transformers.js_config": {
            "dtype": dict(dtypes),
            "use_external_data_format": {name: count for name, count in data_files.items() if count},
        },
    }


def _positions(values: Mapping[str, Any], max_length: int) -> int:
    """Positions that the model knows, as far as its window where it has one that no prompt may outgrow."""
    text = values.get("text_config") or {}
    known = text.get("max_position_embeddings") or max_length
    window = text.get("sliding_window") if text.get("model_type") != "gemma3_text" else None
    return min(known, window or known)


def generation_config(bundle: Bundle) -> dict[str, Any]:
    """What ends an answer, and what the model's own generation_config asks of greedy answers."""
    manifest = bundle.manifest
    text, asked = manifest.text, manifest.generation
    dropped = manifest.visual.count - manifest.visual.keep[0]
    values = {
        "repetition_penalty": asked.repetition_penalty,
        "no_repeat_ngram_size": asked.no_repeat_ngram_size,
        "bad_words_ids": asked.bad_words_ids,
        "min_length": max(0, asked.min_length - dropped),  # it counts the prompt, all N of whose tokens count
        "min_new_tokens": asked.min_new_tokens,
        "forced_eos_token_id": asked.forced_eos_token_id,
        "suppress_tokens": asked.suppress_tokens,
        "begin_suppress_tokens": asked.begin_suppress_tokens,
    }
    default = vars(GenerationInfo())
    changed = {name: value for name, value in values.items() if value != default[name]}
    ids = {"bos_token_id": text.bos_token_id, "eos_token_id": list(text.eos_token_ids)}
    return {
        **{name: value for name, value in ids.items() if value is not None},
        "do_sample": False,
        **changed,
    }
