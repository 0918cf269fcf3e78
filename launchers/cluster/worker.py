"""The driver's side of a worker: its actors in a placement group of their own, started, called, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from launchers.cluster.cluster import Needs, shortage
from launchers.cluster.faults import SETUP_ATTEMPTS, StartError, WorkerLostError, fault_of, one_line, start_fault_of
from launchers.messages.messages import ActorInfo
from launchers.messages.versions import check_versions, own_versions
from launchers.schedule.terms import Stage

RESTART_PATIENCE = 90.0
"""Seconds to wait for resources once the pipeline has run: the cluster takes a while to see that a node is gone."""

RESTART_WARNING = 15.0
"""Seconds of that after which it is told what is missing."""

POLL = 2.0
"""Seconds between two looks at whether a node has come that a worker waits for."""

MEET_SECONDS = 600.0
"""For the first rank of a gang to start and to say where the others meet it."""

LOAD_SECONDS = 3600.0
"""For a worker to load its part; a first download of the checkpoint counts too."""

COLLECT_SECONDS = 60.0
"""To fetch a result that is there already."""


@dataclass(eq=False)
class Payload:
    """A result in the object store, and this process's view of it, which lasts when the node that made it is gone."""

    reference: ray.ObjectRef
    value: Any

    @classmethod
    def put(cls, value: Any) -> Payload:
        """Put a value into this node's store."""
        return cls(ray.put(value), value)

    def put_again(self) -> None:
        """Put the value into this node's store, because the reference is lost with another node."""
        self.reference = ray.put(self.value)


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


