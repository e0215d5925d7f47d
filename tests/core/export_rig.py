"""A prefill scheduler with its decode peers and its transfer process played by the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.core.exports import Export
from tandem.core.messages.handoff import (
    EndCode,
    EndStream,
    Open,
    OpenReceived,
    RankEndpoint,
    ReleaseReason,
    ReleaseReceived,
    SendAnnounce,
    Sharding,
    StreamLost,
)
from tandem.core.messages.plans import Row
from tandem.core.messages.sampling import SamplingParams
from tandem.core.messages.transfer import Export as ExportPages
from tandem.core.messages.transfer import Exported, Revoke, Revoked, TransferReady
from tandem.core.token_ids import pack
from tests.core.rig import Rig, of_type, one, prompt_of

ENDPOINT = RankEndpoint(transport="tcp", address="kv:1", instance_id=b"transfer")


def handoff_id(number: int) -> bytes:
    return bytes([number]) * 16


class ExportRig(Rig):
    """Streams are numbered by the test. The transfer process answers at once unless `answers` is off."""

    def __init__(self, *, ready: bool = True, **changes: Any) -> None:
        super().__init__("prefill", **changes)
        self.answers = True
        if ready:
            self.transfer_ready()

    def send(self, event: object) -> list[object]:
        return self._answered(super().send(event))

    def plan(self) -> tuple[Row, ...]:
        before = len(self.heard)
        rows = super().plan()
        self._answered(self.heard[before:])
        return rows

    def _answered(self, effects: list[object]) -> list[object]:
        for effect in list(effects):
            if self.answers and isinstance(effect, ExportPages):
                effects += self.exported(effect)
            elif self.answers and isinstance(effect, Revoke):
                effects += self.send(Revoked(effect.handoff_id))
        return effects

    def transfer_ready(self, *endpoints: RankEndpoint) -> list[object]:
        return self.send(TransferReady(b"mine", endpoints or (ENDPOINT,), ()))

    def exported(self, command: ExportPages) -> list[object]:
        count = len(command.pages)
        sums = b"".join((1000 + command.first_ordinal + index).to_bytes(8, "little") for index in range(count))
        return self.send(Exported(command.handoff_id, command.attempt, command.first_ordinal, sums))

    def open(
        self,
        stream: int,
        number: int,
        tokens: int | Sequence[int] = 10,
        *,
        attempt: int = 1,
        held: int = 0,
        outputs: int = 0,
        importer: bytes = b"decode",
        max_tokens: int = 4,
        **changes: Any,
    ) -> list[object]:
        """Open a stream for hand-off `number`; a prompt given by its length has tokens of its own."""
        prompt = prompt_of(tokens, 100 * number) if isinstance(tokens, int) else tokens
        values: dict[str, Any] = {
            "handoff_id": handoff_id(number),
            "attempt": attempt,
            "importer_instance_id": importer,
            "prompt_token_ids": pack(prompt),
            "output_tokens": outputs,
            "sampling": SamplingParams(max_tokens=max_tokens),
            "tokens_held": held,
            "fingerprint": "model",
            "numerics": "exact",
            "sharding": Sharding(),
            "transports": ("tcp",),
            "checksums": ("xxh3-64",),
        }
        return self.send(OpenReceived(stream, Open(**{**values, **changes})))

    def release(self, stream: int, reason: ReleaseReason = ReleaseReason.DONE) -> list[object]:
        return self.send(ReleaseReceived(stream, reason))

    def lose(self, stream: int) -> list[object]:
        return self.send(StreamLost(stream))

    def compute(self) -> list[object]:
        """Run the device until nothing is left to compute. A plan that took a lease is followed by another."""
        before = len(self.heard)
        while self.plan() or self.plan():
            self.resolve()
        return self.heard[before:]

    def export(self, number: int) -> Export:
        exporter = self.scheduler._exporter
        assert exporter is not None
        return exporter._book.live[handoff_id(number)]

    def is_live(self, number: int) -> bool:
        exporter = self.scheduler._exporter
        assert exporter is not None
        return handoff_id(number) in exporter._book.live

    @property
    def num_pinned(self) -> int:
        """References that hand-offs hold."""
        exporter = self.scheduler._exporter
        assert exporter is not None
        return len(exporter.pinned_pages())


def end_codes(effects: Sequence[object]) -> list[tuple[int, EndCode]]:
    return [(end.stream_id, end.code) for end in of_type(effects, EndStream)]


def refusal(effects: Sequence[object]) -> EndCode:
    return one(effects, EndStream).code


def announced(effects: list[object]) -> list[tuple[int, int, int]]:
    """(first ordinal, pages, tokens ready) of each announcement."""
    found = [effect.announce for effect in of_type(effects, SendAnnounce)]
    return [(one.first_ordinal, len(one.ranks[0].checksums) // 8, one.tokens_ready) for one in found]
