"""What it saves that attention takes masks: a few layers of a decoder, written both ways.

    python -m vtp.bench.masks [--decoder gemma3|paligemma] [--prompts 100x1728,600x1728] [--layers 2]

Layers as wide as those of Gemma 3 4B or PaliGemma 3B, but for a narrow feed-forward part, so that attention
shows; with random weights in float32, on one thread of ONNX Runtime's CPU provider: in single operators, as
vtp-export writes them, and as it does with `--oldest-onnxruntime 1.30`. 100x1728 is a prompt of 100 tokens in
a cache of 1,728. The two take turns; reported is the least processor time of a layer, of the prompt and of
the steps after it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM

from vtp.engines import UsageError, Value
from vtp.engines.ort.session import OrtEngine
from vtp.export.cli import quiet_libraries
from vtp.export.graphs.attention.decomposed import MASKED
from vtp.export.graphs.attention.masked_query import MASKED_QUERY
from vtp.export.graphs.attention.operators import emitting
from vtp.export.graphs.decoder import Decoder
from vtp.export.onnx.emit import GraphInput, GraphSpec, WeightStore, emit
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, run_command, say
from vtp.runtime.commands.tables import markdown_table

WAYS = {"single operators": MASKED, "masks": MASKED_QUERY}
STEPS = 20
_HEADS: dict[str, Any] = {"num_attention_heads": 8, "head_dim": 256, "vocab_size": 1024}
_B, _S, _C = 2, 6, 16  # of the examples that graphs are traced with


def gemma3(layers: int, feed: int) -> Decoder:
    """Gemma 3 4B's: pictures see themselves, windows of 1,024."""
    config = Gemma3TextConfig(
        hidden_size=2560, intermediate_size=feed, num_key_value_heads=4, num_hidden_layers=layers, **_HEADS
    )
    model = Gemma3ForCausalLM(config)
    return Decoder(model.model, model.lm_head, mask_kind="image", windows=True)


def paligemma(layers: int, feed: int) -> Decoder:
    """PaliGemma 3B's: the whole prompt sees itself."""
    config = GemmaConfig(
        hidden_size=2048, intermediate_size=feed, num_key_value_heads=1, num_hidden_layers=layers, **_HEADS
    )
    model = GemmaForCausalLM(config)
    return Decoder(model.model, model.lm_head, mask_kind="prompt")


DECODERS = {"gemma3": gemma3, "paligemma": paligemma}


