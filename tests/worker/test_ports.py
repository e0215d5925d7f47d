"""Ports with a transfer process: its outcomes are events, its death is one, and the loop starts it again."""

from __future__ import annotations

import select
import threading
import time
from typing import Any

from tandem.core.messages.handoff import (
    EndCode,
    EndStream,
    OpenReceived,
    ReleaseReason,
    ReleaseReceived,
    SendAccepted,
    SendAnnounce,
    SendComplete,
    SendFirstToken,
)
from tandem.core.messages.transfer import Exported, RankExport, Revoke, Revoked, TransferReady
from tandem.core.token_ids import pack
from tandem.ipc import ChannelClosed
from tandem.worker.transfer_link import TransferLink
from tests.fakes.device import CountingDevice
from tests.worker.rank_bench import VOCAB_SIZE, RankBench, running_rank
from tests.worker.streams import an_accepted, an_open
from tests.worker.test_transfer_link import Child


class ExportingChild(Child):
    """A transfer process of a prefill rank that exports whatever it is told to, until `die`."""

    def __init__(self) -> None:
        super().__init__()
        self.dying = False
        self.exports: list[RankExport] = []
        self.revokes: list[Revoke] = []
        self.say(TransferReady(b"i" * 16, an_accepted().endpoints, ("tcp",)))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def die(self) -> None:
        self.dying = True
        self.thread.join(5.0)
        self.voice.close()

    def _serve(self) -> None:
        while not self.dying:
            try:
                for command in self.voice.receive() if select.select([self.voice], [], [], 0.02)[0] else []:
                    self._answer(command)
            except (ChannelClosed, ValueError, OSError):
                return

    def _answer(self, command: Any) -> None:
        match command:
            case RankExport():
                self.exports.append(command)
                checksums = bytes(8 * len(command.pages))
                self.say(Exported(command.handoff_id, command.attempt, command.first_ordinal, checksums))
            case Revoke():
                self.revokes.append(command)
                self.say(Revoked(command.handoff_id))


def open_one(rank: RankBench, stream_id: int) -> None:
    opened = an_open(handoff_id=bytes([stream_id]) * 16, fingerprint="", prompt_token_ids=pack(range(1, 10)))
    rank.send(OpenReceived(stream_id, opened))


def messages_of(rank: RankBench, stream_id: int) -> list[type]:
    return [type(message) for message in rank.received if getattr(message, "stream_id", None) == stream_id]


def test_a_hand_off_passes_and_a_death_of_the_transfer_process_is_survived() -> None:
    lives: list[ExportingChild] = []

    def spawn() -> Child:
        lives.append(ExportingChild())
        return lives[-1]

    def make_link(device: CountingDevice) -> TransferLink:
        return TransferLink(spawn, time.monotonic, device.adopt)

    with running_rank(role="prefill", link=make_link, device=CountingDevice(VOCAB_SIZE)) as rank:
        while not lives:
            time.sleep(0.01)
        open_one(rank, 1)
        rank.read_until(lambda: bool(rank.of(SendComplete)) and bool(rank.of(SendAnnounce)))
        assert set(messages_of(rank, 1)) == {SendAccepted, SendAnnounce, SendFirstToken, SendComplete}
        assert rank.of(SendFirstToken)[0].first_token.token_id == 10
        assert sum(len(export.pages) for export in lives[0].exports) == 3
        rank.send(ReleaseReceived(1, ReleaseReason.DONE))
        rank.read_until(lambda: bool(rank.of(EndStream)))
        assert rank.of(EndStream)[0].code is EndCode.OK

        open_one(rank, 2)
        rank.read_until(lambda: len(rank.of(SendComplete)) == 2)
        lives[0].die()
        rank.read_until(lambda: EndStream in messages_of(rank, 2))
        assert rank.of(EndStream)[-1].code is EndCode.LOST
        deadline = time.monotonic() + 5.0
        while len(lives) < 2:  # nothing wakes the loop but its own timer
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05)
        open_one(rank, 3)
        rank.read_until(lambda: len(rank.of(SendComplete)) == 3)
        rank.send(ReleaseReceived(3, ReleaseReason.DONE))
        rank.read_until(lambda: EndStream in messages_of(rank, 3))
        assert lives[0].stopped
