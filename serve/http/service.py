"""What the endpoints of one server share."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.requests import Request

from vtp.engines.errors import shown
from vtp.serve.http.metrics import Metrics
from vtp.serve.http.models import Models
from vtp.serve.memory import Trimmer
from vtp.serve.settings import Settings

log = logging.getLogger("vtp.serve")

_MOST_NAMES = 200  # of unknown fields that are noted: clients choose them


@dataclass
class Service:
    """The models, how requests are admitted, what is counted, and which unknown fields were noted so far."""

    models: Models
    settings: Settings
    metrics: Metrics
    trimmer: Trimmer = field(default_factory=Trimmer)
    _noted: set[str] = field(default_factory=set)

    @staticmethod
    def of(request: Request) -> Service:
        """The server that got a request."""
        service: Service = request.app.state.service
        return service

    def note_unread(self, names: Iterable[str]) -> None:
        """Log fields that no endpoint reads, each name once."""
        for name in names:
            if name not in self._noted and len(self._noted) < _MOST_NAMES:
                self._noted.add(name)
                log.warning("the field %s is not served; it is ignored (noted once)", shown(name, 60))
