"""What a long-running process is asked: every kind of request, good and bad, in random order."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtp.engines import VtpError
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import whole_bundle

_WORDS = ("what", "where", "how", "many", "is", "the", "red", "blue", "star", "circle", "color", "left", "?")
_TOGETHER = 3  # pictures of a batch, at most
_KNOWN = np.random.default_rng(7).integers(0, 256, (60, 80, 3), dtype=np.uint8)


class Asker:
    """Two pipelines that stay open, and everything that is done with them and beside them."""

    def __init__(self, bundles: tuple[Path, Path], place: Path, seed: int) -> None:
        self._bundles, self._place, self._turn = bundles, place, 0
        self._chance = random.Random(seed)
        self._spare = place / "spare"
        self._replace()
        self._plain = Pipeline.load(bundles[0], threads=1)
        self._caching = Pipeline.load(bundles[0], threads=1, vision_feature_cache=3, prefix_caching=True)
        self._expected = self._known(self._plain)
        self.wrong: list[str] = []
        self._warm_up()

    @property
    def kinds(self) -> dict[str, Callable[[], None]]:
        """Every kind of request by name; the rare ones cost most."""
        return {
            "answers": self._answer,
            "cached": self._cached,
            "batches": self._batch,
            "cancelled": self._cancel,
            "abandoned": self._abandon,
            "refused": self._refuse,
            "loads": self._load,
            "overwrites": self._replace,
        }

    def close(self) -> None:
        """Close both pipelines."""
        self._plain.close()
        self._caching.close()

    def _warm_up(self) -> None:
        """The largest of everything first: what an engine keeps for it is no growth later on."""
        prompt = " ".join(_WORDS * 2)[:80]
        for keep in self._plain.manifest.visual.keep:
            self._plain.generate_batch([_KNOWN] * _TOGETHER, [prompt] * _TOGETHER, keep_tokens=keep)
        for number in range(4):
            self._caching.generate(_KNOWN + np.uint8(number), prompt, max_new_tokens=12)

    def _answer(self) -> None:
        """Another picture, prompt, keep-count and temperature; now and then the one that is known."""
        self._plain.generate(self._picture(), self._prompt(), **self._options())
        if self._chance.random() < 0.2 and (found := self._known(self._plain)) != self._expected:
            self.wrong.append(f"the same question was answered {found} instead of {self._expected}")

    def _cached(self) -> None:
        picture = self._picture()
        for _ in range(2):
            self._caching.generate(picture, self._prompt(), max_new_tokens=4)

    def _batch(self) -> None:
        count = self._chance.randint(1, _TOGETHER)
        self._plain.generate_batch(
            [self._picture() for _ in range(count)], [self._prompt() for _ in range(count)], max_new_tokens=4
        )

    def _cancel(self) -> None:
        stream = self._plain.stream(self._picture(), self._prompt(), max_new_tokens=12)
        for number, _ in enumerate(stream):
            if number == 1:
                stream.cancel()

    def _abandon(self) -> None:
        next(self._plain.stream(self._picture(), self._prompt(), max_new_tokens=12), None)

    def _refuse(self) -> None:
        """Errors of every stage: no picture, too long, an unknown keep-count, no bundle, a broken one."""
        bad: list[Callable[[], Any]] = [
            lambda: self._plain.generate(b"no picture", "what ?"),
            lambda: self._plain.generate(self._place / "missing.png", "what ?"),
            lambda: self._plain.generate(_KNOWN, "what " * 5000),
            lambda: self._plain.generate(_KNOWN, "what ?", keep_tokens=99),
            lambda: self._plain.generate(_KNOWN, "what ?", temperature=-1),
            lambda: Pipeline.load(self._place / "missing"),
            lambda: Pipeline.load(self._place),
            lambda: Pipeline.load(self._bundles[0], engine="tensorrt"),
            self._load_broken,
        ]
        try:
            self._chance.choice(bad)()
        except VtpError:
            return
        self.wrong.append("a bad request was answered")

    def _load_broken(self) -> None:
        """A graph that only fails when it is opened: what was opened before must be closed."""
        broken = self._place / "broken"
        if not broken.exists():
            shutil.copytree(self._bundles[0], broken)
            size = (broken / "decoder.onnx").stat().st_size
            (broken / "decoder.onnx").write_bytes(bytes(size))
        Pipeline.load(broken, threads=1)

    def _load(self) -> None:
        with Pipeline.load(self._spare, threads=1, check_hashes=True) as pipe:
            pipe.generate(self._picture(), self._prompt(), max_new_tokens=3)

    def _replace(self) -> None:
        """The other bundle takes the place of the spare one."""
        self._turn += 1
        with whole_bundle(self._spare, overwrite=True) as aside:
            for file in self._bundles[self._turn % 2].iterdir():
                shutil.copyfile(file, aside / file.name)

    def _picture(self) -> Any:
        size = self._chance.randint(8, 300), self._chance.randint(8, 300)
        color = tuple(self._chance.randrange(256) for _ in range(3))
        image = Image.new("RGB", size, color)
        if self._chance.random() < 0.3:
            return np.asarray(image)
        if self._chance.random() < 0.5:
            return image
        data = io.BytesIO()
        image.save(data, self._chance.choice(["PNG", "JPEG"]))
        return data.getvalue()

    def _prompt(self) -> str:
        return " ".join(self._chance.choices(_WORDS, k=self._chance.randint(1, 12)))

    def _options(self) -> dict[str, Any]:
        keep = self._chance.choice(self._plain.manifest.visual.keep)
        warm = self._chance.random() < 0.3
        return {
            "keep_tokens": keep,
            "max_new_tokens": self._chance.randint(1, 12),
            "temperature": 0.8 if warm else 0.0,
            "seed": self._chance.randrange(1000),
            "stop": ["star"] if self._chance.random() < 0.2 else None,
        }

    @staticmethod
    def _known(pipe: Pipeline) -> list[int]:
        return pipe.generate(_KNOWN, "what color is the star ?", max_new_tokens=8).token_ids
