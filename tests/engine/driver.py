"""Drives a device with plans made by hand: random chunks, random pages, mixed batches. No scheduler."""

from __future__ import annotations

import random
import select
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.core.messages.plans import Plan, PlanResolved, Row, RowResult, Sample
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.engine.device import Device

GREEDY = SamplingParams(temperature=0.0)
WAIT_SECONDS = 30.0


def take(device: Device, count: int) -> list[PlanResolved]:
    """Wait for that many results."""
    results: list[PlanResolved] = []
    while len(results) < count:
        readable, _, _ = select.select([device], [], [], WAIT_SECONDS)
        assert readable, "the device does not answer"
        results += device.resolved()
    return results


@dataclass
class Running:
    """A request as the driver sees it; `computed` positions are in its pages."""

    number: int
    prompt: tuple[int, ...]
    pages: tuple[int, ...]
    params: SamplingParams = GREEDY
    computed: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def known(self) -> tuple[int, ...]:
        return self.prompt + tuple(self.output)


class PlanDriver:
    """Owns a device's pages and slots for one test."""

    def __init__(self, device: Device, *, num_pages: int, page_tokens: int, seed: int = 0) -> None:
        self.device = device
        self.page_tokens = page_tokens
        self.random = random.Random(seed)
        self._free_pages = list(range(num_pages))
        self.random.shuffle(self._free_pages)
        self._plan_id = 0
        self._requests = 0

    def start(
        self, prompt: Sequence[int], num_new: int, *, params: SamplingParams = GREEDY, shared: Sequence[int] = ()
    ) -> Running:
        """A request with pages for all of its tokens; `shared` pages of another one hold its first positions."""
        needed = -(-(len(prompt) + num_new) // self.page_tokens) - len(shared)
        pages = (*shared, *(self._free_pages.pop() for _ in range(needed)))
        request = Running(self._requests, tuple(prompt), pages, params, computed=len(shared) * self.page_tokens)
        self._requests += 1
        return request

    def release(self, request: Running) -> None:
        self._free_pages += request.pages

    def launch(self, rows: Sequence[Row]) -> None:
        self._plan_id += 1
        self.device.launch(Plan(self._plan_id, tuple(rows)))

    def execute(self, rows: Sequence[Row]) -> tuple[RowResult, ...]:
        """Execute one plan and wait for its result."""
        self.launch(rows)
        (resolved,) = take(self.device, 1)
        assert resolved.plan_id == self._plan_id
        assert len(resolved.rows) == len(rows)
        return resolved.rows

    def row(self, request: Running, num_tokens: int, *, unseen: bool = False, zero_tail: bool = False) -> Row:
        """The request's next `num_tokens` positions; with `unseen` the device has to know the one token itself."""
        start, end = request.computed, request.computed + num_tokens
        known = len(request.known)
        sample = None
        if end >= known:
            params = request.params
            history = request.known if params.needs_history else ()
            num_prompt = len(request.prompt) if params.needs_history else 0
            index = end - len(request.prompt)
            sample = Sample(params=params, output_index=index, history=history, num_prompt=num_prompt)
        return Row(
            request_id=request.number,
            slot=request.number,
            start=start,
            num_tokens=num_tokens,
            token_ids=() if unseen else request.known[start:end],
            pages=request.pages,
            sample=sample,
            zero_tail=zero_tail,
        )

    def generate(self, requests: Sequence[Running], num_new: int, *, chunk_max: int, unseen_share: float = 0.5) -> None:
        """Bring every request to `num_new` outputs, in plans of randomly chosen rows and chunks.

        `unseen_share` of the decode rows leave it to the device to know its last token.
        """
        while unfinished := [request for request in requests if len(request.output) < num_new]:
            chosen = [request for request in unfinished if self.random.random() < 0.8] or unfinished
            self.random.shuffle(chosen)
            rows = []
            for request in chosen:
                missing = len(request.known) - request.computed
                num_tokens = min(missing, self.random.randint(1, chunk_max))
                decoding = bool(request.output) and missing == 1
                rows.append(self.row(request, num_tokens, unseen=decoding and self.random.random() < unseen_share))
            for request, row, result in zip(chosen, rows, self.execute(rows), strict=True):
                request.computed += row.num_tokens
                assert (result.token_id is None) == (row.sample is None)
                if result.token_id is not None:
                    request.output.append(result.token_id)
                    if result.logprob is not None:
                        request.logprobs.append(result.logprob)
