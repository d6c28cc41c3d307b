"""Replicas on a Ray cluster, or on a local one made for the server (the optional extra `ray`).

Ray Serve starts them, starts those again that die, and chooses for each request the less busy of two. It is
reached through its handles only: its own HTTP door stays shut.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.types import Message

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.engines.versions import version_numbers
from vtp.runtime.machine.ray_cluster import LOCAL, check_reachable, connect, set_ray_environment
from vtp.serve.http.errors import GONE, ApiError
from vtp.serve.scale.call import Call
from vtp.serve.scale.replica import Plan, Replica

_OLDEST = (2, 60)  # asks for a token, and can ask all replicas at once
_POLL = 0.2
_NOTICE = 60.0  # seconds after which the log says that replicas are still waited for
_SAY = 60.0  # seconds for a replica to say what it serves
_ALL = 5.0  # seconds for all replicas to say something
_STORE = 512 << 20  # bytes of a local cluster's memory for what is on its way
_LEAVE = 5.0  # seconds for a replica to end by itself
_QUIET = {"log_level": "CRITICAL", "enable_access_log": False}  # what matters is in the status, and told

log = logging.getLogger("vtp.serve")


class Errors(NamedTuple):
    """Ray's, which exist only where it is installed: of a call that we cancelled, of what it raised, all."""

    cancelled: tuple[type[Exception], ...]
    raised: tuple[type[Exception], ...]
    any: tuple[type[Exception], ...]


class Reply:
    """An answer on its way."""

    def __init__(self, stream: Any, errors: Errors) -> None:
        self._stream, self._errors = stream, errors

    async def next(self) -> list[Message] | None:
        """The next messages; None: it is over. ApiError 503 if the replica has ended; what it raised."""
        try:
            messages: list[Message] = await self._stream.__anext__()
            return messages
        except StopAsyncIteration:
            return None
        except self._errors.cancelled as error:
            raise ApiError("the request was cancelled", GONE) from error
        except self._errors.raised:  # a bug within
            raise
        except self._errors.any as error:
            log.warning("a replica was lost: %s", shown(error, 200))
            raise lost() from error

    async def cancel(self) -> None:
        """Nobody reads on: the replica ends the request."""
        await asyncio.to_thread(self._stream.cancel)


def lost() -> ApiError:
    """What a client is told whose replica died."""
    return ApiError(
        "the process that answered this request has ended; send it again", 503, headers={"Retry-After": "1"}
    )


