"""The workers that this gateway knows: a session to each, what they say about themselves, what was sent to them.

The list is static for now. A worker's role is what it says, not where it was listed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

from tandem.core.routing import WorkerView
from tandem.gateway.limits import ModelLimits
from tandem.rpc.session_client import SessionClient

_logger = logging.getLogger(__name__)


class Worker:
    """One worker's session and this gateway's ledger of what it may have to prefill."""

    def __init__(self, session: SessionClient) -> None:
        self.session = session
        self.prefills = 0  # requests that named it first and have no token yet
        self.prefill_tokens = 0

    @property
    def address(self) -> str:
        return self.session.address

    def view(self) -> WorkerView:
        """Return what routing needs to know, as of now."""
        session, info = self.session, self.session.info
        if info is None:
            return WorkerView(address=session.address, role="", ready=False)
        prefill = info.role == "prefill"
        return WorkerView(
            address=session.address,
            role=info.role,
            ready=info.state == "ready",
            instance_id=info.instance_id,
            fingerprint=info.fingerprint,
            max_req_input_len=info.max_req_input_len,
            max_running_requests=info.max_running_requests,
            load=session.load,
            inflight=self.prefills if prefill else session.inflight,
            inflight_tokens=self.prefill_tokens,
            dispatched_since_load=session.dispatched_since_load,
        )


class Fleet:
    """All workers. `on_change` is called when one came, went, or changed its state."""

    def __init__(
        self,
        addresses: Iterable[str],
        *,
        gateway_id: str,
        on_change: Callable[[], None],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._workers = {
            address: Worker(SessionClient(address, gateway_id=gateway_id, on_change=self._changed, jitter=jitter))
            for address in dict.fromkeys(addresses)
        }
        self._on_change = on_change
        self._limits = ModelLimits()

    def start(self) -> None:
        for worker in self._workers.values():
            worker.session.start()

    async def close(self) -> None:
        """End every session; aborts that are queued still go out."""
        await asyncio.gather(*(worker.session.close() for worker in self._workers.values()))

    def worker(self, address: str) -> Worker:
        return self._workers[address]

    def views(self) -> list[WorkerView]:
        """Return the fleet as routing sees it."""
        return [worker.view() for worker in self._workers.values()]

    def count_ready(self, *roles: str) -> int:
        """Return how many workers of these roles take requests."""
        return sum(view.takes_requests and view.role in roles for view in self.views())

    @property
    def serves(self) -> bool:
        """Whether a request can be served at all."""
        return self.count_ready("decode", "unified") > 0

    @property
    def limits(self) -> ModelLimits:
        """What the most capable ready owner takes; the last known while there is none."""
        return self._limits

    def _changed(self) -> None:
        infos = [worker.session.info for worker in self._workers.values()]
        owners = [i for i in infos if i is not None and i.state == "ready" and i.role in ("decode", "unified")]
        if owners:
            self._limits = ModelLimits(
                max_context_tokens=max(info.max_context_tokens for info in owners),
                max_prompt_tokens=max(info.max_req_input_len for info in owners),
                max_total_tokens=max(info.max_total_num_tokens for info in owners),
                vocab_size=min(info.vocab_size for info in owners),
                eos_token_ids=owners[0].eos_token_ids,
            )
        if len({info.fingerprint for info in owners}) > 1:
            _logger.warning("ready workers have different fingerprints: is it one model?")
        self._on_change()
