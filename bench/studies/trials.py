"""The trials that chose focal: other cues and other rules on the built-in model, without bundles.

    python -m vtp.bench.studies.trials [--seed 777] [--count 1000] [--keep 64,32,16] [--only TEXT]

Reads features and attention once per picture from the torch model, selects, and asks the decoder whether the
right answer would be its greedy one: all of its tokens in one pass, the questions about a picture side by
side. That gives the exact match of greedy decoding, some twenty times sooner. docs/focal.md quotes the table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtp.export.cli import quiet_libraries
from vtp.export.keep_counts import parse_keep
from vtp.export.pruners import find_method
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, run_command
from vtp.runtime.commands.tables import markdown_row, markdown_table
from vtp.scenes import model_dir
from vtp.scenes.exam import by_picture, held_out

SIDE, BATCH = 24, 25
COUNT = SIDE * SIDE
Cues = dict[str, Tensor]
Rule = Callable[[Cues, int], Tensor]


@dataclass
class Exam:
    """Cues of P pictures, and per picture its questions: (prompt ids, answer ids)."""

    cues: Cues
    questions: list[list[tuple[list[int], list[int]]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.studies.trials", description="The trials that chose focal.")
    parser.add_argument("--seed", type=whole, default=777, help="seed of the exam (default: %(default)s)")
    parser.add_argument("--count", type=whole, default=1000, help="questions (default: %(default)s)")
    parser.add_argument("--keep", default="64,32,16", help="keep-counts (default: %(default)s)")
    parser.add_argument("--only", default="", help="only rules whose name holds this text")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("trials", lambda: _run(args), args.debug)


@torch.no_grad()
def _run(args: argparse.Namespace) -> None:
    quiet_libraries()
    keeps = parse_keep(args.keep)[::-1]
    ruler = Ruler()
    exam = ruler.read(args.count, args.seed)
    print(markdown_table(["rule", *map(str, keeps)], [], left=1, tight=True))
    for name, (rule, original) in rules().items():
        if args.only in name:
            rates = [100 * ruler.rate(exam, rule, keep, original) for keep in keeps]
            print(markdown_row([name, *(f"{rate:.1f}" for rate in rates)]), flush=True)
    print(f"\n{args.count} questions, seed {args.seed}")


# -- rules ---------------------------------------------------------------------------------------------------


def rules() -> dict[str, tuple[Rule, bool]]:
    """Name -> (rule, whether kept tokens keep their original positions)."""
    table: dict[str, tuple[Rule, bool]] = {}
    for name in ("focal", "vispruner", "fastervlm", "scope"):
        table[name] = method(name), False
        table[f"{name}, original positions"] = method(name), True
    for reach in (0.25, 0.5, 1.5, 2.0):
        table[f"focal, reach {reach}"] = method("focal", reach=reach), False
    table |= {name: (rule, False) for name, rule in _variants().items()}
    return table


def _variants() -> dict[str, Rule]:
    """Focal with one piece changed, and other rules with its cues."""

    def dimmed(scores: Callable[[Cues], Tensor], likeness: Callable[[Cues], Tensor] = half) -> Rule:
        return lambda cues, keep: dim(scores(cues), likeness(cues) * near(math.sqrt(COUNT / keep)), keep)

    def attention(cues: Cues) -> Tensor:
        return cues["attention_scores"]

    return {
        "likeness left out (space only)": dimmed(attention, lambda cues: torch.ones(1, COUNT, COUNT)),
        "likeness: max(cos, 0)": dimmed(attention, lambda cues: cosines(cues).clamp_min(0)),
        "likeness: max(cos, 0), not centred": dimmed(
            attention, lambda cues: cosines(cues, centred=False).clamp_min(0)
        ),
        "likeness of projected tokens": dimmed(attention, lambda cues: half(cues, "image_embeds")),
        "space left out": lambda cues, keep: dim(attention(cues), cosines(cues).clamp_min(0), keep),
        "likeness: exp(-20 (1 - cos)), not centred, space left out": lambda cues, keep: dim(
            attention(cues), decayed(cosines(cues, centred=False)), keep
        ),
        "likeness: exp(-20 (1 - cos)), space left out": lambda cues, keep: dim(
            attention(cues), decayed(cosines(cues)), keep
        ),
        "width fixed at 2 patches": lambda cues, keep: dim(attention(cues), half(cues) * near(2), keep),
        "width fixed at 4 patches": lambda cues, keep: dim(attention(cues), half(cues) * near(4), keep),
        "attention to the power 1/2": dimmed(lambda cues: attention(cues).sqrt()),
        "attention squared": dimmed(lambda cues: attention(cues).square()),
        "ranks of attention": dimmed(lambda cues: attention(cues).argsort(1).argsort(1) + 1.0),
        "largest head": dimmed(lambda cues: cues["largest"]),
        "attention received": dimmed(lambda cues: cues["received"]),
        "attention x attention received": dimmed(lambda cues: attention(cues) * cues["received"]),
        "norm of centred features, no attention": dimmed(lambda cues: norms(cues)),
        "attention x norm of centred features": dimmed(lambda cues: attention(cues) * norms(cues)),
        "attention x norm of centred projections": dimmed(
            lambda cues: attention(cues) * norms(cues, "image_embeds")
        ),
        "scope, centred": lambda cues, keep: cover(
            cosines(cues).clamp_min(0), keep, worth=cues["attention_scores"]
        ),
        "cover attention, centred": lambda cues, keep: cover(
            cosines(cues).clamp_min(0), keep, wanted=cues["attention_scores"]
        ),
        "DPP, attention^(1/4), centred": lambda cues, keep: dpp(attention(cues) ** 0.25, half(cues), keep),
        "DPP, attention^(1/2), centred": lambda cues, keep: dpp(attention(cues) ** 0.5, half(cues), keep),
    }


def method(name: str, **options: Any) -> Rule:
    """A method of the registry as a rule."""

    def rule(cues: Cues, keep: int) -> Tensor:
        pruner = find_method(name)((SIDE, SIDE), keep, **options)
        return pruner(**{cue: cues[cue] for cue in pruner.needs})

    return rule


def cosines(cues: Cues, cue: str = "image_features", centred: bool = True) -> Tensor:
    """Cosines [P,N,N], from the mean over the picture or from 0."""
    rows = cues[cue] - cues[cue].mean(1, keepdim=True) if centred else cues[cue]
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return rows @ rows.transpose(1, 2)


def half(cues: Cues, cue: str = "image_features") -> Tensor:
    """Focal's likeness, 0 to 1."""
    return (1 + cosines(cues, cue)) / 2


