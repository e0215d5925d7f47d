"""What workers say about themselves - WorkerInfo and LoadSnapshot - to protobuf and back.

The wire's load has what a gateway routes by; the running totals stay in the worker's own metrics.
"""

from __future__ import annotations

from tandem.core.messages.worker import AdapterInfo, RankReady, WorkerInfo, WorkerState
from tandem.core.stats import LoadSnapshot, PageCounts
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2

PROTOCOL_VERSION = 1
_ROLES = {
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
    "unified": worker_pb2.WORKER_ROLE_UNIFIED,
}
_ROLE_NAMES = {number: name for name, number in _ROLES.items()}
_STATES: dict[WorkerState, worker_pb2.WorkerState.ValueType] = {
    "starting": worker_pb2.WORKER_STATE_STARTING,
    "ready": worker_pb2.WORKER_STATE_READY,
    "draining": worker_pb2.WORKER_STATE_DRAINING,
    "failed": worker_pb2.WORKER_STATE_FAILED,
}
_STATE_NAMES: dict[int, WorkerState] = {number: name for name, number in _STATES.items()}


def worker_info(
    ready: RankReady,
    *,
    worker_id: str,
    instance_id: bytes,
    state: WorkerState = "ready",
    handoff_address: str = "",
    version: str = "",
) -> WorkerInfo:
    """Return what a worker with this rank 0 tells its gateways."""
    exported = tuple(endpoint.transport for endpoint in ready.endpoints)
    return WorkerInfo(
        worker_id=worker_id,
        instance_id=instance_id,
        role=ready.role,
        state=state,
        model=ready.model,
        fingerprint=ready.fingerprint,
        handoff_address=handoff_address,
        numerics=ready.numerics,
        loop=ready.loop,
        page_tokens=ready.page_tokens,
        num_pages=ready.num_pages,
        max_running_requests=ready.max_running_requests,
        max_context_tokens=ready.max_context_tokens,
        max_total_num_tokens=ready.max_total_num_tokens,
        max_req_input_len=ready.max_req_input_len,
        vocab_size=ready.vocab_size,
        eos_token_ids=ready.eos_token_ids,
        transports=exported if ready.role == "prefill" else ready.imports,
        transport_notes=ready.transport_notes,
        dtype=ready.dtype,
        operators=ready.operators,
        version=version,
        adapters=ready.adapters,
    )


def worker_info_to_proto(info: WorkerInfo) -> worker_pb2.WorkerInfo:
    """Return `info` on the wire."""
    return worker_pb2.WorkerInfo(
        worker_id=info.worker_id,
        instance_id=info.instance_id,
        role=_ROLES[info.role],
        state=_STATES[info.state],
        model=info.model,
        kv_block_tokens=info.page_tokens,
        kv_total_blocks=info.num_pages,
        max_running_requests=info.max_running_requests,
        max_context_tokens=info.max_context_tokens,
        kv_fingerprint=info.fingerprint,
        numerics=info.numerics,
        handoff_address=info.handoff_address,
        version=info.version,
        loop=info.loop,
        max_total_num_tokens=info.max_total_num_tokens,
        max_req_input_len=info.max_req_input_len,
        transports=info.transports,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        dtype=info.dtype,
        operators=info.operators,
        transport_notes=info.transport_notes,
        lora_adapters=[worker_pb2.LoraAdapter(name=adapter.name, digest=adapter.digest) for adapter in info.adapters],
    )


def worker_info_from_proto(message: worker_pb2.WorkerInfo) -> WorkerInfo:
    """Return a worker's words; an unknown role or state becomes "" and "failed", which nothing is routed to."""
    return WorkerInfo(
        worker_id=message.worker_id,
        instance_id=message.instance_id,
        role=_ROLE_NAMES.get(message.role, ""),
        state=_STATE_NAMES.get(message.state, "failed"),
        model=message.model,
        fingerprint=message.kv_fingerprint,
        handoff_address=message.handoff_address,
        numerics=message.numerics,
        loop=message.loop,
        page_tokens=message.kv_block_tokens,
        num_pages=message.kv_total_blocks,
        max_running_requests=message.max_running_requests,
        max_context_tokens=message.max_context_tokens,
        max_total_num_tokens=message.max_total_num_tokens,
        max_req_input_len=message.max_req_input_len,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        transports=tuple(message.transports),
        transport_notes=tuple(message.transport_notes),
        dtype=message.dtype,
        operators=message.operators,
        version=message.version,
        adapters=tuple(AdapterInfo(adapter.name, adapter.digest) for adapter in message.lora_adapters),
    )


def load_to_proto(load: LoadSnapshot, *, sequence: int, mono_ns: int) -> worker_pb2.LoadSnapshot:
    """Return the part of `load` that gateways route by; evictable pages do not count as used."""
    queries = load.prefix_query_tokens
    return worker_pb2.LoadSnapshot(
        seq=sequence,
        mono_ns=mono_ns,
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        waiting_uncached_tokens=load.waiting_uncached_tokens,
        kv_used_blocks=load.pages.total - load.pages.free - load.pages.cached,
        kv_total_blocks=load.pages.total,
        cache_hit_rate=load.prefix_hit_tokens / queries if queries else 0.0,
        transfers_inflight=load.transfers_inflight,
        transfers_waiting=load.transfers_waiting,
        state=worker_pb2.WORKER_STATE_DRAINING if load.draining else worker_pb2.WORKER_STATE_READY,
        fenced_instance_ids=load.fenced_instance_ids,
    )


def load_from_proto(message: worker_pb2.LoadSnapshot) -> LoadSnapshot:
    """Return the routable part of a worker's load; running totals are zero."""
    return LoadSnapshot(
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        waiting_uncached_tokens=message.waiting_uncached_tokens,
        pages=PageCounts(
            free=max(0, message.kv_total_blocks - message.kv_used_blocks),
            held=message.kv_used_blocks,
            total=message.kv_total_blocks,
        ),
        transfers_inflight=message.transfers_inflight,
        transfers_waiting=message.transfers_waiting,
        fenced_instance_ids=tuple(message.fenced_instance_ids),
        draining=message.state == worker_pb2.WORKER_STATE_DRAINING,
    )
