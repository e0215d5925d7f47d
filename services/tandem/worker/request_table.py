"""Which request of the rank belongs to which stream of a gateway, and what of its output waits there.

The rank knows requests by a number that is unique in the worker's life; a session knows them by its own `rid`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.core.messages.requests import Cancel, CancelCause, Ended, Submit, Tokens
from tandem.rpc import convert
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.worker.frames import Frames


@dataclass(eq=False, slots=True)
class GatewaySession:
    """One stream of one gateway, and its live requests: rid -> request id."""

    frames: Frames = field(default_factory=Frames)
    request_ids: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Sequence:
    session: GatewaySession
    rid: int
    interval: int  # tokens of one delta
    held: worker_pb2.SequenceDelta | None = None
    begun: bool = False


class RequestTable:
    """Every live request of the worker. `send` takes messages for the rank."""

    def __init__(self, send: Callable[[object], None], worker_name: str) -> None:
        self._send = send
        self._worker_name = worker_name
        self._sequences: dict[int, _Sequence] = {}
        self._dirty: set[GatewaySession] = set()
        self._next_request_id = 1

    def __len__(self) -> int:
        return len(self._sequences)

    def next_request_id(self) -> int:
        """Return a number that no request of this worker has had."""
        self._next_request_id += 1
        return self._next_request_id - 1

    def submit(self, session: GatewaySession, rid: int, submit: Submit, interval: int) -> None:
        """Pass a request on to the rank; its output goes to `session` from now on."""
        assert rid not in session.request_ids
        session.request_ids[rid] = submit.request_id
        self._sequences[submit.request_id] = _Sequence(session, rid, max(1, interval))
        self._send(submit)

    def abort(self, session: GatewaySession, rid: int, cause: CancelCause) -> None:
        """End a request; its end still comes. Unknown rids have ended already."""
        request_id = session.request_ids.get(rid)
        if request_id is not None:
            self._send(Cancel(request_id, cause))

    def drop(self, session: GatewaySession, cause: CancelCause) -> None:
        """End every request of a session that is gone; nothing of them is kept."""
        for request_id in session.request_ids.values():
            del self._sequences[request_id]
            self._send(Cancel(request_id, cause))
        session.request_ids.clear()
        self._dirty.discard(session)

    # ---- from the rank --------------------------------------------------------------------------------------------

    def tokens(self, tokens: Tokens) -> None:
        """Add output to its request's session; the first token goes at once, later ones by the stream's interval."""
        sequence = self._sequences.get(tokens.request_id)
        if sequence is None:
            return
        delta = convert.tokens_to_proto(tokens, sequence.rid)
        if sequence.held is not None:
            sequence.held.token_ids.extend(delta.token_ids)
            sequence.held.logprobs.extend(delta.logprobs)
            delta, sequence.held = sequence.held, None
        if sequence.begun and len(delta.token_ids) < sequence.interval:
            sequence.held = delta
            return
        sequence.begun = True
        sequence.session.frames.add_delta(delta)
        self._dirty.add(sequence.session)

    def ended(self, ended: Ended) -> None:
        """Add a request's end to its session, after what of its output was held back."""
        sequence = self._sequences.pop(ended.request_id, None)
        if sequence is None:
            return
        session = sequence.session
        del session.request_ids[sequence.rid]
        if sequence.held is not None:
            session.frames.add_delta(sequence.held)
        end = convert.ended_to_proto(ended, sequence.rid)
        end.timing.decode_worker = self._worker_name
        session.frames.add_end(end)
        self._dirty.add(session)

    def step_ended(self, step: int, mono_ns: int) -> None:
        """Let every session that got something send its frame; one that is not read loses its requests."""
        dirty, self._dirty = self._dirty, set()
        for session in dirty:
            if session.frames.overflowed:
                self.drop(session, CancelCause.SESSION_LOST)
            else:
                session.frames.send(step, mono_ns)
