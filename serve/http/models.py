"""What is served: names, the schedulers behind them, and what clients are told of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtp.engines.errors import quoted_argument
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.scheduler import Scheduler
from vtp.serve.http.errors import ApiError
from vtp.serve.shadow import Shadow
from vtp.serve.slo import Slo


@dataclass(frozen=True)
class Model:
    """A bundle under the name that requests give; its scheduler answers them.

    slo     chooses keep-counts that are in time, where there is an aim
    shadow  answers a share of the requests again, by another bundle
    """

    name: str
    scheduler: Scheduler
    slo: Slo | None = None
    shadow: Shadow | None = None
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return self.scheduler.pipeline.manifest

    @property
    def modalities(self) -> list[str]:
        """What a request may hold."""
        return ["text", self.manifest.text.media]

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together, as `usage` counts them: visual ones as kept.

        Parts of the decoder behind a pruner have room for fewer tokens than the manifest's `max_length`, in
        which visual tokens count before pruning.
        """
        caches = [graph.kv.capacity for graph in self.manifest.graphs.values() if graph.kv]
        return min(caches, default=self.manifest.model.max_length)

    def card(self) -> dict[str, Any]:
        """Its entry in the list of models: OpenAI's fields, and those that clients of other servers read."""
        manifest = self.manifest
        then = manifest.method.then
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "vtp",
            "max_model_len": self.max_tokens,
            "modalities": self.modalities,
            "architecture": {"input_modalities": self.modalities, "output_modalities": ["text"]},
            "vtp": {
                "family": manifest.model.family,
                "method": manifest.method.name,
                "site": manifest.method.site,
                "tower": manifest.tower.to_json() if manifest.tower else None,
                **(
                    {"then": {"name": then.name, "layer": then.layer, "keep_tokens": then.keep}}
                    if then
                    else {}
                ),
                "visual_tokens": manifest.visual.count,
                "keep_tokens": sorted(manifest.visual.keep),
                "default_keep_tokens": manifest.visual.default_keep,
                "engine": self.scheduler.pipeline.engine,
            },
        }


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """The refusal of a model that is not served."""
    names = ", ".join(quoted_argument(one) for one in known)
    return ApiError(
        f"there is no model {quoted_argument(name)}; this server has {names}",
        404,
        param="model",
        code="model_not_found",
    )


class Models:
    """The models of a server, which may be added while it already listens. Safe from any thread.

    `ready` and `stopping` say whether requests are taken; `lookup` refuses them otherwise.
    """

    def __init__(self, schedulers: Mapping[str, Scheduler] | None = None, names: Sequence[str] = ()) -> None:
        """Everything that is served, by name; or the names of what will be: `add` it, then call `loaded`."""
        self.names = tuple(names if schedulers is None else schedulers)
        self.stopping = False
        self._models: dict[str, Model] = {}
        self._lock = threading.Lock()
        self._loaded = schedulers is not None
        for name, scheduler in (schedulers or {}).items():
            self.add(name, scheduler)

    def add(
        self, name: str, scheduler: Scheduler, slo: Slo | None = None, shadow: Shadow | None = None
    ) -> None:
        """Serve another model."""
        with self._lock:
            self._models[name] = Model(name, scheduler, slo, shadow)

    def loaded(self) -> None:
        """Every model is there: take requests."""
        self._loaded = True

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._loaded and not self.stopping

    @property
    def state(self) -> str:
        """ "loading", "ready" or "stopping"."""
        return "stopping" if self.stopping else "ready" if self._loaded else "loading"

    def check_ready(self) -> None:
        """ApiError 503 while requests are not taken."""
        if not self.ready:
            raise ApiError(f"the server is {self.state}; try again later", 503, headers={"Retry-After": "1"})

    def lookup(self, name: object) -> Model:
        """The model that a request names: the first where it names none. ApiError 404 for others."""
        self.check_ready()
        models = list(self)
        if name is None or name == "":
            return models[0]
        if not isinstance(name, str):
            raise ApiError(f"model {quoted_argument(name)} is not text", param="model")
        for model in models:
            if model.name == name:
                return model
        raise unknown_model(name, [model.name for model in models])

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """Name -> scheduler of every model that is loaded."""
        return {model.name: model.scheduler for model in self}

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        stats = [model.scheduler.stats() for model in self]
        return not any(one.running or one.waiting for one in stats)

    def cancel(self) -> None:
        """Take no more requests, and cancel those that there are; returns at once."""
        self.stopping = True
        for model in self:
            model.scheduler.cancel()

    def close(self, drain: bool = True) -> None:
        """Take no more requests, and close every scheduler; see `Scheduler.close`."""
        self.stopping = True
        for model in self:
            if model.shadow is not None:
                model.shadow.close()
            model.scheduler.close(drain)

    def __iter__(self) -> Iterator[Model]:
        with self._lock:
            return iter(list(self._models.values()))
