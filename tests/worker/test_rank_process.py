"""The frontend's hold on a rank process: messages both ways, and every way for it to die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from typing import Any

import pytest

from tandem.core.messages.requests import Cancel
from tandem.core.messages.worker import StartupProgress
from tandem.worker.rank_process import RankProcess

SOON = 4.0  # two seconds, and two more for a machine that runs other tests
PRELUDE = """
import os, select, signal, socket, sys, time
from tandem.ipc import Channel
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


def run(script: str, *, kill: bool = False, seconds: float = 10.0) -> tuple[int, list[Any], str, float]:
    """Run a scripted rank to its end; return its code, what it said, its last words, and how long the end took."""

    async def scenario() -> tuple[int, list[Any], str, float]:
        received: list[Any] = []
        rank = await RankProcess.spawn(received.extend, command(script))
        try:
            rank.send(Cancel(1))
            async with asyncio.timeout(seconds):
                while not received:
                    await asyncio.sleep(0.01)
                began = asyncio.get_running_loop().time()
                if kill:
                    os.kill(rank.pid, signal.SIGKILL)
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
    code, _, _, seconds = run("say('x'); time.sleep(60)", kill=True)
    assert code == -signal.SIGKILL
    assert seconds < SOON


def test_a_rank_that_closes_its_pipe_and_hangs_is_ended() -> None:
    code, _, _, seconds = run("say('x'); channel.close(); time.sleep(60)")
    assert code == -signal.SIGKILL
    assert seconds < SOON


def test_garbage_ends_it() -> None:
    # after a pause: what arrives together with garbage may go with it
    code, _, _, seconds = run("say('x'); time.sleep(0.5); channel._socket.send(b'\\xff' * 100); time.sleep(60)")
    assert code == -signal.SIGKILL
    assert seconds < SOON


def test_stderr_held_open_by_a_grandchild_delays_nothing() -> None:
    code, _, _, seconds = run(
        """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(8)"])
        say("x"); os._exit(4)
        """
    )
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
        async with asyncio.timeout(5.0):
            assert await rank.exit_code == -signal.SIGKILL
        rank.send(Cancel(1))  # dropped
        await rank.close()

    asyncio.run(scenario())
