"""Generation rules on random logits, step by step against the processors of transformers' `generate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.manifest import GenerationInfo
from vtp.runtime.generation.logits_rules import LogitsRules, with_penalty, written_out
from vtp.runtime.generation.sampling import Sampler

VOCABULARY, NEW, ENDS = 24, 10, [3, 7]
# transformers' name -> value; a prompt's ids are 0 to 29, some outside the vocabulary.
RULES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[4], [3], [5, 6], [1, 2, 8], [5, 9]],
    "min_length": 20,
    "min_new_tokens": 4,
    "forced_bos_token_id": 11,
    "forced_eos_token_id": [3, 7],
    "suppress_tokens": [0, 12, 23, 400],
    "begin_suppress_tokens": [13, 14, 15, -1],
}
CASES: dict[str, dict[str, Any]] = {name: {name: value} for name, value in RULES.items()}
CASES |= {
    "below 1": {"repetition_penalty": 0.8},
    "single tokens": {"no_repeat_ngram_size": 1},
    "long runs": {"no_repeat_ngram_size": 9},
    "longer than the prompt": {"bad_words_ids": [list(range(20))]},
    "forced and penalised": {"forced_eos_token_id": [5], "repetition_penalty": 2.0},
    "all but runs": {name: value for name, value in RULES.items() if name != "no_repeat_ngram_size"},
    "all": RULES,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **size))


def processors(model: LlamaForCausalLM, settings: dict[str, Any], length: int) -> Any:
    """What `generate` would apply to logits after a prompt of `length` tokens."""
    config = GenerationConfig(**settings, eos_token_id=ENDS, max_new_tokens=NEW)
    config, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(config, True, "cpu")
    config = model._prepare_generated_length(
        config, True, "min_length" not in settings, "input_ids", length, None
    )
    return model._get_logits_processor(config, input_ids_seq_length=length, device="cpu")


def info_of(settings: dict[str, Any]) -> GenerationInfo:
    given = {key: value for key, value in settings.items() if key != "forced_bos_token_id"}
    if "min_new_tokens" in given:
        given.pop("min_length", None)
    return GenerationInfo(**given)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [2, 17])
def test_scores_are_those_of_transformers(model: LlamaForCausalLM, case: str, length: int) -> None:
    """Bit for bit, whatever was chosen before, for likely and unlikely tokens."""
    rng = np.random.default_rng(length)
    settings, changed = CASES[case], False
    for _ in range(8):
        ids = rng.integers(0, 30 if length > 2 else 6, length).tolist()
        theirs = processors(model, settings, length)
        ours = LogitsRules(info_of(settings), ids, ENDS, NEW)
        for _ in range(NEW):
            logits = (rng.standard_normal(VOCABULARY) * 3).astype(np.float32)
            wanted = theirs(torch.tensor([ids]), torch.from_numpy(logits)[None].clone())[0].numpy()
            changed |= not np.array_equal(wanted, logits)
            if np.isneginf(wanted).all():
                with pytest.raises(VtpError, match="leave no token to choose"):
                    ours(logits)
                token = 0
            else:
                before = logits.copy()
                assert np.array_equal(ours(logits), wanted)
                assert np.array_equal(logits, before)  # they are the engine's
                token = int(wanted.argmax())
            ids.append(token)
            ours.add(token)
    assert changed == (case not in ("forced_bos_token_id", "longer than the prompt", "long runs"))


def test_nothing_is_asked_by_default(model: LlamaForCausalLM) -> None:
    assert len(processors(model, {}, 5)) == 0
    assert info_of({}) == GenerationInfo()
    logits = np.arange(4, dtype=np.float32)
    assert np.array_equal(LogitsRules(GenerationInfo(), [1], ENDS, NEW)(logits), logits)


def test_float16_logits_are_penalised_in_float32() -> None:
    scores = LogitsRules(GenerationInfo(repetition_penalty=3.0), [0], ENDS, NEW)(np.float16([1, 0.2]))
    assert scores.dtype == np.float32 and scores[0] == np.float32(1) / np.float32(3)


@pytest.mark.parametrize("temperature", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_a_banned_token_is_never_sampled(temperature: float, more: dict[str, Any]) -> None:
    rules = LogitsRules(GenerationInfo(suppress_tokens=[1, 2, 4]), [0], ENDS, NEW)
    sampler, logits = Sampler(temperature, seed=3, **more), np.float32([0.5, 9, 8, 0.1, 7, 0.2])
    assert {sampler.pick(logits, rules) for _ in range(300)} <= {0, 3, 5}
    kept, shares = sampler.distribution(rules(logits))
    plain, others = sampler.distribution(np.float32([0.5, 0.1, 0.2]))
    assert [[0, 3, 5].index(token) for token in kept] == plain.tolist() and np.array_equal(shares, others)


def test_a_prompt_is_written_out_with_every_visual_token() -> None:
    assert written_out([1, 5, 9, 6, 9, 7, 9, 2], 9, [3, 1]) == [1, 5, 9, 9, 9, 6, 9, 7, 9, 9, 9, 2]


# Zero or infinite in float32, and an integer that no float holds.
BEYOND = [1e-300, 1e-46, np.float64(1e39), 1e300, 10**300, 2**2000]


@pytest.mark.parametrize("penalty", [0, -1.0, float("nan"), float("inf"), "2", True, *BEYOND])
def test_a_penalty_that_is_none(penalty: Any) -> None:
    with pytest.raises(
        UsageError, match=r"is not allowed; choose a number above 0 .* to 3\.4e\+38"
    ) as caught:
        with_penalty(GenerationInfo(), penalty)
    assert len(str(caught.value)) < 180


@pytest.mark.parametrize("penalty", [1.2e-38, 3.4e38, np.float16(2), np.float64(1e38), 10**38, np.int8(3)])
def test_a_penalty_that_float32_holds_is_transformers(penalty: Any) -> None:
    logits = np.float32([[0.5, -0.0, 1e-30, 2.0]])
    theirs = RepetitionPenaltyLogitsProcessor(float(penalty))(torch.tensor([[0, 1, 2]]), torch.tensor(logits))
    rules = LogitsRules(with_penalty(GenerationInfo(), penalty), [0, 1, 2], ENDS, NEW)
    assert np.array_equal(rules(logits[0]), theirs[0].numpy())


def test_a_penalty_that_makes_scores_infinite_is_named() -> None:
    rules = LogitsRules(GenerationInfo(repetition_penalty=2e-38), [0], ENDS, NEW)
    assert np.isfinite(rules(np.float32([5, 1]))).all()
    with pytest.raises(VtpError, match="repetition_penalty 2e-38 makes scores infinite; choose one nearer"):
        rules(np.float32([50, 1]))


def test_a_caller_s_penalty_comes_first() -> None:
    own = GenerationInfo(repetition_penalty=1.5, min_new_tokens=2)
    assert with_penalty(own, None) is own
    assert with_penalty(own, 1) == GenerationInfo(repetition_penalty=1.0, min_new_tokens=2)
