"""What a model's generation_config asks of its answers: served, said, or refused.

`GenerationConfig` reads it, from generation_config.json or, in its absence, from config.json, as
`from_pretrained` does. Every field that `generate(do_sample=False)` acts on is either served by the runtime
or refused here; what matters to sampling alone, or to the length of answers, is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from vtp.engines import VtpError
from vtp.runtime.bundle.manifest import GenerationInfo
from vtp.runtime.generation.arguments import is_penalty

FILE = "generation_config.json"
# Fields that change greedy answers and that the runtime does not serve -> whether a value does so.
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value != 1,
    "penalty_alpha": lambda value: value > 0,
    "guidance_scale": lambda value: value != 1,
    "encoder_repetition_penalty": lambda value: value != 1,
    "encoder_no_repeat_ngram_size": lambda value: value > 0,
    "constraints": lambda value: True,
    "force_words_ids": lambda value: True,
    "dola_layers": lambda value: True,
    "sequence_bias": lambda value: True,
    "exponential_decay_length_penalty": lambda value: True,
    "stop_strings": lambda value: True,
    "token_healing": bool,
    "watermarking_config": lambda value: True,
    "cache_implementation": lambda value: value == "quantized",  # the others keep what is written to them
}
# Fields that change answers when they are sampled, or only their length -> the value that changes nothing.
_SAID: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "max_new_tokens": None,
    "max_length": 20,
    "max_time": None,
}


@dataclass(frozen=True)
class Generation:
    """The ids that end an answer, what is asked of it, and what is not served, a line each."""

    eos_ids: tuple[int, ...]
    info: GenerationInfo
    notes: tuple[str, ...]


def read_generation(folder: Path, tokenizer: Any, vocabulary: int) -> Generation:
    """Read a model folder's generation settings.

    Raises VtpError for what transformers refuses, and for what would change greedy answers unserved.
    """
    try:
        config = _load(folder)
        _refuse_unserved(config)
        ends, notes = _ends(folder, config, tokenizer, vocabulary)
        info = _served(config, ends, vocabulary)
    except VtpError:
        raise
    except Exception as error:  # of `GenerationConfig` and the processors: wrong types and values
        reason = " ".join(str(error).split())[:240]
        raise VtpError(f"cannot use the generation settings of {folder}: {reason}") from error
    return Generation(tuple(ends), info, (*notes, *_unsaid(config)))


def _load(folder: Path) -> Any:
    """The settings as `PreTrainedModel.from_pretrained` finds them."""
    if (folder / FILE).is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
    )


def _refuse_unserved(config: Any) -> None:
    for name, changes in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and changes(value):
            raise VtpError(
                f"{FILE} sets {name} to {value!r:.60}, which changes greedy answers and is not supported; "
                f"remove {name} from it to export the model without"
            )


def _ends(folder: Path, config: Any, tokenizer: Any, vocabulary: int) -> tuple[list[int], list[str]]:
    """Every id that ends an answer; where none is set the tokenizer's, and a line that says so."""
    given, notes, source = config.eos_token_id, list[str](), FILE
    if given in (None, []):
        given, source = tokenizer.eos_token_id, "the tokenizer"
        notes.append(
            f"{FILE} sets no eos_token_id; answers end with the tokenizer's, {given} (transformers' generate "
            "goes on to the last token)"
        )
    if given is None:
        raise VtpError(f"{folder} names no end-of-sequence token; add eos_token_id to {FILE}")
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise VtpError(f"eos_token_id of {folder / FILE} is {given!r}; give an id or a list of ids")
    _in_vocabulary("eos_token_id", ids, vocabulary, source)
    return sorted(ids), notes


def _served(config: Any, ends: list[int], vocabulary: int) -> GenerationInfo:
    """The settings that the runtime serves, each checked by transformers' own class for it."""
    penalty, ngram = config.repetition_penalty, config.no_repeat_ngram_size
    least, new, words = config.min_length, config.min_new_tokens, config.bad_words_ids
    forced, banned, first = config.forced_eos_token_id, config.suppress_tokens, config.begin_suppress_tokens
    if penalty not in (None, 1):
        RepetitionPenaltyLogitsProcessor(penalty)
        if not is_penalty(penalty):
            raise VtpError(
                f"repetition_penalty of {FILE} is {penalty}; give a number from 1.2e-38 to 3.4e+38 (1: off)"
            )
    if ngram:
        NoRepeatNGramLogitsProcessor(ngram)
    if words is not None:
        NoBadWordsLogitsProcessor(words, ends)
        words = [word for word in words if word and word not in [[end] for end in ends]]
        _in_vocabulary("bad_words_ids", [token for word in words for token in word], vocabulary)
    if least:
        MinLengthLogitsProcessor(least, ends)
    if new:
        MinNewTokensLengthLogitsProcessor(0, new, ends)
    if forced is not None:
        forced = forced if isinstance(forced, list) else [forced]
        ForcedEOSTokenLogitsProcessor(1, forced)
        _in_vocabulary("forced_eos_token_id", forced, vocabulary)
    if banned is not None:
        SuppressTokensLogitsProcessor(banned)
    if first is not None:
        SuppressTokensAtBeginLogitsProcessor(first, 1)
    for token in [*(banned or ()), *(first or ())]:  # of ids that do not exist transformers takes no note
        if not isinstance(token, int):
            raise VtpError(f"{FILE} suppresses the token {token!r:.40}, which is not an id")
    # forced_bos_token_id acts on an answer without a prompt alone: never here.
    return GenerationInfo(
        repetition_penalty=float(penalty or 1.0),
        no_repeat_ngram_size=ngram or 0,
        bad_words_ids=words or [],
        min_length=(least or 0) if new is None else 0,
        min_new_tokens=new or 0,
        forced_eos_token_id=forced or [],
        suppress_tokens=list(banned or []),
        begin_suppress_tokens=list(first or []),
    )


def _in_vocabulary(name: str, ids: list[Any], vocabulary: int, source: str = FILE) -> None:
    for token in ids:
        if not (isinstance(token, int) and 0 <= token < vocabulary):
            raise VtpError(
                f"{name} of {source} has {token!r:.40}, not one of the model's {vocabulary} tokens; give ids "
                f"of 0 to {vocabulary - 1}"
            )


def _unsaid(config: Any) -> list[str]:
    """One line about what is neither served nor changes a greedy answer."""
    found = {name: getattr(config, name, None) for name in _SAID}
    words = [f"{name} {value}" for name, value in found.items() if value not in (None, _SAID[name])]
    if not words:
        return []
    return [
        f"{FILE} also sets {', '.join(words)}: bundles answer greedily, and as long as the caller says "
        "(temperature, top_p, max_new_tokens)"
    ]
