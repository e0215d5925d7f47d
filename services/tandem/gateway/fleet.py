"""The workers that this gateway knows: a session to each, what they say about themselves, what was sent to them.

Discovery says which there are. A worker's role is what it says, not where it was listed. One that discovery knows no
more stays for as long as its session lives and has work: what it does is better evidence than what a list says.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from tandem.core.messages.worker import WorkerInfo
from tandem.core.routing import WorkerView
from tandem.gateway.limits import ModelLimits
from tandem.gateway.membership import Endpoint
from tandem.rpc.session_client import SessionClient
from tandem.rpc.tls import ClientTls

SWEEP_SECONDS = 1.0
_logger = logging.getLogger(__name__)


class Worker:
    """One worker's session and this gateway's ledger of what it may have to prefill."""

    def __init__(self, session: SessionClient) -> None:
        self.session = session
        self.prefills = 0  # requests that named it first and have no token yet
        self.prefill_tokens = 0
        self.draining = False  # as discovery sees it: it is on its way out
        self.listed = True  # discovery knows it still
        self.refused = ""  # why nothing is sent to it

    @property
    def address(self) -> str:
        return self.session.address

    @property
    def busy(self) -> bool:
        """Whether a request of this gateway needs it still."""
        return bool(self.session.inflight or self.prefills)

    def view(self) -> WorkerView:
        """Return what routing needs to know, as of now."""
        session, info = self.session, self.session.info
        if info is None:
            return WorkerView(address=session.address, role="", ready=False)
        prefill = info.role == "prefill"
        return WorkerView(
            address=session.address,
            role=info.role,
            ready=info.state == "ready" and not self.draining and not self.refused,
            instance_id=info.instance_id,
            fingerprint=info.fingerprint,
            adapters=frozenset(adapter.digest for adapter in info.adapters),
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
        *,
        gateway_id: str,
        model: str = "",
        on_change: Callable[[], None],
        jitter: Callable[[], float] = random.random,
        tls: ClientTls | None = None,
    ) -> None:
        """`model`: the name of what this gateway tokenizes for; workers of another are not used. Empty: any."""
        self._gateway_id = gateway_id
        self._model = model
        self._jitter = jitter
        self._tls = tls
        self._workers: dict[str, Worker] = {}
        self._on_change = on_change
        self._limits = ModelLimits()
        self._adapters: dict[str, str] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Let go of workers that have left, from now on."""
        self._sweeper = asyncio.create_task(self._sweep(), name="fleet sweeper")

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        """Make these the known workers: new ones are connected to, missing ones leave when they are idle or lost."""
        listed = {endpoint.address: endpoint for endpoint in endpoints}
        for address in listed.keys() - self._workers.keys():
            session = SessionClient(
                address, gateway_id=self._gateway_id, on_change=self._changed, jitter=self._jitter, tls=self._tls
            )
            self._workers[address] = Worker(session)
            session.start()
            _logger.info("worker %s was found", address)
        for address, worker in self._workers.items():
            endpoint = listed.get(address)
            worker.listed = endpoint is not None
            worker.draining = endpoint is not None and endpoint.draining
        self._changed()

    async def close(self) -> None:
        """End every session; aborts that are queued still go out."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*(worker.session.close() for worker in self._workers.values()), *self._leaving)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            gone = [w for w in self._workers.values() if not w.listed and (w.session.info is None or not w.busy)]
            for worker in gone:
                del self._workers[worker.address]
                _logger.info("worker %s has left", worker.address)
                task = asyncio.create_task(worker.session.close(), name=f"leave {worker.address}")
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
            if gone:
                self._on_change()

    def count_sessions(self) -> dict[str, int]:
        """Return how many sessions are up, down, and up with a worker that is not used."""
        counts = {"up": 0, "down": 0, "refused": 0}
        for worker in self._workers.values():
            state = "down" if worker.session.info is None else "refused" if worker.refused else "up"
            counts[state] += 1
        return counts

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

    @property
    def adapters(self) -> Mapping[str, str]:
        """Adapters that ready owners serve: name to digest; the last known while there is no owner."""
        return self._adapters

    def _changed(self) -> None:
        for worker in self._workers.values():
            self._check_model(worker)
        infos = [worker.session.info for worker in self._workers.values() if not worker.refused]
        owners = [i for i in infos if i is not None and i.state == "ready" and i.role in ("decode", "unified")]
        if owners:
            self._limits = ModelLimits(
                max_context_tokens=max(info.max_context_tokens for info in owners),
                max_prompt_tokens=max(info.max_req_input_len for info in owners),
                max_total_tokens=max(info.max_total_num_tokens for info in owners),
                vocab_size=min(info.vocab_size for info in owners),
                eos_token_ids=owners[0].eos_token_ids,
            )
            self._adapters = _adapters(owners)
        if len({info.fingerprint for info in owners}) > 1:
            _logger.warning("ready workers have different fingerprints: is it one model?")
        self._on_change()

    def _check_model(self, worker: Worker) -> None:
        info = worker.session.info
        if info is None or not self._model or info.model == self._model:
            worker.refused = ""
            return
        why = f"it serves {info.model}, this gateway {self._model} (model.served_name names it where paths differ)"
        if why != worker.refused:
            _logger.error("worker %s is not used: %s", worker.address, why)
        worker.refused = why


def _adapters(owners: Sequence[WorkerInfo]) -> dict[str, str]:
    """By name, the weights that most owners have under it: while a name changes its weights, both are there."""
    counts = Counter((adapter.name, adapter.digest) for info in owners for adapter in info.adapters)
    return {name: digest for (name, digest), _ in sorted(counts.items(), key=lambda item: (item[1], item[0]))}