class Layers:
    """A decoder's graph on a cache of its own; `run` gives the processor time of one run, in milliseconds."""

    def __init__(self, engine: OrtEngine, capacity: int) -> None:
        self._engine = engine
        caches = {
            name: engine.zeros((1, int(spec.shape[1]), capacity, int(spec.shape[3])), "float32")
            for name, spec in engine.inputs.items()
            if name.startswith("past_key_values.")
        }
        self._lengths = {
            "seqlens_k": engine.zeros((1,), "int32"),
            "total_sequence_length": engine.zeros((), "int32"),
        }
        into = {name.replace("past_key_values", "present"): value for name, value in caches.items()}
        self._held = engine.hold({**caches, **self._lengths}, into)

    def run(self, first: int, rows: np.ndarray) -> float:
        """Rows [1,S,D] after `first` others; the first half of a prompt is a picture."""
        count = rows.shape[1]
        self._lengths["seqlens_k"].update(np.array([first + count - 1], np.int32))
        self._lengths["total_sequence_length"].update(np.array(first + count, np.int32))
        picture = np.arange(count // 2)[::-1]
        feeds: dict[str, Value] = {
            "inputs_embeds": self._engine.put(rows),
            "position_ids": self._engine.put(np.arange(first, first + count)[None]),
        }
        if "ahead" in self._engine.inputs:
            ahead = np.concatenate([picture, np.zeros(count - count // 2, int)])[None]
            feeds["ahead"] = self._engine.put(ahead)
        start = time.process_time()
        self._held.run(feeds)
        return (time.process_time() - start) * 1e3


def written(decoder: Decoder, layers: int, folder: Path) -> dict[str, OrtEngine]:
    """The layers' graph, opened, by the way it was written."""
    engines = {}
    for number, (way, attending) in enumerate(WAYS.items()):
        place = folder / str(number)
        place.mkdir()
        with emitting(decoder.model, None, attending):
            path = emit(_spec(decoder, layers), WeightStore(place))
        engines[way] = OrtEngine(path, threads=1)
    return engines


def _spec(decoder: Decoder, layers: int) -> GraphSpec:
    rows, cache = {0: "batch", 1: "sequence"}, {0: "batch", 2: "capacity"}
    whole_numbers = torch.arange(_S).expand(_B, _S).clone()
    inputs = [
        GraphInput("inputs_embeds", torch.zeros(_B, _S, decoder.width), rows),
        GraphInput("position_ids", whole_numbers, rows),
        GraphInput("seqlens_k", torch.full((_B,), _S - 1, dtype=torch.int32), {0: "batch"}),
        GraphInput("total_sequence_length", torch.tensor(_S, dtype=torch.int32)),
    ]
    if decoder.mask_kind == "image":
        inputs.append(GraphInput("ahead", torch.zeros_like(whole_numbers), rows))
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    past = torch.zeros(_B, decoder.kv_heads, _C, decoder.head_dim)
    inputs += [GraphInput(f"past_key_values.{name}", past, cache) for name in names]
    outputs = ["logits", *(f"present.{name}" for name in names)]
    return GraphSpec("decoder", decoder.part(0, layers), inputs, outputs)


def measured(
    engines: dict[str, OrtEngine], prompt: int, capacity: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Least milliseconds of the prompt and of a step, by the way; all of them take turns."""
    width = int(next(iter(engines.values())).inputs["inputs_embeds"].shape[2])
    rows = np.random.default_rng(0).standard_normal((1, prompt + STEPS, width)).astype(np.float32)
    opened = {way: Layers(engine, capacity) for way, engine in engines.items()}
    found = {way: (list[float](), list[float]()) for way in engines}
    for number in range(rounds):
        for way in list(opened)[:: 1 if number % 2 else -1]:
            found[way][0].append(opened[way].run(0, rows[:, :prompt]))
            places = range(prompt, prompt + STEPS)
            found[way][1].extend(opened[way].run(at, rows[:, at : at + 1]) for at in places)
    return {way: (min(prompts), min(steps)) for way, (prompts, steps) in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.masks", description="What attention that takes masks saves.")
    add = parser.add_argument
    add("--decoder", default="gemma3", help="gemma3 or paligemma (default: %(default)s)")
    add(
        "--prompts", default="100x1728,600x1728", help="tokens x capacity of the cache (default: %(default)s)"
    )
    add("--layers", type=whole, default=2, help="of the decoder (default: %(default)s)")
    add(
        "--feed-forward",
        type=whole,
        default=256,
        help="width of that part (default: %(default)s; gemma3 has 10240, paligemma 16384)",
    )
    add("--rounds", type=whole, default=5, help="turns of each (default: %(default)s)")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("masks", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.decoder not in DECODERS:
        raise UsageError(f"unknown decoder '{args.decoder}'; choose one of {', '.join(DECODERS)}")
    cases = [_case(text) for text in args.prompts.split(",")]
    quiet_libraries()
    torch.manual_seed(0)
    rows = []
    with TemporaryDirectory() as folder:
        engines = written(DECODERS[args.decoder](args.layers, args.feed_forward), args.layers, Path(folder))
        for prompt, capacity in cases:
            for way, times in measured(engines, prompt, capacity, args.rounds).items():
                rows.append([f"{prompt} in {capacity}", way, *(f"{ms / args.layers:.1f}" for ms in times)])
    say(markdown_table(["prompt", "attention", "prompt, ms a layer", "step, ms a layer"], rows, left=2))


def _case(text: str) -> tuple[int, int]:
    prompt, _, capacity = text.partition("x")
    numbers = all(part.isascii() and part.isdecimal() for part in (prompt, capacity))
    if not (numbers and 2 <= int(prompt) <= int(capacity) - STEPS):
        raise UsageError(
            f"prompt '{text}' is not of the form TOKENSxCAPACITY, with {STEPS} places left for steps"
        )
    return int(prompt), int(capacity)


if __name__ == "__main__":
    sys.exit(main())
