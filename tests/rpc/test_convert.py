"""Values survive the wire; what a peer cannot mean is refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import errors
from tandem.core import token_ids
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.requests import Ended, EndReason, PrefillPeer, Submit, Timing, Tokens
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.core.messages.worker import RankReady, WorkerInfo
from tandem.core.stats import LoadSnapshot, PageCounts
from tandem.rpc import convert, convert_sampling, convert_worker
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2


def single(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats that the wire's 32 bits hold exactly."""
    low, high = (struct.unpack("f", struct.pack("f", value))[0] for value in (low, high))
    return st.floats(low, high, width=32)


IDS = st.integers(0, 2**32 - 1)
LOGPROBS = st.builds(
    TokenLogprob,
    IDS,
    st.none() | single(-100, 0),
    st.lists(st.tuples(IDS, single(-100, 0)), max_size=3).map(tuple),
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=single(0, 2),
    top_p=single(0.25, 1),
    top_k=st.integers(0, 100),
    min_p=single(0, 1),
    repetition_penalty=single(0.5, 2),
    presence_penalty=single(-2, 2),
    frequency_penalty=single(-2, 2),
    seed=st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.integers(50, 2**32 - 1),
    min_tokens=st.integers(0, 50),
    stop_token_ids=st.lists(IDS, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logit_bias=st.dictionaries(IDS, single(-100, 100), max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
SIXTEEN = st.binary(min_size=16, max_size=16)
PEERS = st.builds(
    PrefillPeer,
    address=st.text(max_size=10),
    instance_id=SIXTEEN,
    handoff_id=SIXTEEN,
    attempt=st.integers(0, 2**32 - 1),
    output_tokens=st.integers(0, 2**32 - 1),
)
SECONDS = st.integers(0, 10**9).map(lambda value: value / 1000)
SUBMITS = st.builds(
    Submit,
    request_id=st.integers(1, 2**64 - 1),
    prompt_token_ids=st.lists(IDS, min_size=1, max_size=20).map(token_ids.pack),
    sampling=SAMPLING,
    output_token_ids=st.lists(IDS, max_size=5).map(token_ids.pack),
    peers=st.lists(PEERS, max_size=3).map(tuple),
    timeout_seconds=st.none() | SECONDS,
    priority=st.integers(-(2**31), 2**31 - 1),
    cache_salt=st.text(max_size=20),
)


@given(SAMPLING)
def test_sampling(params: SamplingParams) -> None:
    assert convert_sampling.sampling_from_proto(*convert_sampling.sampling_to_proto(params)) == params


@given(SUBMITS)
def test_submit(submit: Submit) -> None:
    message = worker_pb2.Submit.FromString(convert.submit_to_proto(submit, request_name="r").SerializeToString())
    assert message.request_id == "r"
    assert convert.submit_from_proto(message) == submit
    assert convert.submit_from_proto(message, 7) == replace(submit, request_id=7)


@given(st.lists(LOGPROBS, max_size=3).map(tuple), st.lists(LOGPROBS, max_size=3).map(tuple), st.lists(IDS))
def test_tokens(logprobs: Any, prompt_logprobs: Any, ids: list[int]) -> None:
    tokens = Tokens(9, 4, tuple(ids), logprobs, prompt_logprobs)
    assert convert.tokens_from_proto(convert.tokens_to_proto(tokens)) == tokens
    assert convert.tokens_to_proto(tokens, 3).rid == 3


@given(SECONDS, st.lists(LOGPROBS, max_size=3).map(tuple))
def test_answers_end(seconds: float, prompt_logprobs: Any) -> None:
    ended = Ended(
        request_id=5,
        reason=EndReason.STOP,
        stop_token_id=0,
        prompt_tokens=3,
        completion_tokens=2,
        cached_tokens=1,
        prompt_logprobs=prompt_logprobs,
        timing=Timing(
            queue_seconds=seconds,
            prefill_seconds=seconds,
            transfer_seconds=seconds,
            first_decode_seconds=seconds,
            decode_seconds=seconds,
            transfer_bytes=2**40,
            transport="tcp",
            prefill_worker="p:1",
        ),
    )
    assert convert.ended_from_proto(convert.ended_to_proto(ended)) == ended
    length = replace(ended, reason=EndReason.LENGTH, stop_token_id=None)
    assert convert.ended_from_proto(convert.ended_to_proto(length)) == length


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (EndReason.CANCELLED, errors.Cancelled),
        (EndReason.DEADLINE, errors.DeadlineExceeded),
        (EndReason.DRAINED, errors.Draining),
        (EndReason.PEER_LOST, errors.PeerLost),
        (EndReason.REJECTED, errors.InvalidRequest),
        (EndReason.FAILED, errors.TandemError),
    ],
)
def test_failures_end(reason: EndReason, kind: type[errors.TandemError]) -> None:
    field = "sampling.n" if reason is EndReason.REJECTED else ""
    ended = Ended(request_id=5, reason=reason, message="why", field_name=field)
    message = convert.ended_to_proto(ended)
    assert message.HasField("error")
    assert convert.ended_from_proto(message) == ended
    error = convert.ended_error(ended)
    assert type(error) is kind
    assert error.message == "why"
    assert convert.ended_from_error(5, error) == ended


def test_every_end_has_an_error_or_an_answer() -> None:
    for reason in EndReason:
        error = convert.ended_error(Ended(request_id=1, reason=reason))
        assert (error is None) == (reason in (EndReason.STOP, EndReason.LENGTH, EndReason.HANDED_OFF))
    full = convert.ended_error(Ended(request_id=1, reason=EndReason.REJECTED, overloaded=True))
    assert isinstance(full, errors.Overloaded)


def submit_message(**changes: Any) -> worker_pb2.Submit:
    fields: dict[str, Any] = {"rid": 1, "prompt_token_ids": token_ids.pack([1])} | changes
    return worker_pb2.Submit(**fields)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt", {"prompt_token_ids": b""}),
        ("prompt", {"prompt_token_ids": b"abc"}),
        ("output_token_ids", {"output_token_ids": b"abc"}),
        ("prefill", {"prefill": [worker_pb2.PrefillPeer(handoff_id=b"x" * 15, instance_id=b"x" * 16)]}),
        ("prefill", {"prefill": [worker_pb2.PrefillPeer(handoff_id=b"x" * 16)]}),
        ("prefill", {"prefill": [worker_pb2.PrefillPeer()] * 9}),
        ("hints.cache_salt", {"cache_salt": "x" * 257}),
        ("lora_adapter", {"lora_adapter": "x" * 129}),
        ("lora_adapter", {"lora_digest": "x" * 129}),
        ("stop.stop", {"stop": {"stop": ["a"]}}),
        ("sampling", {"sampling": {"regex": "a"}}),
        ("sampling.temperature", {"sampling": {"temperature": -1}}),
        ("output.logprobs", {"output": {"logprobs": 21}}),
    ],
)
def test_what_a_gateway_cannot_mean(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        convert.submit_from_proto(submit_message(**changes))
    assert caught.value.field == field


def test_unset_sampling_takes_the_defaults_and_zero_is_a_value() -> None:
    plain = convert.submit_from_proto(submit_message())
    assert plain.sampling == SamplingParams()
    zero = convert.submit_from_proto(submit_message(sampling={"temperature": 0, "top_k": -1, "max_tokens": 0}))
    assert (zero.sampling.temperature, zero.sampling.top_k, zero.sampling.max_tokens) == (0, 0, 0)
    assert zero.timeout_seconds is None


def test_worker_info_and_load() -> None:
    ready = RankReady(
        role="prefill",
        loop="overlap_prefill",
        model="m",
        max_total_num_tokens=1000,
        max_req_input_len=90,
        max_context_tokens=100,
        max_running_requests=8,
        page_tokens=16,
        num_pages=63,
        page_bytes=4096,
        vocab_size=258,
        eos_token_ids=(0, 2),
        fingerprint="f",
        numerics="n",
        dtype="float32",
        operators="reference",
        weight_bytes=1,
        pool_pages="ordinary",
        endpoints=(RankEndpoint(transport="tcp", address="h:1", instance_id=b"i"),),
        imports=("loopback",),
        transport_notes=("no RDMA",),
    )
    info = convert_worker.worker_info(ready, worker_id="w", instance_id=b"x" * 16, handoff_address="h:2", version="1")
    assert info.transports == ("tcp",)
    assert convert_worker.worker_info_from_proto(convert_worker.worker_info_to_proto(info)) == info
    decode = convert_worker.worker_info(replace(ready, role="decode"), worker_id="w", instance_id=b"")
    assert decode.transports == ("loopback",)
    strange = convert_worker.worker_info_from_proto(worker_pb2.WorkerInfo())
    assert (strange.role, strange.state) == ("", "failed")
    assert isinstance(strange, WorkerInfo)
    load = LoadSnapshot(
        running_requests=3,
        waiting_requests=2,
        waiting_uncached_tokens=900,
        pages=PageCounts(free=10, held=40, cached=9, quarantined=4, total=63),
        transfers_inflight=1,
        transfers_waiting=5,
        fenced_instance_ids=(b"a" * 16,),
        draining=True,
        prefix_hit_tokens=1,
        prefix_query_tokens=4,
    )
    message = convert_worker.load_to_proto(load, sequence=3, mono_ns=4)
    assert message.cache_hit_rate == 0.25
    back = convert_worker.load_from_proto(message)
    assert back.pages == PageCounts(free=19, held=44, total=63)
    assert replace(back, pages=load.pages, prefix_hit_tokens=1, prefix_query_tokens=4) == load
