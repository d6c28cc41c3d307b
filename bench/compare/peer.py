"""What every peer of the side-by-side run is: it opens the same weights and answers the same question.

A peer lives in a process of its own (`vtp.bench.compare.worker`) and loads its library there only.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spec:
    """The work, the same for all.

    model    folder in Hugging Face layout
    work     folder for what peers make of it
    ids      tokens of the decoder-only comparison
    keep     visual tokens that pruned peers keep
    bundle   what a vtp peer opens
    """

    model: str
    work: str
    image: str
    prompt: str
    tokens: int
    threads: int
    ids: list[int]
    keep: int
    bundle: str = ""


@dataclass(frozen=True)
class Run:
    """One answer: greedy tokens, as many as asked for, end-of-sequence or not.

    ttft   milliseconds from the call, the picture unopened, to the first token
    tpot   milliseconds of each further token; 0 where there is none
    parts  milliseconds that the peer itself reports of the first token: "encoder", "prompt"
    """

    tokens: list[int]
    ttft: float
    tpot: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Stopwatch:
    """Tokens and the milliseconds at which they came."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.tokens: list[int] = []
        self.times: list[float] = []

    def note(self, token: int) -> None:
        """A token is there."""
        self.times.append((time.perf_counter() - self._start) * 1e3)
        self.tokens.append(token)

    def run(self) -> Run:
        """What was noted."""
        first, last = self.times[0], self.times[-1]
        return Run(self.tokens, first, (last - first) / max(1, len(self.times) - 1))


class Peer(ABC):
    """One way of answering. `needs` names the modules that must be installed, with the line that does it."""

    needs: tuple[tuple[str, str], ...] = ()

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @classmethod
    def lacking(cls) -> str:
        """The line that installs or builds the first thing that this peer lacks here; empty if it can run."""
        return next((line for module, line in cls.needs if not util.find_spec(module)), "")

    @property
    def pid(self) -> int:
        """The process whose memory counts."""
        return os.getpid()

    def close(self) -> None:
        """End what `open` started beside this process."""
        return

    def made(self) -> Path | None:
        """What `prepare` writes; None where nothing needs to be made."""
        return None

    def prepare(self) -> None:
        """Make what `open` opens; called once, in a process of its own, where `made` names a place."""
        raise NotImplementedError(f"{type(self).__name__} names a place and does not fill it")

    @abstractmethod
    def open(self) -> None:
        """Load everything that a run needs."""

    @abstractmethod
    def run(self) -> Run:
        """Answer once."""

    @abstractmethod
    def first_logits(self) -> np.ndarray:
        """Logits float32 [V] of the last prompt position."""


def peer_class(name: str) -> type[Peer]:
    """The class of a peer by its name in `PEERS`."""
    import importlib

    module, _, kind = PEERS[name].partition(":")
    found: Any = getattr(importlib.import_module(module), kind)
    return found


PEERS = {
    "vtp": "vtp.bench.compare.peer_vtp:Whole",
    "vtp-decoder": "vtp.bench.compare.peer_vtp:DecoderOnly",
    "torch": "vtp.bench.compare.peer_torch:Torch",
    "torch-vispruner": "vtp.bench.compare.peer_torch:TorchPruned",
    "transformers-onnx": "vtp.bench.compare.peer_onnx:TransformersOnnx",
    "transformers-onnx-int8": "vtp.bench.compare.peer_onnx_bits:Int8",
    "transformers-onnx-int4": "vtp.bench.compare.peer_onnx_bits:Int4",
    "openvino": "vtp.bench.compare.peer_openvino:TransformersOpenvino",
    "openvino-int8": "vtp.bench.compare.peer_openvino:Int8",
    "openvino-int4": "vtp.bench.compare.peer_openvino:Int4",
    "torch-class-last": "vtp.bench.compare.peer_llamacpp:TorchClassLast",
    "llamacpp": "vtp.bench.compare.peer_llamacpp:LlamaCpp",
    "llamacpp-q8_0": "vtp.bench.compare.peer_llamacpp:LlamaCppQ8",
    "llamacpp-q4_0": "vtp.bench.compare.peer_llamacpp:LlamaCppQ4",
    "llamacpp-f32-q4_0": "vtp.bench.compare.peer_llamacpp:LlamaCppQ4Text",
    "genai": "vtp.bench.compare.peer_genai:Genai",
    "genai-int4": "vtp.bench.compare.peer_genai:GenaiInt4",
}


def missing(name: str) -> str:
    """The line that installs or builds the first thing that a peer lacks here; empty when it can run."""
    return peer_class(name).lacking()
