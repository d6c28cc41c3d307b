"""A replica: one bundle in a process of its own, which answers as a whole server would."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import Message

from vtp.engines import VtpError
from vtp.engines.versions import installed_version
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.scheduler import Scheduler
from vtp.serve.http.app import make_app
from vtp.serve.http.models import Models
from vtp.serve.scale.call import Call, answered
from vtp.serve.settings import Settings
from vtp.serve.slo import Slo

CARDS = "/v1/models"


@dataclass(frozen=True)
class Plan:
    """What the replicas of one bundle serve; made on the machine of vtp-serve, read on theirs.

    name      the model's
    bundle    an absolute path that every machine has
    seal      sha256 of the bundle's manifest, so that nobody serves another one
    version   of vtp-edge, which must be the same everywhere
    options   keyword arguments of `Scheduler.load`
    settings  how requests are answered; who is let in was decided before
    slo_ms, min_keep  see `Slo`; None: no aim
    """

    name: str
    bundle: str
    seal: str
    options: Mapping[str, Any]
    settings: Settings = field(default_factory=Settings)
    slo_ms: float | None = None
    min_keep: int = 1
    version: str = field(default_factory=lambda: _version())

    @classmethod
    def of(cls, name: str, bundle: str, **more: Any) -> Plan:
        """For a bundle that lies here."""
        folder = Path(bundle).resolve()
        return cls(name, str(folder), _sha256(folder / MANIFEST), **more)

    def check(self) -> None:
        """VtpError where this machine has not what is to be served."""
        host, manifest = socket.gethostname(), Path(self.bundle) / MANIFEST
        if _version() != self.version:
            raise VtpError(
                f"{host} has vtp-edge {_version()}, and vtp-serve {self.version}; install the same on both"
            )
        if not manifest.is_file():
            raise VtpError(f"{host} does not see {self.bundle}; bundles belong on a disk that all share")
        if _sha256(manifest) != self.seal:
            raise VtpError(
                f"{host} has another bundle at {self.bundle}; bundles belong on a disk that all share"
            )


class Replica:
    """What runs in a replica's process. Made by Ray Serve; needs nothing of it."""

    def __init__(self, plan: Plan) -> None:
        """Open the bundle. Raises VtpError."""
        plan.check()
        scheduler = Scheduler.load(plan.bundle, **plan.options)
        slo = None if plan.slo_ms is None else Slo.of(scheduler, plan.slo_ms, plan.min_keep)
        self._models = Models(names=[plan.name])
        self._models.add(plan.name, scheduler, slo)
        self._models.loaded()
        self._app = make_app(self._models, plan.settings)

    async def answer(self, call: Call, body: bytes) -> AsyncIterator[list[Message]]:
        """The messages of the answer; first none, at once: the request has arrived."""
        yield []
        async with aclosing(answered(self._app, call, body)) as messages:
            async for some in messages:
                yield some

    async def get(self, path: str) -> bytes:
        """The body of a GET request's answer."""
        messages = [one async for some in answered(self._app, Call("GET", path), b"") for one in some]
        return b"".join(one.get("body", b"") for one in messages)

    async def metrics(self) -> tuple[str, str]:
        """Whose they are (a machine and a process), and its metrics."""
        return f"{socket.gethostname()}-{os.getpid()}", (await self.get("/metrics")).decode()

    async def describe(self) -> dict[str, Any]:
        """What is said of the model when it is ready: its card, and what its scheduler can do."""
        (model,) = self._models
        return {
            "card": model.card(),
            "slots": model.scheduler.slots,
            "in_turn": model.scheduler.in_turn,
        }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version() -> str:
    return installed_version("vtp-edge", "(sources)")
