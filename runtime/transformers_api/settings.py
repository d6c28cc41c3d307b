"""transformers' keyword arguments of `generate` as a pipeline's options; one line for those not served."""

from __future__ import annotations

from typing import Any

from vtp.engines.errors import UsageError, nearest, quoted_argument

# Served under the same name.
_SAME = ("max_new_tokens", "repetition_penalty", "keep_tokens", "budget_ms", "seed", "timeout_ms")
_SERVED = ("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", *_SAME[1:], "pad_token_id")
# Accepted where they ask for what happens anyway.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "use_cache": (True,),
    "top_k": (0,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "synced_gpus": (False,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
}
_WHY = {
    "num_beams": "a bundle decodes one sequence a row",
    "num_return_sequences": "a bundle decodes one sequence a row; call it again with another seed",
    "top_k": "sampling takes temperature and top_p",
    "streamer": "vtp.Pipeline.stream gives text piece by piece",
    "stop_strings": "vtp.Pipeline.generate takes stop=",
    "return_dict_in_generate": "`results` of the model holds more about the last call",
    "generation_config": "the bundle has the model's own; give single arguments",
    "no_repeat_ngram_size": "it is a setting of the model, and part of the bundle since its export",
    "min_new_tokens": "it is a setting of the model, and part of the bundle since its export",
    "pixel_values_videos": "videos go through vtp.Pipeline",
    "pixel_values_images": "Video-LLaVA's processor is not served; use vtp.Pipeline",
}


def read_settings(
    given: dict[str, Any], prompt_length: int, eos: tuple[int, ...]
) -> tuple[dict[str, Any], int]:
    """The pipeline's options, and the id that pads rows which ended earlier.

    given          keyword arguments as transformers' `generate` has them; None means not given
    prompt_length  tokens that max_length counts, but max_new_tokens does not
    eos            the bundle's end tokens

    UsageError for an argument that is not served, or not with this value.
    """
    given = {name: value for name, value in given.items() if value is not None}
    options = {name: given.pop(name) for name in _SAME if name in given}
    options |= _sampling(given)
    if (longest := given.pop("max_length", None)) is not None:
        options.setdefault("max_new_tokens", _left(longest, prompt_length))
    pad = given.pop("pad_token_id", eos[0])
    if type(pad) is not int or pad < 0:
        raise UsageError(
            f"pad_token_id {quoted_argument(pad)} is not an id; give a whole number of 0 or more"
        )
    _check_ends(given.pop("eos_token_id", None), eos)
    for name, value in given.items():
        _check_harmless(name, value)
    return options, pad


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """temperature and top_p, which mean something with do_sample=True alone."""
    sampled = given.pop("do_sample", False)
    if type(sampled) is not bool:
        raise UsageError(f"do_sample {quoted_argument(sampled)} must be True or False")
    heat, share = given.pop("temperature", None), given.pop("top_p", None)
    if sampled:
        return {"temperature": 1.0 if heat is None else heat, "top_p": 1.0 if share is None else share}
    for name, value, plain in (("temperature", heat, (0, 1)), ("top_p", share, (1,))):
        if value is not None and not (isinstance(value, int | float) and value in plain):
            raise UsageError(f"{name} {quoted_argument(value)} is for sampling; give do_sample=True as well")
    return {}


def _left(longest: Any, prompt_length: int) -> int:
    if type(longest) is not int or longest <= prompt_length:
        raise UsageError(
            f"max_length {quoted_argument(longest)} leaves no room behind the prompt's {prompt_length} "
            "tokens; give a larger one, or max_new_tokens"
        )
    return longest - prompt_length


def _check_ends(given: Any, eos: tuple[int, ...]) -> None:
    """Only the bundle's own end tokens are served."""
    ids = given if isinstance(given, list | tuple) else [given]
    if given is not None and not (all(type(one) is int for one in ids) and set(ids) == set(eos)):
        raise UsageError(
            f"eos_token_id {quoted_argument(given)} is not the bundle's {list(eos)}; leave it out"
        )


def _check_harmless(name: str, value: Any) -> None:
    if any(value is one or (type(value) is type(one) and value == one) for one in _HARMLESS.get(name, ())):
        return
    known = [*_SERVED, *_HARMLESS]
    why = _WHY.get(name, "")
    if name in _HARMLESS:
        plain = _HARMLESS[name][0]
        raise UsageError(
            f"{name}={quoted_argument(value)} is not served, {plain} is{f': {why}' if why else ''}"
        )
    hint = f": {why}" if why else f"{nearest(name, known)}; generate takes {', '.join(_SERVED)}"
    raise UsageError(f"{name} is not served{hint}")