class Standing(enum.Enum):
    """How a worker is. One that waits for resources becomes ready when they come; one given up never does."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting for resources"
    GIVEN_UP = "given up"


class Worker:
    """One worker, of one actor or a gang that lives and dies together.

    It is called and stopped in one event loop. `tell(worker, life, event, value)` is called from other threads: "ready"
    with an `ActorInfo` each; "short", and when `patience` is over "unplaced", with what the cluster lacks; "lost" and
    "broken" with an error, when it died or when its start failed by itself. `life` counts starts and stops: ignore news
    of another `life` than that of now.

    `standing` and the two counters are its owner's: `deaths` in a row without any finished work, and `failed_starts` in
    a row.
    """

    def __init__(self, recipe: Recipe, tell: Callable[[Worker, int, str, Any], None], patience: float) -> None:
        self.recipe = recipe
        self.name = recipe.name
        self.patience = patience
        self.places: list[ActorInfo] = []
        self.standing = Standing.STARTING
        self.deaths = 0
        self.failed_starts = 0
        self.life = 0
        self._tell = tell
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._group: Any = None
        self._under_way: set[asyncio.Future[None]] = set()

    @property
    def is_ready(self) -> bool:
        return self.standing is Standing.READY

    @property
    def is_gang(self) -> bool:
        return len(self.recipe.actors) > 1

    def start(self) -> None:
        """Reserve, create and load in the background."""
        with self._lock:
            self.life += 1
            life = self.life
        self.standing = Standing.STARTING
        threading.Thread(target=self._start, args=(life,), name=f"start {self.name}", daemon=True).start()

    def stop(self) -> None:
        """Kill the actors and give back what was reserved. Calls under way fail with `WorkerLostError`."""
        with self._lock:  # a start under way finds that its life is over, and gives back what it gets from here on
            self.life += 1
            actors, group = self._actors, self._group
            self._actors, self._group = [], None
        self.standing = Standing.STARTING
        self.places = []
        for stopped in self._under_way:
            if not stopped.done():
                stopped.set_result(None)
        _give_back(actors, group)

    def restart(self) -> None:
        self.stop()
        self.start()

    def give_up(self) -> None:
        """Stop for good."""
        self.stop()
        self.standing = Standing.GIVEN_UP

    def call(
        self, method: str, arguments: Sequence[Any], results: int = 1, thread: str | None = None, gang: bool = False
    ) -> Awaitable[list[Payload]]:
        """Send a call to the first actor, or to all of a `gang`; returns what waits for the first actor's `results`.

        Of a `Payload` the reference is sent. Raises, now or later, `fault_of` the first error. After an error in a gang
        of several the others may wait for the rank that failed, so the gang has to be restarted.
        """
        actors = self._actors if gang else self._actors[:1]
        if not actors:
            raise WorkerLostError(f"{self.name} is not there")
        options = {"num_returns": results} | ({"concurrency_group": thread} if thread else {})
        plain = [argument.reference if isinstance(argument, Payload) else argument for argument in arguments]
        sent: list[Any] = []
        try:
            for actor in actors:
                sent.append(getattr(actor, method).options(**options).remote(*plain))
        except Exception as error:
            if not sent:
                raise
            reached = f"{method} reached {len(sent)} of {len(actors)} ranks"  # these wait for the others
            raise WorkerLostError(f"{self.name}: {reached}: {one_line(error)}") from error
        return self._answer([answer if isinstance(answer, list) else [answer] for answer in sent])

    async def _answer(self, sent: Sequence[list[ray.ObjectRef]]) -> list[Payload]:
        """The first actor's results once every actor has answered."""
        answers = asyncio.gather(*(asyncio.wrap_future(references[0].future()) for references in sent))
        answers.add_done_callback(look_at)
        stopped = asyncio.get_running_loop().create_future()
        self._under_way.add(stopped)
        try:
            await asyncio.wait((answers, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                raise WorkerLostError(f"{self.name} was stopped")
            answers.result()
            values = await asyncio.to_thread(ray.get, sent[0], timeout=COLLECT_SECONDS)
        except Exception as error:
            raise fault_of(error, in_gang=len(sent) > 1) from None
        finally:
            self._under_way.discard(stopped)
            answers.cancel()
        return [Payload(reference, value) for reference, value in zip(sent[0], values, strict=True)]

    def _start(self, life: int) -> None:
        try:
            actors = self._create(life, self._reserve(life))
            meeting = None
            if self.is_gang:
                meeting = self._get(actors[0].rendezvous.remote(), MEET_SECONDS, "say where its ranks meet")
            arguments = (meeting,) if hasattr(self.recipe.actors[0][0], "rendezvous") else ()
            places = self._get([actor.load.remote(*arguments) for actor in actors], LOAD_SECONDS, "load")
            check_versions(places, own_versions())
        except _GivenUpError:
            return
        except Exception as error:
            fault = start_fault_of(error, in_gang=self.is_gang)
            self._tell(self, life, "lost" if isinstance(fault, WorkerLostError) else "broken", fault)
            return
        self._tell(self, life, "ready", places)
        for actor in actors:
            watch = actor.watch.options(concurrency_group="watch").remote()
            watch.future().add_done_callback(functools.partial(self._died, life))

    def _get(self, references: Any, seconds: float, purpose: str) -> Any:
        try:
            return ray.get(references, timeout=seconds)
        except GetTimeoutError:
            raise StartError(f"{self.name} did not {purpose} within {seconds:g} s", SETUP_ATTEMPTS) from None

    def _died(self, life: int, future: Any) -> None:
        self._tell(self, life, "lost", fault_of(future.exception()))

    def _reserve(self, life: int) -> Any:
        """The placement group, once the cluster has room for it."""
        if self.recipe.node is not None:
            return None
        needs = self.recipe.needs
        group = placement_group([dict(bundle) for bundle in needs.bundles], strategy=needs.strategy)
        self._hold(life, group=group)
        patience = self.patience if life == 1 else max(self.patience, RESTART_PATIENCE)
        first = min(patience, RESTART_WARNING) if life > 1 else patience
        waited = group.wait(first)
        if not waited and patience > first:
            self._tell(self, life, "short", shortage(self.name, needs))
            waited = group.wait(patience - first)
        if not waited:
            self._tell(self, life, "unplaced", shortage(self.name, needs))
        while not waited:
            if self.life != life:
                raise _GivenUpError
            waited = group.wait(POLL)
        return group

    def _create(self, life: int, group: Any) -> list[Any]:
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
            actor = ray.remote(concurrency_groups=threads)(kind).options(**options).remote(*arguments)
            self._hold(life, actor=actor)
            actors.append(actor)
        return actors

    def _hold(self, life: int, *, actor: Any = None, group: Any = None) -> None:
        """Keep what this start has got for `stop`, or give it back at once when its life is over."""
        with self._lock:
            if self.life == life:
                if group is not None:
                    self._group = group
                if actor is not None:
                    self._actors.append(actor)
                return
        _give_back([] if actor is None else [actor], group)
        raise _GivenUpError


def look_at(answer: asyncio.Future[Any]) -> None:
    """Take note of an error, because asyncio warns of those that nobody looked at."""
    if not answer.cancelled():
        answer.exception()


def _give_back(actors: Sequence[Any], group: Any) -> None:
    for actor in actors:
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            ray.kill(actor)
    if group is not None:
        with contextlib.suppress(Exception):
            remove_placement_group(group)


class _GivenUpError(Exception):
    """The start is of no use any more."""