def decayed(likeness: Tensor) -> Tensor:
    """Cosines as a likeness that decays with a rate of 20, as ID-Selection's (arXiv 2604.05601) is said to.

    After its abstract and a summary; its formula and code were not read.
    """
    return torch.exp(-20 * (1 - likeness))


def norms(cues: Cues, cue: str = "image_features") -> Tensor:
    """Distance [P,N] of each row from the mean."""
    return (cues[cue] - cues[cue].mean(1, keepdim=True)).norm(dim=-1)


def near(sigma: float) -> Tensor:
    """exp(-d²/(2·sigma²)) for all pairs of patches, [N,N]."""
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
    return torch.exp(-torch.cdist(places, places).square() / (2 * sigma**2))


def dim(scores: Tensor, likeness: Tensor, keep: int) -> Tensor:
    """Keep the highest score, multiply the others by one minus their likeness to it; K times."""
    likeness, every = likeness.expand(len(scores), -1, -1), torch.arange(len(scores))
    picks: list[Tensor] = []
    while len(picks) < keep:
        picks.append(scores.argmax(1))
        scores = scores * (1 - likeness[every, picks[-1]])
        scores[every, picks[-1]] = -1e30
    return torch.stack(picks, 1).sort(1).values


def cover(likeness: Tensor, keep: int, worth: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
    """Keep what adds most coverage, times its own `worth`; `wanted` weighs what is to be covered."""
    every, covered = torch.arange(len(likeness)), torch.zeros(likeness.shape[:2])
    gone = torch.zeros_like(covered)
    picks: list[Tensor] = []
    while len(picks) < keep:
        more = (likeness - covered[:, None]).clamp_min(0)
        gain = more.sum(2) if wanted is None else (more @ wanted[..., None])[..., 0]
        picks.append((gain * (1 if worth is None else worth) + gone).argmax(1))
        covered = torch.maximum(covered, likeness[every, picks[-1]])
        gone[every, picks[-1]] = -1e30
    return torch.stack(picks, 1).sort(1).values


def dpp(quality: Tensor, likeness: Tensor, keep: int) -> Tensor:
    """Greedy MAP of the determinantal process quality_i · likeness_ij · quality_j."""
    every, left = torch.arange(len(quality)), quality * quality
    parts, gone = torch.zeros(len(quality), keep, COUNT), torch.zeros_like(quality)
    picks: list[Tensor] = []
    for step in range(keep):
        best = (left + gone).argmax(1)
        line = quality[every, best][:, None] * likeness[every, best] * quality
        done = (parts[:, :step] * parts[every, :step, best][..., None]).sum(1)
        parts[:, step] = (line - done) / left[every, best].clamp_min(1e-20).sqrt()[:, None]
        left = (left - parts[:, step].square()).clamp_min(0)
        gone[every, best] = -1e30
        picks.append(best)
    return torch.stack(picks, 1).sort(1).values


# -- the ruler -----------------------------------------------------------------------------------------------


class Ruler:
    """The built-in model in torch: cues of pictures, and which questions it answers rightly."""

    def __init__(self) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        load = LlavaForConditionalGeneration.from_pretrained
        self.model: Any = load(model_dir(), attn_implementation="sdpa").eval()
        self.tower: Any = load(model_dir(), attn_implementation="eager").eval().model.vision_tower
        self.processor: Any = AutoProcessor.from_pretrained(model_dir())

    def read(self, count: int, seed: int) -> Exam:
        """Encode every picture once."""
        cues: dict[str, list[Tensor]] = {}
        questions = []
        for group in by_picture(held_out(count, seed)):
            for name, value in self._cues(group[0].image).items():
                cues.setdefault(name, []).append(value)
            questions.append([self._ids(item.prompt, item.answer) for item in group])
        return Exam({name: torch.cat(values) for name, values in cues.items()}, questions)

    def _cues(self, image: Any) -> Cues:
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        seen = self.tower(pixels, output_hidden_states=True, output_attentions=True)
        features, attention = seen.hidden_states[-2][:, 1:], seen.attentions[-2]
        return {
            "image_features": features,
            "image_embeds": self.model.model.multi_modal_projector(features),
            "attention_scores": attention[:, :, 0, 1:].mean(1),
            "largest": attention[:, :, 0, 1:].amax(1),
            "received": attention[:, :, 1:, 1:].mean((1, 2)),
        }

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        asked = self.processor.tokenizer(text)["input_ids"]
        whole = self.processor.tokenizer(f"{text} {answer}</s>")["input_ids"]
        return asked, whole[len(asked) :]

    def rate(self, exam: Exam, rule: Rule, keep: int, original: bool) -> float:
        """The share of questions answered rightly."""
        right: list[bool] = []
        for start in range(0, len(exam.questions), BATCH):
            part = slice(start, start + BATCH)
            cues = {name: value[part] for name, value in exam.cues.items()}
            right += self._right(cues["image_embeds"], exam.questions[part], rule(cues, keep), original)
        return sum(right) / len(right)

    def _right(self, embeds: Tensor, questions: list[Any], kept: Tensor, original: bool) -> list[bool]:
        """Whether each question [B,M] is answered right with the kept tokens [B,K], all M in one pass."""
        decoder, image = self.model.model.language_model, self.model.config.image_token_id
        (batch, keep), most = kept.shape, max(map(len, questions))
        before = questions[0][0][0].index(image)
        prefix = torch.tensor(questions[0][0][0][:before])
        lines = [[(asked + answer[:-1])[before + 1 :] for asked, answer in four] for four in questions]
        width = max(len(line) for four in lines for line in four)
        ids = torch.zeros(batch, most, width, dtype=torch.int64)
        for row, four in enumerate(lines):
            for place, line in enumerate(four):
                ids[row, place, : len(line)] = torch.tensor(line)
        shown = embeds[torch.arange(batch)[:, None], kept]
        text = decoder.embed_tokens(ids.flatten(1))
        tokens = torch.cat([decoder.embed_tokens(prefix).expand(batch, -1, -1), shown, text], 1)
        places = kept if original else torch.arange(keep).expand(batch, -1)
        after = before + (COUNT if original else keep) + torch.arange(width).repeat(most)
        positions = torch.cat(
            [torch.arange(before).expand(batch, -1), before + places, after.expand(batch, -1)], 1
        )
        common = torch.zeros(before + keep, dtype=torch.int64)
        group = torch.cat([common, torch.arange(1, most + 1).repeat_interleave(width)])
        sees = (group == 0) | (group == group[:, None])
        mask = torch.where(sees.tril(), 0.0, -1e9).expand(batch, 1, -1, -1)
        hidden = decoder(
            inputs_embeds=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        said = self.model.lm_head(hidden[:, before + keep :]).argmax(-1).reshape(batch, most, width)
        return [
            said[row, place, len(asked) - before - 2 :][: len(answer)].tolist() == answer
            for row, four in enumerate(questions)
            for place, (asked, answer) in enumerate(four)
        ]


if __name__ == "__main__":
    sys.exit(main())
