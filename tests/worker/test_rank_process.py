"""The frontend's hold on a rank process: messages both ways, and every way for it to die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from tandem.core.messages.requests import Cancel
from tandem.core.messages.worker import StartupProgress
from tandem.worker.rank_process import RankProcess

SOON = 12.0  # two seconds, and more for a machine that runs other tests; the wrong way takes 60
PRELUDE = """
import os, select, signal, socket, sys, time
from tandem.ipc import Channel
from tandem.core.messages.requests import Cancel
from tandem.core.messages.worker import StartupProgress
from tandem.worker.messages import TO_FRONTEND, TO_RANK
channel = Channel(socket.socket(fileno=int(sys.argv[1])), TO_FRONTEND, TO_RANK)
def say(text):
    channel.send(StartupProgress(text)); channel.flush()
def hear():
    select.select([channel], [], []); return channel.receive()
"""


def command(script: str) -> list[str]:
    return [sys.executable, "-c", PRELUDE + textwrap.dedent(script)]


def nothing(rank: RankProcess) -> None: ...


def run(script: str, then: Callable[[RankProcess], None] = nothing) -> tuple[int, list[Any], str, float]:
    """Run a scripted rank to its end; return its code, what it said, its last words, and how long the end took.

    `then` is called once it has said something.
    """

    async def scenario() -> tuple[int, list[Any], str, float]:
        received: list[Any] = []
        rank = await RankProcess.spawn(received.extend, command(script))
        try:
            rank.send(Cancel(1))
            async with asyncio.timeout(25.0):
                while not received:
                    await asyncio.sleep(0.01)
                began = asyncio.get_running_loop().time()
                then(rank)
                code = await rank.exit_code
            return code, received, rank.last_words(), asyncio.get_running_loop().time() - began
        finally:
            await rank.close()

    return asyncio.run(scenario())


def test_messages_pass_both_ways_and_all_that_was_said_arrives() -> None:
    code, received, _, _ = run(
        """
        say(str(hear()))
        for number in range(20000): channel.send(StartupProgress(str(number)))
        while channel.pending_bytes:
            select.select([], [channel], []); channel.flush()
        sys.exit(3)
        """
    )
    assert code == 3
    assert "Cancel(request_id=1" in received[0].message
    assert received[1:] == [StartupProgress(str(number)) for number in range(20000)]


def test_the_end_of_stderr_is_kept() -> None:
    code, _, last_words, _ = run(
        """
        say("x")
        for number in range(1000): print("line", number, file=sys.stderr)
        print("y" * 200000, file=sys.stderr)
        raise RuntimeError("this is why")
        """
    )
    assert code == 1
    assert last_words.endswith("RuntimeError: this is why")
    assert len(last_words) < 2_000_000 and "line 1\n" not in last_words


def test_a_kill_is_noticed_at_once() -> None:
    code, _, _, seconds = run("say('x'); time.sleep(60)", lambda rank: os.kill(rank.pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    assert seconds < SOON


def test_a_rank_that_closes_its_pipe_and_hangs_is_ended() -> None:
    code, _, _, seconds = run("say('x'); channel.close(); time.sleep(60)")
    assert code == -signal.SIGKILL
    assert seconds < SOON


def test_garbage_ends_it() -> None:
    # once 'x' has been heard: what arrives together with garbage may go with it
    code, _, _, seconds = run(
        """
        say("x")
        while Cancel(2) not in hear(): pass
        channel._socket.send(b"\\xff" * 100); time.sleep(60)
        """,
        lambda rank: rank.send(Cancel(2)),
    )
    assert code == -signal.SIGKILL
    assert seconds < SOON


def test_stderr_held_open_by_a_grandchild_delays_nothing() -> None:
    code, received, _, seconds = run(
        """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        say(str(child.pid)); os._exit(4)
        """
    )
    os.kill(int(received[0].message), signal.SIGKILL)
    assert code == 4
    assert seconds < SOON


def test_a_rank_that_reads_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.worker.rank_process.MAX_PENDING_BYTES", 1 << 20)

    async def scenario() -> None:
        received: list[Any] = []
        rank = await RankProcess.spawn(received.extend, command("say('x'); time.sleep(60)"))
        for _ in range(200_000):
            rank.send(Cancel(1))
            if rank.exit_code.done():
                break
        async with asyncio.timeout(25.0):
            assert await rank.exit_code == -signal.SIGKILL
        rank.send(Cancel(1))  # dropped
        await rank.close()

    asyncio.run(scenario())
