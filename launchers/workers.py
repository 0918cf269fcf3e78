"""The driver's side of a worker: its actors in a placement group of their own, started, called, and started again."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from helios_cp.distributed import is_lost_connection
from launchers.cluster import Needs, shortage
from launchers.messages import Place
from launchers.schedule import Stage

RESTART_PATIENCE = 90.0
"""Seconds to wait for resources once the pipeline has run: the cluster takes a while to see that a node is gone."""

POLL = 2.0
"""Seconds between two looks at whether a node has come that a worker waits for."""


class PayloadLostError(Exception):
    """What was sent went down with its node; the worker itself is well."""


class WorkerLostError(Exception):
    """The worker died, or cannot be reached."""


def fault_of(error: BaseException) -> BaseException:
    """What went wrong in a call: `PayloadLostError`, `WorkerLostError`, or the error that the work itself raised."""
    cause = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, ObjectLostError | GetTimeoutError):
        return PayloadLostError(str(cause))
    if isinstance(cause, RayError) or is_lost_connection(cause):
        return WorkerLostError(str(cause))
    return cause


@dataclass(frozen=True)
class Payload:
    """A result in the object store, and this process's view of it, which lasts when the node that made it is gone."""

    reference: ray.ObjectRef
    value: Any

    def again(self) -> Payload:
        """The same, put into this node's store."""
        return Payload(ray.put(self.value), self.value)


@dataclass(frozen=True)
class Recipe:
    """How a worker is made.

    `actors`: class, arguments and index of the bundle of each; the first answers for all. `capacity`: see `Schedule`.
    `node`: the only node it may run on, in place of a placement group. `threads`: concurrency groups of its actors,
    beside that of `Watched.watch`.
    """

    name: str
    actors: tuple[tuple[type, tuple, int], ...]
    needs: Needs
    capacity: Mapping[Stage, int]
    node: str | None = None
    threads: Mapping[str, int] = field(default_factory=dict)


class Worker:
    """One worker, of one actor or a gang that lives and dies together.

    `tell(worker, life, event, value)` is called from threads of its own: "ready" with the `Place`s, "unplaced" with
    what is missing, "lost" and "broken" with an error, when it died or when its start failed by itself. `life` counts
    the starts; news of an earlier one than the `life` of now are of no use.
    """

    def __init__(self, recipe: Recipe, tell: Callable[[Worker, int, str, Any], None], patience: float) -> None:
        self.recipe = recipe
        self.name = recipe.name
        self.patience = patience
        self.places: list[Place] = []
        self.is_ready = False
        self.deaths = 0
        self.life = 0
        self._tell = tell
        self._actors: list[Any] = []
        self._group: Any = None

    def start(self) -> None:
        """Reserve, create and load in the background."""
        self.life += 1
        threading.Thread(target=self._start, args=(self.life,), name=f"start {self.name}", daemon=True).start()

    def stop(self) -> None:
        """Kill the actors and give back what was reserved. Calls under way fail."""
        self.life += 1
        self.is_ready = False
        self.places = []
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                remove_placement_group(self._group)
        self._actors, self._group = [], None

    def restart(self) -> None:
        self.stop()
        self.start()

    def call(
        self,
        method: str,
        arguments: Sequence[Any],
        answered: Callable[[list[Payload] | BaseException], None],
        results: int = 1,
        thread: str | None = None,
        gang: bool = False,
    ) -> None:
        """Call `method` on the first actor, or on all of a `gang`; `answered` is called once, from another thread.

        It gets the first actor's `results` when all have answered, or `fault_of` the first error. An error in a gang of
        several kills it, for the others wait for the one that failed.
        """
        actors = self._actors if gang else self._actors[:1]
        options = {"num_returns": results} | ({"concurrency_group": thread} if thread else {})
        _Call(self, len(actors), answered).send(
            [getattr(actor, method).options(**options) for actor in actors], arguments
        )

    def _start(self, life: int) -> None:
        try:
            group = self._reserve(life)
            actors = self._create(group)
            if self.life != life:
                for actor in actors:
                    ray.kill(actor)
                return
            self._actors = actors
            meeting = ray.get(actors[0].rendezvous.remote()) if len(actors) > 1 else None
            arguments = () if not hasattr(self.recipe.actors[0][0], "rendezvous") else (meeting,)
            self.places = ray.get([actor.load.remote(*arguments) for actor in actors])
        except _GivenUpError:
            return
        except Exception as error:
            if self.life == life:
                fault = fault_of(error)
                is_lost = isinstance(fault, WorkerLostError | PayloadLostError)
                self._tell(self, life, "lost" if is_lost else "broken", fault)
            return
        if self.life == life:
            self._tell(self, life, "ready", self.places)
            for actor in actors:
                watch = actor.watch.options(concurrency_group="watch").remote()
                watch.future().add_done_callback(functools.partial(self._died, life))

    def _died(self, life: int, future: Any) -> None:
        self._tell(self, life, "lost", fault_of(future.exception()))

    def _reserve(self, life: int) -> Any:
        if self.recipe.node is not None:
            return None
        needs = self.recipe.needs
        group = placement_group([dict(bundle) for bundle in needs.bundles], strategy=needs.strategy)
        self._group = group
        waited = group.wait(self.patience if life == 1 else max(self.patience, RESTART_PATIENCE))
        if not waited and self.life == life:
            self._tell(self, life, "unplaced", shortage(self.name, needs))
        while not waited:
            if self.life != life:
                remove_placement_group(group)
                raise _GivenUpError
            waited = group.wait(POLL)
        return group

    def _create(self, group: Any) -> list[Any]:
        actors = []
        for kind, arguments, bundle in self.recipe.actors:
            resources = self.recipe.needs.bundles[bundle]
            share = sum(index == bundle for _, _, index in self.recipe.actors)
            options: dict[str, Any] = {
                "num_cpus": resources.get("CPU", 0) / share,
                "num_gpus": resources.get("GPU", 0) / share,
                "max_restarts": 0,
            }
            if self.recipe.node is not None:
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.recipe.node, soft=False)
            else:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, bundle)
            threads = {"watch": 1, **self.recipe.threads}
            actors.append(ray.remote(concurrency_groups=threads)(kind).options(**options).remote(*arguments))
        return actors


class _GivenUpError(Exception):
    """The start is of no use any more."""


class _Call:
    """Collects the answers of a gang."""

    def __init__(self, worker: Worker, size: int, answered: Callable[[list[Payload] | BaseException], None]) -> None:
        self.worker = worker
        self.size = size
        self.answered = answered
        self._lock = threading.Lock()
        self._left = size
        self._first: list[ray.ObjectRef] = []

    def send(self, methods: Sequence[Any], arguments: Sequence[Any]) -> None:
        sent = [method.remote(*arguments) for method in methods]
        answers = [answer if isinstance(answer, list) else [answer] for answer in sent]
        self._first = answers[0]
        for references in answers:
            references[0].future().add_done_callback(self._one)

    def _one(self, future: Any) -> None:
        error = future.exception()
        with self._lock:
            if self._left <= 0:
                return
            self._left = self._left - 1 if error is None else 0
            if self._left:
                return
        if error is not None:
            self.answered(fault_of(error))
            return
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        try:
            values = ray.get(self._first, timeout=60)
        except Exception as error:
            self.answered(WorkerLostError(str(error)))
        else:
            pairs = zip(self._first, values, strict=True)
            self.answered([Payload(reference, value) for reference, value in pairs])