class Cluster:
    """Replicas of bundles on the Ray cluster at `address`: HOST:PORT of its head, "auto", or "local".

    plans     what they serve
    replicas  of each
    gpus      that each of them needs
    """

    def __init__(self, address: str, plans: Sequence[Plan], replicas: int, gpus: int = 0) -> None:
        """Raises UsageError where Ray is missing or the address is not one, VtpError if nobody answers."""
        set_ray_environment(address)
        self._ray, self._serve = _import()
        self.replicas = replicas
        self._address, self._gpus = address, gpus
        self._plans = {plan.name: plan for plan in plans}
        self._handles: dict[str, Any] = {}
        self._apps: dict[str, str] = {}  # model -> Ray Serve's application
        self._started = False  # Ray Serve was not there before
        check_reachable(address)
        of_ray, of_serve = self._ray.exceptions, self._serve.exceptions
        self._errors = Errors(
            (of_ray.TaskCancelledError, of_serve.RequestCancelledError),
            (of_ray.RayTaskError,),
            (of_ray.RayError, of_serve.RayServeException),
        )

    def connect(self) -> None:
        """Reach the cluster, or make a local one, whose processes end with the thread that calls this.

        Raises VtpError, in one line.
        """
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        own: dict[str, Any] = {}
        if self._address == LOCAL:
            cores = self._count * (self._threads or 1)
            own = {"num_cpus": cores, "object_store_memory": _STORE}
        connect(self._ray.init, self._ray.shutdown, self._address, **own)

    def start(self, label: str, given_up: Callable[[], bool]) -> None:
        """Start every replica and wait until all are ready, or until `given_up`.

        label  tells this server's replicas from those of others on the cluster

        Raises VtpError, in one line, for bundles that cannot be served there.
        """
        plans = self._fitted()
        if given_up():
            return
        targets = []
        for number, plan in enumerate(plans):
            self._apps[plan.name] = f"{label}-{number}"
            targets.append(
                self._serve.RunTarget(self._bound(plan), name=self._apps[plan.name], route_prefix=None)
            )
        self._started = not self._is_serving()
        self._serve.start(proxy_location="Disabled", logging_config=_QUIET)
        handles = self._serve.run_many(targets, wait_for_applications_running=False)
        self._wait(given_up)
        self._handles = dict(zip(self._apps, handles, strict=True))

    def ask(self, name: str, call: Call, body: bytes) -> Reply:
        """Hand a request to a replica of a model."""
        stream = self._handles[name].answer.options(stream=True).remote(call, body)
        return Reply(stream, self._errors)

    def describe(self, name: str) -> dict[str, Any]:
        """What a replica of a model says of it."""
        said: dict[str, Any] = self._handles[name].describe.remote().result(timeout_s=_SAY)
        return said

    def get(self, name: str, path: str) -> bytes:
        """The body of a model's answer to a GET request."""
        body: bytes = self._handles[name].get.remote(path).result(timeout_s=_SAY)
        return body

    async def texts(self) -> dict[str, dict[str, str]]:
        """Of each model: replica -> its metrics, from all that answer."""
        found = await asyncio.gather(*map(self._texts_of, self._plans))
        return dict(zip(self._plans, found, strict=True))

    def running(self) -> dict[str, int]:
        """How many replicas of each model run."""
        known = self._serve.status().applications
        return {name: _running(known.get(app)) for name, app in self._apps.items()}

    def close(self) -> None:
        """End the replicas, and a local cluster with them."""
        if not self._ray.is_initialized():
            return
        try:
            if self._address != LOCAL:
                self._leave()
        except Exception as error:  # the cluster may be gone
            log.warning("the replicas on Ray's cluster could not be ended: %s", shown(error, 200))
        self._handles = {}
        self._ray.shutdown()

    async def _texts_of(self, name: str) -> dict[str, str]:
        if name not in self._handles:
            return {}
        asked = self._handles[name].broadcast("metrics")
        try:
            found = await asked.results_async(timeout_s=_ALL, return_exceptions=True)
        except TimeoutError:
            return {}
        return dict(one for one in found if isinstance(one, tuple))

    @property
    def _count(self) -> int:
        return self.replicas * len(self._plans)

    @property
    def _threads(self) -> int | None:
        """Of one replica, as asked for; on one machine, its cores are shared out."""
        asked: int | None = next(iter(self._plans.values())).options.get("threads")
        if asked is None and self._address == LOCAL and not self._gpus:
            return max(1, (os.cpu_count() or 1) // self._count)
        return asked

    def _fitted(self) -> list[Plan]:
        """The plans with as many threads as the machines have cores for. UsageError if there is no room."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cores = [int(node.get("CPU", 0)) for node in nodes]
        threads = self._threads or fitting(cores, self._count)
        if not threads or sum(have // threads for have in cores) < self._count:
            raise UsageError(
                f"{self._count} replicas of {threads or 1} threads do not fit on the cores of Ray's cluster "
                f"({', '.join(map(str, cores))}); choose fewer --replicas or --threads"
            )
        if self._gpus * self._count > (have := sum(int(node.get("GPU", 0)) for node in nodes)):
            raise UsageError(
                f"{self._count} replicas need a GPU each, and Ray's cluster has {have}; choose fewer "
                "--replicas"
            )
        return [replace(plan, options={**plan.options, "threads": threads}) for plan in self._plans.values()]

    def _bound(self, plan: Plan) -> Any:
        """A bundle's deployment. A replica refuses what it has no place for itself, as without Ray."""
        places = plan.options["slots"] + plan.options["queue"]
        made = self._serve.deployment(
            Replica,
            name="replica",
            num_replicas=self.replicas,
            ray_actor_options={"num_cpus": plan.options["threads"], "num_gpus": self._gpus},
            max_ongoing_requests=2 * places + 16,
            health_check_period_s=2,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=_LEAVE,
            max_constructor_retry_count=1,
            logging_config=_QUIET,
        )
        return made.bind(plan)

    def _wait(self, given_up: Callable[[], bool]) -> None:
        since, told = time.monotonic(), False
        while not given_up():
            known = self._serve.status().applications
            states = {name: known.get(app) for name, app in self._apps.items()}
            for name, state in states.items():
                if state is not None and state.status == "DEPLOY_FAILED":
                    raise VtpError(f"{name}: {_reason(state)}")
            # Those of an earlier vtp-serve may run, too: it is over when they were replaced.
            if all(state is not None and state.status == "RUNNING" for state in states.values()):
                return
            if not told and time.monotonic() - since > _NOTICE:
                told = True
                log.warning("replicas are still starting: Ray's machines may be busy (ray status)")
            time.sleep(_POLL)

    def _is_serving(self) -> bool:
        try:
            self._ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        except ValueError:
            return False
        return True

    def _leave(self) -> None:
        """End what was started on a cluster of others, and nothing else."""
        for app in self._apps.values():
            self._serve.delete(app)
        if self._started and not self._serve.status().applications:
            self._serve.shutdown()


def fitting(cores: Sequence[int], count: int) -> int:
    """The most threads that `count` replicas can have each, on machines with these cores; 0: no room."""
    counts = range(max(cores, default=0), 0, -1)
    return next((some for some in counts if sum(have // some for have in cores) >= count), 0)


def _import() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise UsageError("--ray needs Ray Serve: pip install 'vtp-edge[ray]'") from error
    if version_numbers(ray.__version__)[:2] < _OLDEST:
        raise UsageError(f"--ray needs Ray 2.60 or later, and {ray.__version__} is installed: update it")
    return ray, serve


def _running(state: Any) -> int:
    """Replicas of an application that run, by its status."""
    if state is None:
        return 0
    return sum(one.replica_states.get("RUNNING", 0) for one in state.deployments.values())


def _reason(state: Any) -> str:
    """One line about replicas that do not start: our own, where they said why."""
    text = "\n".join([state.message, *(one.message for one in state.deployments.values())])
    ours = re.findall(r"vtp\.engines\.errors\.\w+: (.+)", text)
    if ours:
        return str(ours[-1]).strip()
    missing = re.search(r"No module named '[\w.]+'", text)
    if missing:
        return (
            f"Ray's workers lack a package ({missing[0]}): pip install 'vtp-edge[ort,serve,ray]' everywhere"
        )
    return f"no replica starts: {shown(' '.join(text.split()), 300)}"
