"""Where a method prunes, as a value: the text that a pruner declares is parsed once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from vtp.engines.errors import UsageError

KINDS = ("vision", "projector", "decoder")


@dataclass(frozen=True)
class Site:
    """A kind of site and, in the decoder, the layers before which tokens are dropped.

    kind    "vision" (behind the tower), "projector" (behind the projector) or "decoder"
    layers  absolute numbers, ascending; () at the other kinds, and for a method that names its layers only
            once it knows the model (`Pruner.sites`)

    Its text is that of a pruner's `site` and of the manifest: "vision", "decoder:2", "decoder:1,3,4".
    """

    kind: str
    layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read "vision", "projector", "decoder", "decoder:L" or "decoder:L,L…"; UsageError otherwise."""
        if text in KINDS:
            return cls(text)
        kind, _, numbers = str(text).partition(":")
        layers = tuple(_layer(number) for number in numbers.split(","))
        if kind == "decoder" and layers[0] > 0 and all(low < high for low, high in pairwise(layers)):
            return cls(kind, layers)
        raise UsageError(
            f"site '{text}' is not vision, projector, decoder:L with L = 1 or more (2: before layer 2), or "
            "decoder with its layers in sites()"
        )

    @property
    def in_decoder(self) -> bool:
        """Whether tokens are dropped between layers of the decoder, where positions cannot be renumbered."""
        return self.kind == "decoder"

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(map(str, self.layers))}" if self.layers else self.kind


def _layer(text: str) -> int:
    """A layer's number; 0 for what is not one."""
    return int(text) if text.isascii() and text.isdecimal() else 0
