"""Faults about tokens to be planted in the scheduler; see plants.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.core.importer import Importer
from tandem.core.messages.handoff import StreamFirstToken
from tandem.core.messages.plans import Row
from tandem.core.planner import Planner
from tandem.core.states import State
from tests.sim.plants import Patch, plant

# ---- tokens -------------------------------------------------------------------------------------------------------


@plant("tokens")
def a_row_past_the_end(patch: Patch) -> None:
    """No speculative row past max_tokens."""

    def may_speculate(self: Planner, request: Any) -> bool:
        return bool(request.samples_in_flight < self._settings.chain and not request.sampling.needs_history)

    patch.setattr(Planner, "_may_speculate", may_speculate)


@plant("tokens")
def a_speculative_row_with_penalties(patch: Patch) -> None:
    """No speculative row where the draw needs the tokens before it."""

    def may_speculate(self: Planner, request: Any) -> bool:
        pending = request.samples_in_flight
        return bool(pending < self._settings.chain and request.num_outputs + pending < request.sampling.max_tokens)

    patch.setattr(Planner, "_may_speculate", may_speculate)


@plant("first tokens")
def the_first_token_sampled_again(patch: Patch) -> None:
    """A forwarded first token is known, also when the prompt is computed here in the end."""
    original = Importer._compute_here

    def compute_here(self: Importer, imp: Any, now: float) -> None:
        del imp.request.tokens[imp.num_tokens :]
        original(self, imp, now)

    patch.setattr(Importer, "_compute_here", compute_here)


@plant("first tokens")
def a_stale_token(patch: Patch) -> None:
    """A token that the host knows goes with its row: the device's last one may be somebody else's."""
    original = Planner._decode_row

    def decode_row(self: Planner, request: Any, now: float) -> Row | None:
        row = original(self, request, now)
        return None if row is None else replace(row, token_ids=())

    patch.setattr(Planner, "_decode_row", decode_row)


@plant("stages")
def a_request_in_two_plans(patch: Patch) -> None:
    """Where no device keeps the last token, a request decodes in one plan at a time."""
    patch.setattr(Planner, "_may_speculate", lambda self, request: request.samples_in_flight < 2)


@plant("first tokens")
def a_first_token_taken_twice(patch: Patch) -> None:
    """A FirstToken of a later attempt is ignored."""

    def first_token(self: Importer, event: StreamFirstToken, now: float) -> None:
        imp = self._book.by_stream(event.stream_id)
        if imp is not None:
            self._ledger.append_output(imp.request, event.first_token.token_id, None, now)
            self._land(imp, now)

    patch.setattr(Importer, "first_token", first_token)


@plant("tokens")
def ends_below_min_tokens(patch: Patch) -> None:
    """No end token below min_tokens."""
    original = Planner._sample
    patch.setattr(Planner, "_sample", lambda self, request: replace(original(self, request), banned=()))


@plant("pages")
def retracted_with_rows_in_flight(patch: Patch) -> None:
    """A request is retracted once its launches have resolved."""
    original = Planner._grow

    def grow(self: Planner, request: Any, known: bool, now: float) -> bool:
        result = original(self, request, known, now)
        for other in list(self._ledger.running):
            if other.retracting and other.state is State.DECODING:
                other.rows_in_flight, rows = 0, other.rows_in_flight
                self._retract(other)
                other.rows_in_flight = rows
        return result

    patch.setattr(Planner, "_grow", grow)


@plant("pages")
def output_forgotten_by_a_retraction(patch: Patch) -> None:
    """What a retracted request has said stays said."""
    original = Planner._retract

    def retract(self: Planner, request: Any) -> None:
        original(self, request)
        del request.tokens[-1]

    patch.setattr(Planner, "_retract", retract)
