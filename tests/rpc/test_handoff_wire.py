"""Hand-off messages on the wire: what goes in comes out, and what no peer sends is refused."""

from __future__ import annotations

import struct
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.messages.handoff import (
    Accepted,
    Announce,
    Complete,
    EndCode,
    FirstToken,
    Open,
    RankEndpoint,
    RankPages,
    ReleaseReason,
    Sharding,
)
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.core.token_ids import pack
from tandem.errors import InvalidRequest
from tandem.rpc.gen.handoff.v1 import handoff_service_pb2 as handoff_pb2
from tandem.rpc.handoff_status import DOMAIN, end_code, end_status
from tandem.rpc.handoff_wire import (
    MAX_NAMES,
    open_from_proto,
    open_to_proto,
    release_from_proto,
    release_to_proto,
    response_from_proto,
    response_to_proto,
)

ids = st.binary(min_size=16, max_size=16)
token_ids = st.integers(0, 2**32 - 1)
names = st.lists(st.text(max_size=20), max_size=MAX_NAMES).map(tuple)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
seconds = st.integers(0, 10**6).map(lambda n: n / 1000)
shardings = st.builds(Sharding, st.integers(1, 64), st.integers(1, 64))
logprobs = st.builds(
    TokenLogprob, token_ids, st.none() | floats, st.lists(st.tuples(token_ids, floats), max_size=3).map(tuple)
)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2, width=32),
    top_p=st.floats(0.125, 1, width=32),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0, 1, width=32),
    repetition_penalty=st.floats(0.5, 2, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    seed=st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.integers(10, 1000),
    min_tokens=st.integers(0, 10),
    stop_token_ids=st.lists(token_ids, max_size=5).map(tuple),
    ignore_eos=st.booleans(),
    logit_bias=st.dictionaries(token_ids, st.floats(-100, 100, width=32), max_size=4).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)


@st.composite
def opens(draw: st.DrawFn) -> Open:
    prompt = draw(st.lists(token_ids, min_size=1, max_size=20))
    return Open(
        handoff_id=draw(ids),
        attempt=draw(st.integers(0, 2**64 - 1)),
        importer_instance_id=draw(ids),
        prompt_token_ids=pack(prompt),
        output_tokens=draw(st.integers(0, len(prompt) - 1)),
        sampling=draw(samplings),
        tokens_held=draw(st.integers(0, len(prompt) - 1)),
        fingerprint=draw(st.text(max_size=100)),
        numerics=draw(st.text(max_size=100)),
        sharding=draw(shardings),
        transports=draw(names),
        checksums=draw(names),
        priority=draw(st.integers(-(2**31), 2**31 - 1)),
        cache_salt=draw(st.text(max_size=50)),
        timeout_seconds=draw(st.none() | seconds),
    )


@st.composite
def announces(draw: st.DrawFn) -> Announce:
    count = draw(st.integers(0, 10))
    rank = st.builds(
        RankPages,
        st.binary(min_size=8 * count, max_size=8 * count),
        st.sampled_from([0, 4 * count]).flatmap(lambda size: st.binary(min_size=size, max_size=size)),
    )
    ranks = draw(st.lists(rank, min_size=1, max_size=3))
    return Announce(draw(token_ids), draw(token_ids), tuple(ranks))


endpoints = st.builds(
    RankEndpoint,
    transport=st.text(max_size=20),
    address=st.text(max_size=50),
    instance_id=ids,
    tensor_rank=st.integers(0, 63),
    pipeline_rank=st.integers(0, 63),
)
accepteds = st.builds(
    Accepted,
    handoff_token=st.binary(max_size=64),
    endpoints=st.lists(endpoints, min_size=1, max_size=4).map(tuple),
    sharding=shardings,
    numerics=st.text(max_size=50),
    checksum=st.text(max_size=20),
    lease_seconds=seconds,
)
first_tokens = st.builds(
    FirstToken,
    token_id=token_ids,
    logprob=st.none() | logprobs,
    prompt_logprobs=st.lists(logprobs, max_size=4).map(tuple),
    cached_tokens=token_ids,
)
completes = st.builds(Complete, queue_seconds=seconds, prefill_seconds=seconds)


@given(opens())
def test_open(opened: Open) -> None:
    message = handoff_pb2.HandoffRequest.FromString(open_to_proto(opened).SerializeToString())
    assert open_from_proto(message.open, opened.timeout_seconds) == opened


@given(accepteds | announces() | first_tokens | completes)
def test_response(response: Any) -> None:
    message = handoff_pb2.HandoffResponse.FromString(response_to_proto(response).SerializeToString())
    assert response_from_proto(message) == response


@pytest.mark.parametrize("reason", list(ReleaseReason))
def test_release(reason: ReleaseReason) -> None:
    assert release_from_proto(release_to_proto(reason).release) is reason


