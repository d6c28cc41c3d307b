"""A full-size shape beside PyTorch transformers on the same GPU, in turns: what `vtp.bench.gpu.shape` runs.

Both hold the same random numbers and answer the same picture and question; PyTorch sees every visual token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.common.figures import ratio, spread
from vtp.bench.gpu.beside_torch import WAYS, Run, TorchModel, bandwidth
from vtp.bench.gpu.checks import LIMITS, WARM_UPS, Job, Opened, WaitingTimings
from vtp.bench.gpu.device import Device
from vtp.bench.gpu.weights import fill_bundles
from vtp.bench.measure import part_of, step_work
from vtp.engines import capabilities
from vtp.runtime.compare import compare
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Timings
from vtp.scenes.exam import held_out

PARTS = ("encoder", "pruner", "prefill", "first token", "decode step")
_BANDWIDTH_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}

Turn = dict[str, float]  # part -> milliseconds


def torch_device(engine: str) -> str:
    """Where PyTorch is put beside an engine."""
    return capabilities(engine).device


def weights(job: Job, device: Device) -> dict[str, Any]:
    """Fill the bundle and its neighbours with random numbers, where that was not done yet."""
    started = time.perf_counter()
    folders = sorted(path.parent for path in Path(job.bundle).parent.glob("*/manifest.json"))
    found = fill_bundles(folders, torch_device(job.engine))
    return {"note": "", **found, "seconds": round(time.perf_counter() - started, 1)}


def beside(job: Job, device: Device) -> dict[str, Any]:
    """Milliseconds of every part, of the bundle and of PyTorch in turns; ratios, memory, the memory's rate.

    Encoder, pruner and prefill are timed one by one on an idle device, `first token` from the picture's
    pixels to the logits on the host in one go, `decode step` is a turn's median. `memory` is what opening and
    running added to the GPU.
    """
    place = torch_device(job.engine)
    before = device.used()
    with closing(Shape(job, device)) as shape:
        for _ in range(WARM_UPS):
            shape.turn()
        memory = {"vtp": device.used() - before}
        before = device.used()
        held = TorchModel(Path(job.bundle), place)
        peers, failed = _peers(shape, held, job.steps)
        memory["torch"] = device.used() - before
        turns = _take_turns(shape, peers, job.rounds, device)
        close, same = _logits(shape, next(iter(peers.values())), job.steps) if peers else ({}, "")
        read, _ = step_work(shape.opened.bundle, shape.opened.keep, shape.opened.lengths, job.engine)
    rates = bandwidth(place, _BANDWIDTH_BYTES[place], device.wait)
    notes = [same, *(f"PyTorch {way}: {why}" for way, why in failed.items())]
    return {
        "note": "; ".join(filter(None, notes)),
        "decisions": shape.opened.notes,
        "tokens": {"vtp": shape.length, **{way: peer.length for way, peer in peers.items()}},
        "ms": {who: {part: spread(list(ms)) for part, ms in parts.items()} for who, parts in turns.items()},
        "ratios": {way: _ratios(turns[way], turns["vtp"]) for way in peers},
        "logits": close,
        "memory": memory,
        "step_bytes": read,
        "bandwidth": rates,
    }


class Shape:
    """The bundle under measurement, one picture and one question."""

    def __init__(self, job: Job, device: Device) -> None:
        """Open the bundle; VtpError for what cannot run here."""
        self._device, self.steps = device, job.steps
        self.opened = Opened(job.bundle, job.engine, job.keep, cuda_graph=job.cuda_graph)
        item = next(iter(held_out(1)))
        self.pixels = preprocess(load_image(item.image), self.opened.manifest.image)
        self.prompt = self.opened.encode(item.prompt)

    @property
    def length(self) -> int:
        """Tokens of the prompt as the last layer sees it."""
        return sum(map(len, self.text)) + self.opened.keep

    @property
    def text(self) -> tuple[list[int], list[int]]:
        """Ids before and after the picture's place."""
        ids, start = self.prompt.ids, self.prompt.image_start
        return ids[:start], ids[start + len(self.opened.manifest.text.placeholder_ids) :]

    def turn(self) -> Turn:
        """Milliseconds of every part, once."""
        timings, manifest = WaitingTimings(self._device), self.opened.manifest
        self.start(timings)
        found: Turn = {}
        for stage, ms in timings.stages.items():
            part = part_of(manifest, stage)
            found[part] = found.get(part, 0.0) + ms
        found["first token"] = _timed(lambda: self.start()["logits"].numpy(), self._device)
        steps = [_timed(partial(self.step, at, 0), self._device) for at in range(self.steps)]
        return {**found, "decode step": float(np.median(steps))}

    def start(self, timings: Timings | None = None) -> dict[str, Any]:
        """Everything from the pixels to the first logits."""
        prompt, keep = self.prompt, self.opened.keep
        values = self.opened.stages.prefill(
            keep, self.pixels, prompt.ids, prompt.image_start, timings or Timings()
        )
        self._position = int(values["next_position"].numpy()[0])
        return values

    def step(self, number: int, token: int) -> np.ndarray:
        """Logits after one token more, the `number`-th since the prompt."""
        # A copy: the next step writes into the same place.
        return np.array(self.opened.stages.step(self.opened.keep, token, self._position + number))

    def close(self) -> None:
        """Free the graphs."""
        self.opened.close()


