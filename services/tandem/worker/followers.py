"""All followers of a worker, as rank 0 sees them: what is sent to them, what they say, and why they are lost.

A follower that is lost takes the worker down: RankLost says which rank, and how it ended.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tandem.core.messages.plans import PlanResolved
from tandem.core.messages.worker import StartupProgress
from tandem.engine.wire import CollectiveFailed
from tandem.errors import ConfigError, TandemError
from tandem.ipc import ChannelClosed
from tandem.worker.follower_messages import Beat, FollowerFailed, FollowerReady, StartFollower
from tandem.worker.follower_process import Follower

SILENT_SECONDS = 1.5  # a follower with work says something every second
CLOSE_SECONDS = 2.0
_CAUSE_SECONDS = 0.5  # how long the first cause is looked for once something has gone wrong
_T = TypeVar("_T")


class RankLost(TandemError):
    """A rank of this worker is gone or stuck."""


class Inbox:
    """Outcomes of one follower's transfer process, with a descriptor that is readable while there are some."""

    pending_bytes = 0  # nothing is ever written to it

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._event

    def put(self, message: object) -> None:
        self._messages.append(message)
        os.eventfd_write(self._event, 1)

    def take(self) -> list[Any]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        taken, self._messages = self._messages, []
        return taken


class Followers:
    """Every method is for the thread that created it. Owns the followers."""

    def __init__(self, followers: Sequence[Follower], progress: Callable[[str], None]) -> None:
        self._followers = tuple(followers)
        self._progress = progress
        self._ready: dict[int, FollowerReady] = {}
        self._kept: list[object] = []
        self._resolved: list[tuple[int, PlanResolved]] = []
        self._outcomes: dict[int, Inbox] = {follower.rank: Inbox() for follower in self._followers}
        self._waiting = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable while there is a result
        self._epoll = selectors.EpollSelector()
        self.watch(self._waiting)
        self._interest: dict[int, int] = {}
        for follower in self._followers:
            self._watch(follower)

    def __iter__(self) -> Iterator[Follower]:
        return iter(self._followers)

    def keep(self, thing: object) -> None:
        """Hold on to something that the ranks need as long as they live."""
        self._kept.append(thing)

    def fileno(self) -> int:
        """A descriptor that is readable while somebody has said something, or more can be written."""
        return self._epoll.fileno()

    def watch(self, descriptor: int) -> None:
        """Make `fileno` readable for this one, too."""
        self._epoll.register(descriptor, selectors.EVENT_READ)

    def start(self, messages: Sequence[StartFollower]) -> None:
        for follower, message in zip(self._followers, messages, strict=True):
            self._send(follower, message)

    def send(self, message: object, rank: int | None = None) -> None:
        """Send something to all or to one, as far as channels take it now; `receive` sends the rest."""
        for follower in self._followers:
            if rank is None or rank == follower.rank:
                self._send(follower, message)

    def inbox(self, rank: int) -> Inbox:
        """What a follower's transfer process has said."""
        return self._outcomes[rank]

    def receive(self) -> list[tuple[int, PlanResolved]]:
        """Take the plans that followers have executed, in the order of each. Raises RankLost."""
        self.listen()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._waiting)
        resolved, self._resolved = self._resolved, []
        return resolved

    def listen(self) -> None:
        """Take what followers say to where it belongs. Raises RankLost."""
        for follower in self._followers:
            try:
                follower.channel.flush()
                messages = follower.channel.receive()
            except (ChannelClosed, ValueError) as error:
                follower.is_gone = True
                raise self.reason(error) from error
            self._watch(follower)
            if messages:
                follower.heard = time.monotonic()
            for message in messages:
                self._note(follower, message)

    def during(self, work: Callable[[], _T]) -> _T:
        """Do something in a thread while this one listens to followers: a loss ends the wait, not the work."""
        results: list[_T] = []
        faults: list[BaseException] = []
        ended = os.eventfd(0)

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                faults.append(error)
            os.eventfd_write(ended, 1)

        self.watch(ended)
        threading.Thread(target=run, name="start", daemon=True).start()
        while not results and not faults:
            self._epoll.select()
            self.listen()
        self._epoll.unregister(ended)
        os.close(ended)
        if faults and isinstance(faults[0], CollectiveFailed):
            raise self.reason(faults[0]) from faults[0]
        if faults:
            raise faults[0]
        return results[0]

    def wait_ready(self, seconds: float) -> dict[int, FollowerReady]:
        """Wait until all followers execute plans; return what each of them holds, by rank."""
        deadline = time.monotonic() + seconds
        while len(self._ready) < len(self._followers):
            if not self._epoll.select(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                missing = [follower.rank for follower in self._followers if follower.rank not in self._ready]
                raise RankLost(f"ranks {missing} were not ready within {seconds:g} s")
            self.listen()
        return dict(self._ready)

    def reason(self, error: BaseException) -> TandemError:
        """Find out why something went wrong: a rank that is lost makes others fail, so the first cause is sought."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        while True:
            self._gather()
            for follower in self._followers:
                failed = follower.failed
                if failed is not None and not failed.by_others:
                    message = f"rank {follower.rank}: {failed.message}"
                    return ConfigError(message) if failed.exit_code == 2 else RankLost(message)
                if follower.is_gone and failed is None:
                    return RankLost(follower.end())
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        now = time.monotonic()
        silent = [f"rank {one.rank} has said nothing for {now - one.heard:.0f} s" for one in self._silent(now)]
        others = [f"rank {one.rank}: {one.failed.message}" for one in self._followers if one.failed is not None]
        return RankLost("; ".join([*silent, *others, str(error)]))

    def close(self, *, at_once: bool = False) -> None:
        for follower in self._followers:
            follower.channel.close()
        for follower in self._followers:
            follower.close(0.0 if at_once else CLOSE_SECONDS)
        self._epoll.close()

    def _silent(self, now: float) -> list[Follower]:
        return [one for one in self._followers if not one.is_gone and now - one.heard > SILENT_SECONDS]

    def _gather(self) -> None:
        """Take what there is, without an end being an error."""
        for follower in self._followers:
            while not follower.is_gone:
                try:
                    messages = follower.channel.receive()
                except (ChannelClosed, ValueError):
                    follower.is_gone = True
                    break
                for message in messages:
                    if isinstance(message, FollowerFailed):
                        follower.failed = message
                if not messages:
                    break

    def _send(self, follower: Follower, message: object) -> None:
        try:
            follower.channel.send(message)
            follower.channel.flush()
        except ChannelClosed as error:
            follower.is_gone = True
            raise self.reason(error) from error
        self._watch(follower)

    def _note(self, follower: Follower, message: object) -> None:
        match message:
            case PlanResolved():
                self._resolved.append((follower.rank, message))
                os.eventfd_write(self._waiting, 1)
            case StartupProgress():
                self._progress(f"rank {follower.rank}: {message.message}")
            case FollowerReady():
                self._ready[follower.rank] = message
            case FollowerFailed():
                follower.failed = message
                raise self.reason(RankLost(message.message))
            case Beat():
                pass
            case _:
                self._outcomes[follower.rank].put(message)

    def _watch(self, follower: Follower) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if follower.channel.pending_bytes else 0)
        descriptor = follower.channel.fileno()
        if self._interest.get(descriptor) == wanted:
            return
        if descriptor in self._interest:
            self._epoll.modify(descriptor, wanted)
        else:
            self._epoll.register(descriptor, wanted)
        self._interest[descriptor] = wanted
