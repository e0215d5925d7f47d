"""A decode scheduler with its prefill peers and its transfer process played by the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.core.messages.handoff import (
    Accepted,
    Announce,
    EndCode,
    FirstToken,
    OpenStream,
    RankEndpoint,
    RankPages,
    Sharding,
    StreamAccepted,
    StreamAnnounced,
    StreamClosed,
    StreamFirstToken,
)
from tandem.core.messages.requests import PrefillPeer
from tandem.core.messages.transfer import Pull, PullEnded, PullStatus, TransferReady
from tests.core.rig import Rig, of_type

ENDPOINT = RankEndpoint(transport="tcp", address="kv:1", instance_id=b"transfer")


def peer(number: int, *, attempt: int = 1, output_tokens: int = 0) -> PrefillPeer:
    return PrefillPeer(
        address=f"prefill-{number}",
        instance_id=bytes([number]) * 8,
        handoff_id=bytes([number]) * 16,
        attempt=attempt,
        output_tokens=output_tokens,
    )


class ImportRig(Rig):
    """Streams and pulls as the scheduler asked for them, in order."""

    def __init__(self, *, ready: bool = True, **changes: Any) -> None:
        super().__init__("decode", **changes)
        if ready:
            self.transfer_ready()

    def transfer_ready(self) -> list[object]:
        return self.send(TransferReady(b"mine", (), ("tcp",)))

    @property
    def streams(self) -> list[OpenStream]:
        return of_type(self.heard, OpenStream)

    @property
    def pulls(self) -> list[Pull]:
        return of_type(self.heard, Pull)

    def accept(self, stream: int, *, numerics: str = "exact", **changes: Any) -> list[object]:
        values: dict[str, Any] = {
            "handoff_token": b"token-%d" % stream,
            "endpoints": (ENDPOINT,),
            "sharding": Sharding(),
            "numerics": numerics,
            "checksum": "xxh3-64",
            "lease_seconds": 1.0,
        }
        return self.send(StreamAccepted(stream, Accepted(**{**values, **changes})))

    def announce(self, stream: int, first: int, count: int) -> list[object]:
        sums = b"".join((1000 + ordinal).to_bytes(8, "little") for ordinal in range(first, first + count))
        return self.send(StreamAnnounced(stream, Announce(first, 0, (RankPages(sums, b""),))))

    def first_token(self, stream: int, token: int, **values: Any) -> list[object]:
        return self.send(StreamFirstToken(stream, FirstToken(token_id=token, **values)))

    def close(self, stream: int, code: EndCode = EndCode.LOST) -> list[object]:
        return self.send(StreamClosed(stream, code))

    def pull_ended(
        self,
        pull: Pull,
        status: PullStatus = PullStatus.DONE,
        *,
        bad: Sequence[int] = (),
        good: Sequence[int] | None = None,
    ) -> list[object]:
        """End a pull; by default what is not bad is good, unless it failed."""
        if good is None:
            whole = status in (PullStatus.DONE, PullStatus.MISMATCH)
            good = [ordinal for ordinal in pull.ordinals if ordinal not in bad] if whole else ()
        event = PullEnded(
            ticket=pull.ticket,
            status=status,
            good_ordinals=tuple(good),
            bad_ordinals=tuple(bad),
            num_bytes=100 * len(good),
            transport="tcp",
        )
        return self.send(event)

    def receive(self, stream: int, num_pages: int, token: int, first: int = 0) -> list[object]:
        """Play a whole calm hand-off on an open stream."""
        effects = self.accept(stream)
        effects += self.announce(stream, first, num_pages - first)
        effects += self.first_token(stream, token)
        for pull in of_type(effects, Pull):
            effects += self.pull_ended(pull)
        return effects
