"""How much each block of the vision tower matters: the exam with one block, or a part of it, left out.

    python -m vtp.bench.studies.blocks [--model scenes/reader] [--exam reader] [--count 300] [--parts block]

A block that is left out hands on what it was given; of its two parts, attention and mlp, the other stays.
The model runs in plain transformers, unpruned. A block is called used if leaving it out costs answers: if the
95 % interval of the loss, by a paired bootstrap that draws pictures, lies above zero.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

from vtp.bench.studies.paired import interval
from vtp.engines import UsageError
from vtp.export.checkpoint.cache_name import with_cache
from vtp.export.cli import quiet_libraries
from vtp.runtime.commands.arguments import add_debug, add_threads
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.commands.tables import markdown_table
from vtp.scenes import model_dir
from vtp.scenes.exam import EXAMS, SEED, Item, by_picture, held_out, is_right, report, score

PARTS = {"block": "", "attention": "self_attn", "mlp": "mlp"}
ANSWER_TOKENS = 8  # the longest answer of the exam has fewer


@dataclass(frozen=True)
class Row:
    """What leaving out a part of a block costs: rates before minus after, by kind and with its interval."""

    block: int
    part: str
    loss: float
    interval: tuple[float, float]
    by_kind: dict[str, float]

    @property
    def used(self) -> bool:
        """Whether the loss is surely above zero."""
        return self.interval[0] > 0


class Examinee:
    """A LLaVA that takes the exam in plain transformers; a picture and what precedes it is read once."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    @property
    def blocks(self) -> list[Any]:
        """The tower's blocks, the unused last one included."""
        tower = self.model.model.vision_tower
        return list(getattr(tower, "vision_model", tower).encoder.layers)

    @torch.inference_mode()
    def take_exam(self, items: Sequence[Item]) -> list[str]:
        """Greedy answers."""
        return [answer for group in by_picture(items) for answer in self._about_one_picture(group)]

    def _about_one_picture(self, items: Sequence[Item]) -> Iterator[str]:
        prompts = [self._prompt(item) for item in items]
        image_token = self.model.config.image_token_id
        length = int((prompts[0]["input_ids"][0] == image_token).nonzero()[-1]) + 1
        visual = self._visual_tokens(prompts[0]["pixel_values"])
        embedded = self._embed(prompts[0]["input_ids"][:, :length])
        embedded[prompts[0]["input_ids"][:, :length] == image_token] = visual
        cache = DynamicCache()
        self._read(embedded, cache)
        for prompt in prompts:
            yield self._answer(prompt["input_ids"][:, length:], cache)
            cache.crop(length - cache.get_seq_length())  # what is to be removed, below zero

    def _prompt(self, item: Item) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": item.prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return self.processor(images=item.image, text=text, return_tensors="pt")

    def _visual_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, C] of one picture."""
        config, inner = self.model.config, self.model.model
        hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
        return inner.multi_modal_projector(hidden[config.vision_feature_layer][0, 1:])

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(ids)

    def _read(self, embedded: torch.Tensor, cache: DynamicCache) -> int:
        """The next token after `embedded` [1, S, C] behind what the cache holds."""
        decoder = self.model.model.language_model
        hidden = decoder(
            inputs_embeds=embedded, use_cache=True, **with_cache(decoder, cache)
        ).last_hidden_state
        return int(self.model.lm_head(hidden[:, -1]).argmax())

    def _answer(self, ids: torch.Tensor, cache: DynamicCache) -> str:
        said: list[int] = []
        while len(said) < ANSWER_TOKENS:
            token = self._read(self._embed(ids), cache)
            if token == self.model.generation_config.eos_token_id:
                break
            said.append(token)
            ids = torch.tensor([[token]])
        return str(self.processor.decode(said, skip_special_tokens=True))


@contextlib.contextmanager
def left_out(block: Any, part: str) -> Iterator[None]:
    """Within it, `block` (a CLIP layer) does without its `part`, one of `PARTS`."""
    if part == "block":
        hook = block.register_forward_hook(lambda _module, given, _made: given[0])
    elif part == "attention":
        hook = block.self_attn.register_forward_hook(lambda _m, _g, made: (torch.zeros_like(made[0]), None))
    else:
        hook = block.mlp.register_forward_hook(lambda _module, _given, made: torch.zeros_like(made))
    try:
        yield
    finally:
        hook.remove()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.studies.blocks", description="The exam without a tower block.")
    add = parser.add_argument
    add("--model", help="model folder in the built-in model's layout (default: the built-in one)")
    add("--exam", choices=EXAMS, default="model", help="which exam (default: %(default)s)")
    add("--count", type=int, default=300, help="questions (default: %(default)s)")
    add("--seed", type=int, default=SEED, help="seed of the exam (default: %(default)s)")
    add("--parts", default="block", help=f"what is left out, of {', '.join(PARTS)} (default: %(default)s)")
    add_threads(parser, type=int)
    add("--json", metavar="FILE", help="also write the figures to a file")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("blocks", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    quiet_libraries()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"unknown part {unknown[0]!r}; choose of {', '.join(PARTS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    examinee = Examinee(Path(args.model) if args.model else model_dir())
    items, progress = list(held_out(args.count, args.seed, EXAMS[args.exam])), Progress()
    progress.step(f"the whole tower: {len(items)} questions")
    answers = examinee.take_exam(items)
    whole = right(items, answers)
    rows: list[Row] = []
    for number, block in enumerate(examinee.blocks):
        for part in parts:
            progress.step(f"without {part} {number} of {len(examinee.blocks)}")
            with left_out(block, part):
                rows.append(compare(items, whole, right(items, examinee.take_exam(items)), number, part))
    progress.end()
    print(report(score(items, answers)))
    print(f"\n{markdown(rows)}\n\n{len(items)} questions, seed {args.seed}")
    if args.json:
        Path(args.json).write_text(json.dumps([vars(row) | {"used": row.used} for row in rows], indent=1))


def right(items: Sequence[Item], answers: Sequence[str]) -> np.ndarray:
    """Which answers are right: float64 [questions], 0 or 1."""
    pairs = zip(items, answers, strict=True)
    return np.array([is_right(answer, item.answer) for item, answer in pairs], np.float64)


def compare(items: Sequence[Item], whole: np.ndarray, without: np.ndarray, block: int, part: str) -> Row:
    """The row of one part of one block, from who was right with and without it."""
    lost = whole - without
    kinds = np.array([item.kind for item in items])
    by_kind = {str(kind): float(lost[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
    return Row(block, part, float(lost.mean()), interval(lost, [i.picture for i in items]), by_kind)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table in points of exact match lost."""
    kinds = list(rows[0].by_kind)
    lines = []
    for row in rows:
        low, high = (100 * bound for bound in row.interval)
        cells = [f"{100 * row.by_kind[kind]:.1f}" for kind in kinds]
        lost = f"{100 * row.loss:.1f} ({low:.1f} to {high:.1f})"
        lines.append([str(row.block), row.part, lost, "yes" if row.used else "no", *cells])
    header = ["block", "without", "lost (95 %)", "used", *kinds]
    return markdown_table(header, lines, align="rlrlr", tight=True)


if __name__ == "__main__":
    sys.exit(main())
