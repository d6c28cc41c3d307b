"""PyTorch transformers on the same GPU, stage by stage: as it is, and with its work recorded as CUDA graphs.

The model is transformers' own, in float16 with scaled dot product attention, unpruned, filled as the bundles
are (`vtp.bench.gpu.weights`). Two ways to run it: `dynamic`, what `generate` does by itself, a cache that
grows; and `static`, a cache of fixed size, where on a GPU tower, prompt and step are recorded once and
replayed, which takes the host out of it. The latter is more than `generate` does without a compiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.gpu.weights import fill_model
from vtp.bench.shapes.weight_map import MODEL
from vtp.export.checkpoint.cache_name import with_cache

WAYS = ("dynamic", "static")
_WARM_UPS = 2


class TorchModel:
    """The model on a torch device ("cuda" or "cpu"); several ways of running share it."""

    def __init__(self, folder: Path, device: str) -> None:
        """Build and fill the model whose config lies in a bundle's folder."""
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        self.device = device
        config = AutoConfig.from_pretrained(folder / MODEL, local_files_only=True)
        with torch.device(device):
            self.model: Any = AutoModelForImageTextToText.from_config(
                config, dtype=torch.float16, attn_implementation="sdpa"
            ).eval()
        fill_model(self.model, device)

    def encode(self, pixels: Any) -> Any:
        """Visual tokens [1,N,C] of pixel_values [1,3,H,W], projected."""
        found = self.model.get_image_features(pixel_values=pixels)
        found = getattr(found, "pooler_output", found)
        return found if hasattr(found, "shape") else found[0].unflatten(0, (1, -1))

    def embed(self, before: Any, visual: Any, after: Any) -> Any:
        """The prompt's embeddings [1,S,C]: text ids, visual tokens, text ids."""
        import torch

        table = self.model.get_input_embeddings()
        return torch.cat([table(before), visual, table(after)], dim=1)

    def decode(self, embeds: Any, cache: Any, mask: Any = None, positions: Any = None) -> Any:
        """Logits [V] of the last position; keys and values go into the cache."""
        answer = self.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **with_cache(self.model, cache),
        )
        return answer.logits[0, -1]


class Run:
    """One prompt, answered again and again in one way. Every stage leaves its result on the device."""

    def __init__(
        self, held: TorchModel, pixels: np.ndarray, before: list[int], after: list[int], steps: int, way: str
    ) -> None:
        """Warm up; a `static` one on a GPU is recorded here. Raises what torch raises.

        before, after  ids of the text around the picture
        steps          most single steps after a prompt
        """
        import torch

        self._torch, self.held, self.way = torch, held, way
        place = held.device
        self.pixels = torch.tensor(pixels, dtype=torch.float16, device=place)
        self._before = torch.tensor([before], dtype=torch.int64, device=place)
        self._after = torch.tensor([after], dtype=torch.int64, device=place)
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=place)
        with torch.inference_mode():
            visual = held.encode(self.pixels)
            self.length = len(before) + visual.shape[1] + len(after)
            self._static = _Static(self, visual, steps) if way == "static" else None
        self._visual = visual

    def encode(self) -> None:
        """Tower and projector."""
        with self._torch.inference_mode():
            self._visual = self._static.encode() if self._static else self.held.encode(self.pixels)

    def prefill(self) -> None:
        """The prompt into an empty cache, up to the first logits."""
        with self._torch.inference_mode():
            if self._static:
                self.logits = self._static.prefill()
                return
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self.held.model.config.get_text_config())
            self.logits = self.held.decode(self.prompt(self._visual), self._cache)

    def step(self, token: int) -> np.ndarray:
        """One token more; its logits float32 [V], on the host."""
        with self._torch.inference_mode():
            self._token.fill_(token)
            if self._static:
                self.logits = self._static.step()
            else:
                self.logits = self.held.decode(self.one(), self._cache)
        return self.answer()

    def answer(self) -> np.ndarray:
        """The last logits float32 [V], on the host."""
        return self.logits.float().cpu().numpy()

    def prompt(self, visual: Any) -> Any:
        """Embeddings of the whole prompt."""
        return self.held.embed(self._before, visual, self._after)

    def one(self) -> Any:
        """The embedding [1,1,C] of the next token."""
        return self.held.model.get_input_embeddings()(self._token)


