"""What a scheduler is told once, at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.config import HandoffConfig, Role, SchedulerConfig
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.worker import AdapterInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Everything that the scheduler needs to know about its worker; nothing of it changes in the worker's life."""

    role: Role
    chain: int = 1
    stages: int = 1  # of the device; with more than one, a plan takes its share only
    num_pages: int
    page_tokens: int
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    prefix_cache: bool = True
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    fingerprint: str = ""
    numerics: str = ""
    instance_id: bytes = b""
    sharding: Sharding = Sharding()
    num_layers: int = 1  # of the whole model, like num_kv_heads
    num_kv_heads: int = 1
    checksum: str = "xxh3-64"
    adapters: tuple[AdapterInfo, ...] = ()  # at the start

    @property
    def max_total_num_tokens(self) -> int:
        return self.num_pages * self.page_tokens

    @property
    def max_req_input_len(self) -> int:
        """Longest prompt that is accepted: one position is left for the first output, if the context allows any."""
        return min(self.max_context_tokens - 1, self.max_total_num_tokens)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)