def _peers(shape: Shape, held: TorchModel, steps: int) -> tuple[dict[str, Run], dict[str, str]]:
    """PyTorch's ways that run here, and why the others do not."""
    peers: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for way in WAYS:
        try:
            peers[way] = Run(held, shape.pixels, *shape.text, steps, way)
        except Exception as error:  # of whatever kind: the other way goes on
            failed[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return peers, failed


def _torch_turn(run: Run, steps: int, device: Device) -> Turn:
    def whole() -> None:
        run.encode()
        run.prefill()
        run.answer()

    found = {"encoder": _timed(run.encode, device), "prefill": _timed(run.prefill, device)}
    found["first token"] = _timed(whole, device)
    times = [_timed(lambda: run.step(0), device) for _ in range(steps)]
    return {**found, "decode step": float(np.median(times))}


def _take_turns(
    shape: Shape, peers: Mapping[str, Run], rounds: int, device: Device
) -> dict[str, dict[str, list[float]]]:
    """Everybody once a round, in an order that changes; who -> part -> milliseconds."""
    takers: dict[str, Callable[[], Turn]] = {"vtp": shape.turn}
    for way, run in peers.items():
        takers[way] = partial(_torch_turn, run, shape.steps, device)
        takers[way]()  # a warm-up
    found: dict[str, dict[str, list[float]]] = {who: {} for who in takers}
    names = list(takers)
    for number in range(rounds):
        for who in names[number % len(names) :] + names[: number % len(names)]:
            for part, ms in takers[who]().items():
                found[who].setdefault(part, []).append(ms)
    return found


def _ratios(theirs: Mapping[str, list[float]], ours: Mapping[str, list[float]]) -> dict[str, Any]:
    """How many times longer PyTorch takes, part by part, with the 95 % interval."""
    return {part: ratio(theirs[part], ours[part]) for part in PARTS if part in theirs and part in ours}


def _logits(shape: Shape, run: Run, steps: int) -> tuple[dict[str, Any], str]:
    """Logits of the first position and of steps on the same tokens, where both see every visual token."""
    if shape.opened.keep != shape.opened.manifest.visual.count:
        return {}, ""
    mine = [shape.start()["logits"].numpy()[0, 0].astype(np.float32)]
    run.encode()
    run.prefill()
    theirs = [run.answer()]
    for number in range(steps):
        token = int(mine[-1].argmax())
        mine.append(shape.step(number, token))
        theirs.append(run.step(token))
    pairs = list(zip(mine, theirs, strict=True))
    found = [compare(one, two, LIMITS) for one, two in pairs]
    equal = sum(int(a.argmax()) == int(b.argmax()) for a, b in pairs)
    figures = {
        "compared": len(mine),
        "equal": equal,
        "cosine_min": min(one.cosine for one in found),
        "relative_max": max(one.relative for one in found),
    }
    wrong = next((one for one in found if not one.ok), None)
    return figures, f"logits beside PyTorch's: {wrong.why}" if wrong else ""


def _timed(work: Callable[[], Any], device: Device) -> float:
    device.wait()
    started = time.perf_counter()
    work()
    device.wait()
    return (time.perf_counter() - started) * 1e3


SHAPE_CHECKS: dict[str, Callable[[Job, Device], dict[str, Any]]] = {"weights": weights, "beside": beside}