def valid_open() -> handoff_pb2.Open:
    opened = Open(
        handoff_id=bytes(16),
        attempt=1,
        importer_instance_id=bytes(16),
        prompt_token_ids=pack([1, 2, 3]),
        output_tokens=0,
        sampling=SamplingParams(),
        tokens_held=0,
        fingerprint="f",
        numerics="",
        sharding=Sharding(),
        transports=("tcp",),
        checksums=("xxh3-64",),
    )
    return open_to_proto(opened).open


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("handoff_id", b"short"),
        ("importer_instance_id", b""),
        ("prompt_token_ids", b""),
        ("prompt_token_ids", b"12345"),
        ("output_tokens", 3),
        ("tokens_held", 3),
        ("fingerprint", "x" * 1000),
        ("cache_salt", "x" * 1000),
        ("lora_adapter", "x" * 129),
        ("lora_digest", "x" * 129),
    ],
)
def test_open_that_no_importer_sends(field: str, value: Any) -> None:
    message = valid_open()
    open_from_proto(message, None)
    setattr(message, field, value)
    with pytest.raises(InvalidRequest) as caught:
        open_from_proto(message, None)
    assert caught.value.field == field


def test_open_with_too_many_names_or_a_bad_sharding() -> None:
    message = valid_open()
    message.transports.extend(["t"] * MAX_NAMES)
    with pytest.raises(InvalidRequest):
        open_from_proto(message, None)
    message = valid_open()
    message.importer.tensor_size = 1 << 20
    with pytest.raises(InvalidRequest):
        open_from_proto(message, None)
    message = valid_open()
    message.sampling.temperature = float("nan")
    with pytest.raises(InvalidRequest):
        open_from_proto(message, None)


def test_responses_that_no_exporter_sends() -> None:
    for message in (
        handoff_pb2.HandoffResponse(),
        handoff_pb2.HandoffResponse(accepted=handoff_pb2.Accepted()),
        handoff_pb2.HandoffResponse(announce=handoff_pb2.Announce()),
        handoff_pb2.HandoffResponse(announce=handoff_pb2.Announce(ranks=[handoff_pb2.RankPages(checksums=b"1234567")])),
        handoff_pb2.HandoffResponse(
            announce=handoff_pb2.Announce(
                ranks=[handoff_pb2.RankPages(checksums=bytes(8)), handoff_pb2.RankPages(checksums=bytes(16))]
            )
        ),
        handoff_pb2.HandoffResponse(
            announce=handoff_pb2.Announce(
                ranks=[handoff_pb2.RankPages(checksums=bytes(16), page_numbers=struct.pack("<I", 1))]
            )
        ),
    ):
        with pytest.raises(InvalidRequest):
            response_from_proto(message)


# ---- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [code for code in EndCode if code is not EndCode.OK])
def test_every_end_code_comes_back_exactly(code: EndCode) -> None:
    status = end_status(code, "why")
    assert end_code(status.code, status.details, status.trailing_metadata) == (code, "why")


def test_the_code_survives_another_grpc_status() -> None:
    status = end_status(EndCode.LOST, "gone", status_code=grpc.StatusCode.FAILED_PRECONDITION)
    assert status.code is grpc.StatusCode.FAILED_PRECONDITION
    assert end_code(status.code, status.details, status.trailing_metadata)[0] is EndCode.LOST


@pytest.mark.parametrize(
    ("status_code", "expected"),
    [
        (grpc.StatusCode.OK, EndCode.OK),
        (grpc.StatusCode.UNAVAILABLE, EndCode.LOST),
        (grpc.StatusCode.CANCELLED, EndCode.LOST),
        (grpc.StatusCode.INTERNAL, EndCode.LOST),
        (grpc.StatusCode.FAILED_PRECONDITION, EndCode.LOST),
        (grpc.StatusCode.DEADLINE_EXCEEDED, EndCode.DEADLINE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, EndCode.OVERLOADED),
        (grpc.StatusCode.INVALID_ARGUMENT, EndCode.INVALID),
        (grpc.StatusCode.UNIMPLEMENTED, EndCode.MISMATCH),
    ],
)
def test_statuses_of_grpc_itself(status_code: grpc.StatusCode, expected: EndCode) -> None:
    assert end_code(status_code, "", ())[0] is expected


def test_details_of_others_are_not_believed() -> None:
    other = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="x")
    for value in (b"\xff\xff\xff", other.SerializeToString(), b"x" * 20000, _with_reason("no_such_code")):
        metadata = (("grpc-status-details-bin", value),)
        assert end_code(grpc.StatusCode.UNAVAILABLE, "x", metadata)[0] is EndCode.LOST


def _with_reason(reason: str) -> bytes:
    from google.rpc import error_details_pb2

    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0])
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    return bytes(status.SerializeToString())