class _Static:
    """A cache of fixed size and explicit masks: nothing is allocated or decided while it runs.

    Masks are given, [1,1,S,capacity] of booleans, since those that transformers makes may ask the device for
    a number, which cannot be recorded.
    """

    def __init__(self, run: Run, visual: Any, steps: int) -> None:
        from transformers import StaticCache

        torch, device = run._torch, run.held.device
        self._torch, self._run = torch, run
        capacity = run.length + max(steps, _WARM_UPS + 1)
        self._cache = StaticCache(config=run.held.model.config.get_text_config(), max_cache_len=capacity)
        places = torch.arange(capacity, device=device)
        self._seen = (places[None] <= places[: run.length, None])[None, None]
        self._numbers = places[None, : run.length].clone()
        self._step_seen = torch.zeros((1, 1, 1, capacity), dtype=torch.bool, device=device)
        self._step_number = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._visual = visual.clone()
        self._begin()
        self._decode_prompt()  # the cache is allocated at its first use
        self._encoding = self._recorded(lambda: run.held.encode(run.pixels))
        self._prefilling = self._recorded(self._decode_prompt)
        self._decode_prompt()  # the step's warm-ups write behind it
        self._stepping = self._recorded(self._decode_one)

    def encode(self) -> Any:
        return self._visual.copy_(self._encoding())

    def prefill(self) -> Any:
        self._begin()
        return self._prefilling()

    def step(self) -> Any:
        self._step_seen[..., self._length] = True
        self._step_number.fill_(self._length)
        self._length += 1
        return self._stepping()

    def _begin(self) -> None:
        self._length = self._run.length
        self._step_seen.zero_()
        self._step_seen[..., : self._length] = True

    def _decode_prompt(self) -> Any:
        layers: Any = self._cache.layers
        for layer in layers:  # masks hide what is left of the last prompt: no need to erase it
            layer.cumulative_length.zero_()
        return self._run.held.decode(self._run.prompt(self._visual), self._cache, self._seen, self._numbers)

    def _decode_one(self) -> Any:
        return self._run.held.decode(self._run.one(), self._cache, self._step_seen, self._step_number)

    def _recorded(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The same work as a replayed CUDA graph, on a GPU."""
        if self._run.held.device != "cuda":
            return work
        torch = self._torch
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(
                _WARM_UPS
            ):  # libraries set themselves up at their first call, which cannot be recorded
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


def bandwidth(device: str, size: int, wait: Callable[[], None], rounds: int = 20) -> dict[str, float]:
    """Bytes per second of the memory, the best of `rounds`: reading (a sum; matrix times vector) and copying.

    A copy counts what it reads and what it writes. `size` is in bytes and should be larger than any cache.
    """
    import torch

    width = 4096
    kind = torch.float16 if device == "cuda" else torch.float32
    matrix = torch.ones((size // (width * kind.itemsize), width), dtype=kind, device=device)
    vector, other = torch.ones(width, dtype=kind, device=device), torch.empty_like(matrix)
    flat = matrix.view(torch.float32)
    moved = matrix.numel() * matrix.itemsize
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "sum": (lambda: flat.sum(dim=1), moved),
        "matrix times vector": (lambda: matrix @ vector, moved),
        "copy": (lambda: other.copy_(matrix), 2 * moved),
    }
    found = {}
    for name, (work, amount) in works.items():
        seconds = []
        for _ in range(rounds + 1):
            wait()
            started = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - started)
        found[name] = amount / min(seconds[1:])
    return found
