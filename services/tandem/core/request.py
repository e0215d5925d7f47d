"""One request as the scheduler knows it: a mutable record. Who may change what is said beside the fields."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from tandem.core.messages.requests import PrefillPeer
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.core.radix import Node
from tandem.core.states import State


@dataclass(slots=True, kw_only=True)
class Marks:
    """Monotonic instants, seconds; 0 where it has not happened."""

    arrived: float
    queued: float = 0.0  # decode: the first announcement of a peer; until then there was nothing to wait for here
    started: float = 0.0  # first row, or first pull
    computing: float = 0.0  # the prompt is being computed here since then; 0 again when it is
    first_token: float = 0.0
    landed: float = 0.0  # every page of a hand-off is verified and its first token known
    second_token: float = 0.0
    queue_seconds: float = 0.0  # of whoever computed the prompt
    prefill_seconds: float = 0.0
    pull_started: float = 0.0
    pull_ended: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Tokens known and tokens computed; rows close the gap.

        | computed | in flight | known, not planned |
        0          num_computed num_launched         len(tokens)

    `num_launched` may exceed len(tokens) by the speculative rows of the overlap loop.
    """

    request_id: int
    seq: int  # order of arrival
    state: State
    sampling: SamplingParams
    tokens: list[int]  # prompt, then outputs
    num_prompt: int
    salt: str
    deadline: float | None
    marks: Marks
    adapter: str = ""  # digest of its LoRA adapter
    adapter_name: str = ""
    num_given: int = 0  # outputs that the request brought along
    peers: tuple[PrefillPeer, ...] = ()
    is_export: bool = False  # prefill: belongs to a hand-off; its pages do, too
    # pages, in order of position; one reference each
    pages: list[int] = field(default_factory=list)
    page_table: tuple[int, ...] = ()  # `pages` as rows carry it; rebuilt when pages change
    path_end: Node | None = None  # node of the last own page in the tree
    num_in_tree: int = 0  # leading pages that are nodes on this request's path
    tree_open: bool = True  # further pages may enter the tree
    # progress
    num_launched: int = 0
    num_computed: int = 0
    slot: int = -1
    last_plan: int = 0  # id of the last plan with a row of it
    rows_in_flight: int = 0
    samples_in_flight: int = 0
    retracting: bool = False
    was_retracted: bool = False
    local_fallback: bool = False  # decode computes it because every named peer failed
    # outcome
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs_sent: bool = False
    last_logprob: TokenLogprob | None = None  # of an export's first token
    cached_tokens: int = 0
    received_bytes: int = 0
    transport: str = ""
    prefill_worker: str = ""

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def prefix_root(self) -> Hashable:
        """What its cached pages may be shared with: equal salts, and the same adapter or none."""
        return (self.adapter, self.salt) if self.adapter else self.salt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether rows of this request still have to report log-probabilities of the prompt.

        Not those of a resumed one: the client has them since its first token.
        """
        wanted = self.sampling.prompt_logprobs is not None and self.num_given == 0
        return wanted and len(self.prompt_logprobs) < self.num_prompt

    def set_pages(self, pages: list[int]) -> None:
        self.pages = pages
        self.page_table = tuple(pages)

    def forget_progress(self) -> None:
        """Back to nothing computed; tokens, outputs and marks stay. The caller has released pages and slot."""
        assert self.rows_in_flight == 0
        self.set_pages([])
        self.path_end = None
        self.num_in_tree = 0
        self.tree_open = True
        self.num_launched = 0
        self.num_computed = 0
        self.slot = -1
        self.retracting = False
