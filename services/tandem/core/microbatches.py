"""How much one plan takes where several are computed at once, each in its own stage of the device.

A pipeline of stages is as fast as its longest plan: it is full when as many plans as stages are in flight, and none of
them is longer than the others. Costs are predictions, in tokens of an empty context.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.messages.plans import Row

CONTEXT_TOKENS = 4096  # so many tokens of context cost a token as much as everything else
PROMPT_ROUNDS = 4  # of all stages, over which prompts are spread: plans stay even while prompts come and go
_SLACK = 0.9  # of the mean decode row


def row_cost(start: int, num_tokens: int) -> float:
    """Predict the cost of computing `num_tokens` tokens behind `start` others: attention grows with the context."""
    return num_tokens * (1.0 + (start + num_tokens / 2) / CONTEXT_TOKENS)


def rows_cost(rows: Sequence[Row]) -> float:
    return sum(row_cost(row.start, row.num_tokens) for row in rows)


@dataclass(frozen=True, slots=True)
class Share:
    """What one plan takes: decode rows up to `decode`, then prompts up to `total`; a prompt's part is never empty.

    `slack` is how far a row may go beyond: nearly the mean of the decode rows. So nobody is left out where rows do not
    divide evenly, small differences of cost do not make one plan longer than the others, and a row far above the mean
    begins a plan of its own.
    """

    decode: float
    slack: float
    total: float
    chunk_tokens_min: int

    def takes(self, taken: float, cost: float) -> bool:
        """Whether a plan with decode rows of cost `taken` takes another one."""
        return taken == 0.0 or taken + cost <= self.decode + self.slack

    def prompt_room(self, taken: float) -> float:
        """Return the cost that prompts may have beside decode rows of cost `taken`."""
        return max(self.total - taken, float(self.chunk_tokens_min))


UNDIVIDED = Share(math.inf, 0.0, math.inf, 1)


def tokens_within(room: float, start: int) -> float:
    """Return how many tokens behind `start` others cost about `room`; at least 1."""
    return room if math.isinf(room) else max(1.0, math.ceil(room / (1.0 + start / CONTEXT_TOKENS)))


class Microbatches:
    """Divides what can be computed by the plans that are not in flight yet.

    A share is an equal part of all that is computed or could be, so a plan that was too large is not repeated: what it
    leaves over joins a smaller one. It is never more than an equal part of what is left for the free stages. A plan
    that is longer than the one before leaves every later stage idle for the difference, so prompts are not computed in
    one round of the stages but spread over PROMPT_ROUNDS.
    """

    def __init__(self, stages: int, chunk_tokens_min: int) -> None:
        self._stages = stages
        self._chunk_tokens_min = chunk_tokens_min
        self._in_flight: deque[tuple[float, float]] = deque()  # cost of decode rows, cost of all rows

    @property
    def divides(self) -> bool:
        return self._stages > 1

    def launched(self, rows: Sequence[Row], num_decode: int) -> None:
        """Note a plan whose first `num_decode` rows are decode rows."""
        decode = rows_cost(rows[:num_decode])
        self._in_flight.append((decode, decode + rows_cost(rows[num_decode:])))

    def resolved(self) -> None:
        self._in_flight.popleft()

    def share(self, decode: Sequence[float], prompts: float) -> Share:
        """Return the next plan's share. `decode`: cost of each decode row that could go; `prompts`: of all chunks."""
        ready = sum(decode)
        free = max(1, self._stages - len(self._in_flight))
        decode_in_flight = sum(cost for cost, _ in self._in_flight)
        in_flight = sum(cost for _, cost in self._in_flight)
        everything = ready + prompts
        return Share(
            decode=min((decode_in_flight + ready) / self._stages, ready / free),
            slack=_SLACK * ready / len(decode) if decode else 0.0,
            total=min(
                (decode_in_flight + ready + (in_flight - decode_in_flight + prompts) / PROMPT_ROUNDS) / self._stages,
                everything / free,
            ),
            chunk_tokens_min=self._chunk_tokens_min,
        )
