"""Options of a generation, of every kind of value, through the library and through vtp-run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from mutate import Step
from subject import Subject, Wrong

from vtp.runtime import Pipeline
from vtp.runtime.commands.run import main

from .commands import run_command

PROMPT, LONG = "what shape is the red ?", 12
_VALUES: dict[str, Any] = {
    "none": None, "zero": 0, "one": 1, "three": 3, "six": 6, "minus": -1, "big": 2**31, "bigger": 2**70,
    "huge": 10**5000, "nan": float("nan"), "inf": float("inf"), "half": 0.5, "tiny": 1e-320,
    "large": 1e308, "true": True, "text": "x", "empty": "", "digits": "3", "list": [],
    "texts": ["x", "re"], "bytes": b"x", "surrogate": "\ud800", "control": "\x1b[2J\n",
    "long": "x" * 100_000, "np": np.int64(3), "np float": np.float32(0.5), "np nan": np.float64("nan"),
    "array": np.zeros(3), "object": object(), "dict": {}, "tuple": ("s",), "odd list": [1],
}  # fmt: skip
_NAMES = ("max_new_tokens", "keep_tokens", "budget_ms", "temperature", "top_p", "seed", "stop")
_FLAGS = (
    "--max-new-tokens", "--keep-tokens", "--temperature", "--top-p", "--seed", "--stop", "--threads",
    "--engine", "--image", "--prompt", "--batch", "--show-kept", "--engines", "--video", "--nonsense",
)  # fmt: skip
_TEXTS = (
    "0", "1", "3", "-1", "nan", "inf", "1e999", "9" * 5000, "", " ", "x" * 300, "x" * 5000, "\x1b[2J",
    "a\nb", "\u202e", "-", "--", "/", ".", "..", "/dev/null", "/dev/zero", "/proc/self/mem", "/dev/full",
    "~", "$(id)", "'", '"', "\udcff", "٣", "0x10", "1_000", "+3", "3.0", "1e1", "True", "None", "ort-cpu",
    "auto", "tensorrt", "/dev/full/x.png", "out.png", "x" * 300 + ".png",
)  # fmt: skip


class Area:
    """Asks a pipeline that stays open, or runs vtp-run."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        self._subject, self._scratch = subject, scratch
        self._pipe = Pipeline.load(subject.bundle, "ort-cpu", threads=1)
        self._long = self._pipe.generate(subject.picture, PROMPT, max_new_tokens=LONG).token_ids

    def draw(self, rng: random.Random) -> list[Step]:
        """["set", option, value...], or ["flag", flag, text]."""
        if rng.random() < 0.7:
            return [
                ["set", rng.choice(_NAMES), rng.choice(list(_VALUES))]
                for _ in range(rng.choice([1, 1, 2, 3]))
            ]
        flags = [["flag", rng.choice(_FLAGS), rng.choice(_TEXTS)] for _ in range(rng.choice([1, 1, 2]))]
        return [*flags, *rng.choice([[], [["json"]]])]

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError for what is refused."""
        if any(step[0] == "set" for step in steps):
            self._ask({step[1]: _VALUES[step[2]] for step in steps if step[0] == "set"})
        else:
            self._command(steps)

    def _ask(self, options: dict[str, Any]) -> None:
        options = {"max_new_tokens": 4, **options}
        result = self._pipe.generate(self._subject.picture, PROMPT, **options)
        keep = options.get("keep_tokens")
        if len(result.token_ids) > options["max_new_tokens"] or (keep and len(result.kept) != keep):
            raise Wrong(f"{len(result.token_ids)} tokens, {len(result.kept)} kept")
        if (
            set(options) == {"max_new_tokens"}
            and result.token_ids[:LONG] != self._long[: len(result.token_ids)]
        ):
            raise Wrong(f"{result.token_ids} instead of {self._long}")

    def _command(self, steps: list[Step]) -> None:
        argv = [
            self._subject.bundle,
            "--image",
            self._subject.picture,
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "2",
        ]
        for kind, *more in steps:
            text = more[-1] if more else ""
            if text in ("out.png", "x" * 300 + ".png"):
                text = str(self._scratch / text)
            argv += [f"{more[0]}={text}"] if kind == "flag" else ["--json"]
        run_command(main, argv, is_json=["json"] in steps)
