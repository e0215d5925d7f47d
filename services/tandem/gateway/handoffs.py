"""The hand-offs of one answer: which ids it has at which prefill workers, and how the next dispatch names them.

A hand-off whose decode worker went may be leased: naming its id again, with a higher attempt, lets another decode
worker pull the same pages. Whether it is cannot be known here, so a new id at the same worker is named after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tandem.core.messages.requests import PrefillPeer
from tandem.rpc.convert import ID_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Handoff:
    handoff_id: bytes
    attempt: int
    output_tokens: int  # outputs that its first Open carried, and every later one has to carry


class Handoffs:
    """Ids by prefill worker's life. `random_bytes` is the source of new ones."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._by_instance: dict[bytes, list[_Handoff]] = {}

    @property
    def instance_ids(self) -> tuple[bytes, ...]:
        """Workers that were named before, in the order of preference of then."""
        return tuple(self._by_instance)

    def name(self, address: str, instance_id: bytes, num_outputs: int, *, takes_new: bool) -> list[PrefillPeer]:
        """Return what to name for a prefill worker, best first, for an answer that has `num_outputs` tokens.

        Known ids come first, with a higher attempt, while they can be of use: the second token of a hand-off comes
        after its release. A new id follows, unless the worker takes no new work.
        """
        handoffs = [
            replace(known, attempt=known.attempt + 1)
            for known in self._by_instance.get(instance_id, ())
            if num_outputs <= known.output_tokens + 1
        ]
        if takes_new:
            handoffs.append(_Handoff(handoff_id=self._random_bytes(ID_BYTES), attempt=1, output_tokens=num_outputs))
        self._by_instance[instance_id] = handoffs
        return [
            PrefillPeer(
                address=address,
                instance_id=instance_id,
                handoff_id=handoff.handoff_id,
                attempt=handoff.attempt,
                output_tokens=handoff.output_tokens,
            )
            for handoff in handoffs
        ]
