"""Which LoRA adapters a worker has, by name and by digest. A name may change its digest; requests keep theirs."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.messages.worker import AdapterInfo


class Adapters:
    """Names and digests. The empty name and digest are the model without an adapter, which is always there."""

    def __init__(self, adapters: Iterable[AdapterInfo]) -> None:
        self._by_name: dict[str, str] = {}
        self.change(adapters)

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(self._by_name.values())

    def change(self, adapters: Iterable[AdapterInfo]) -> None:
        """Serve these from now on, and no others."""
        self._by_name = {adapter.name: adapter.digest for adapter in adapters}

    def digest_of(self, name: str) -> str:
        return self._by_name[name] if name else ""

    def has(self, digest: str) -> bool:
        return not digest or digest in self._by_name.values()

    def fault(self, name: str, digest: str) -> str:
        """Say why a request cannot have this adapter here; empty: it can. Without a digest any will do."""
        if not name:
            return ""
        own = self._by_name.get(name)
        if own is None:
            known = ", ".join(sorted(self._by_name)) or "none"
            return f"adapter {name!r} is not served here; served: {known}"
        if digest and digest != own:
            return f"adapter {name!r} is {own[:12]} here, {digest[:12]} is asked for"
        return ""
