"""What an import says to its peer and to the transfer process, put together from its record. Decides nothing."""

from __future__ import annotations

from tandem.core.imports import Import
from tandem.core.messages.handoff import Open, OpenStream
from tandem.core.messages.transfer import Pull
from tandem.core.settings import SchedulerSettings
from tandem.core.token_ids import pack


def attempt_of(imp: Import) -> int:
    """Return the number of the present attempt: the gateway's count above, decode's own below."""
    return imp.peer.attempt << 32 | imp.streams_opened


def open_stream(imp: Import, settings: SchedulerSettings, transports: tuple[str, ...], now: float) -> OpenStream:
    """Return the opening of the import's present stream."""
    request, peer = imp.request, imp.peer
    opened = Open(
        handoff_id=peer.handoff_id,
        attempt=attempt_of(imp),
        importer_instance_id=settings.instance_id,
        prompt_token_ids=pack(request.tokens[: imp.num_tokens]),
        output_tokens=imp.num_open_outputs,
        sampling=request.sampling,
        tokens_held=imp.held_pages * settings.page_tokens,
        fingerprint=settings.fingerprint,
        numerics=settings.numerics,
        sharding=settings.sharding,
        transports=transports,
        checksums=(settings.checksum,),
        cache_salt=request.salt,
        adapter=request.adapter_name,
        adapter_digest=request.adapter,
        timeout_seconds=None if request.deadline is None else max(0.0, request.deadline - now),
    )
    return OpenStream(imp.stream_id, peer.address, peer.instance_id, opened)


def pull(imp: Import, ticket: int, ordinals: tuple[int, ...], pages: tuple[int, ...]) -> Pull:
    """Return the reading of `ordinals` into `pages`; the peer has accepted the present attempt."""
    assert imp.accepted is not None
    return Pull(
        ticket=ticket,
        endpoints=imp.endpoints,
        exporter=imp.accepted.sharding,
        handoff_id=imp.peer.handoff_id,
        attempt=attempt_of(imp),
        token=imp.accepted.handoff_token,
        ordinals=ordinals,
        checksums=imp.checksums_of(ordinals),
        remote_pages=imp.remote_pages_of(ordinals),
        pages=pages,
    )
