"""`--verify layers`: what goes into every layer of a bundle against what goes into it in transformers.

For models that do not fit into memory: the torch model reads its weights while it runs (see
`vtp.export.checkpoint.weights`), the bundle's graphs run in slices (see `vtp.export.onnx.slices`). Both do
the whole job, so what is compared is what really flows; in addition, every border between two layers is
compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from vtp.engines import Engine, VtpError
from vtp.export.graphs.decoder import DecoderPart
from vtp.export.onnx.slices import SlicedEngine
from vtp.export.plan.plan import Plan
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.compare import compare
from vtp.runtime.opening import every_graph
from vtp.runtime.stages.runner import StageRunner

STEPS = 2  # of generation: each reads all weights twice


class Layers:
    """The layers of all graphs of a bundle, their runner, and what was found at each border.

    worst     graph -> border -> the largest relative difference of a token's row (see `compare`)
    compared  graph -> how often one of its borders was compared
    """

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self.lists = {spec.name: layer_list(spec.module) for spec in plan.graphs}
        self.first = {
            spec.name: spec.module.numbers[0] for spec in plan.graphs if isinstance(spec.module, DecoderPart)
        }
        self.dtype = bundle.manifest.dtype
        self.worst: dict[str, dict[str, float]] = {}
        self.compared: dict[str, int] = {}
        self._engines: dict[str, SlicedEngine] = {}
        self.runner = StageRunner(
            bundle, "ort-cpu", None, every_graph(bundle), open_engine=partial(self._open, bundle)
        )
        self._later: dict[tuple[str, int], list[np.ndarray]] = {}

    @contextmanager
    def listening(self, *graphs: str) -> Iterator[None]:
        """Compare what torch's layers are given with what the graphs' were given in their latest run.

        What they are given the second time and later waits for `check_step`.
        """
        self._later.clear()
        with ExitStack() as stack:
            for graph in graphs:
                if self.lists[graph][1]:
                    self.compared.setdefault(graph, 0)
                for layer, module in enumerate(self.lists[graph][1]):
                    hook = module.register_forward_pre_hook(self._hook(graph, layer), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    def check_step(self, number: int) -> None:
        """Compare the latest run with what torch's layers were given in step `number`, from 1 on."""
        for (graph, layer), given in self._later.items():
            self._check(graph, layer, given[number])

    def check_counts(self) -> None:
        """Raise VtpError where no border of the bundle was compared: nothing is known then."""
        if not sum(self.compared.values()):
            raise VtpError(
                "fidelity check failed: no border between layers was compared, so --verify layers says "
                "nothing; check with --verify full"
            )

    def borders(self, graph: str) -> dict[int, np.ndarray]:
        """Layer -> the hidden states that went into it in the graph's latest run."""
        return self._engines[graph].borders

    def _open(self, bundle: Bundle, file: str) -> Engine:
        """A graph that is open only while it runs, slice by slice."""
        graph = file.removesuffix(".onnx")
        layers = self.lists[graph][0] if graph in self.lists else ""
        self._engines[graph] = SlicedEngine(bundle.path(file), layers)
        return self._engines[graph]

    def _hook(self, graph: str, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            array = hidden.detach().numpy()
            calls = self._later.setdefault((graph, layer), [])
            if not calls:
                self._check(graph, layer, array)
                array = array[:0]  # done with
            calls.append(array.copy())

        return hook

    def _check(self, graph: str, layer: int, wanted: np.ndarray) -> None:
        given = self.borders(graph).get(layer)
        if given is None or given.shape != wanted.shape:
            return  # nothing is cut here, or the graph takes its input in another form
        found = compare(given, wanted, self.dtype)
        number = self.first.get(graph, 0) + layer
        where = f"after layer {number - 1} of {graph}" if layer else f"before layer {number} of {graph}"
        if not found.ok:
            raise VtpError(f"fidelity check failed: {where}, hidden states differ from torch's: {found.why}")
        self.compared[graph] += 1
        name = str(number - 1) if layer else f"before {number}"
        worst = self.worst.setdefault(graph, {})
        worst[name] = max(found.relative, worst.get(name, 0.0))


def layer_list(module: nn.Module) -> tuple[str, list[nn.Module]]:
    """A module's layers, and what the names of their weights start with: its largest ModuleList."""
    best, most = ("", list[nn.Module]()), 0
    for name, part in module.named_modules():
        count = sum(parameter.numel() for parameter in part.parameters())
        if isinstance(part, nn.ModuleList) and count > most:
            best, most = (name, list(part)), count
    return best
