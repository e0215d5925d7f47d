"""Adapters as the scheduler knows them: which pages they share, what is refused, on both sides of a hand-off."""

from __future__ import annotations

import pytest

from tandem.core.messages.handoff import EndCode, EndStream, OpenStream, SendAccepted, StreamClosed
from tandem.core.messages.requests import Ended, EndReason
from tandem.core.messages.worker import AdapterInfo, AdaptersChanged
from tandem.core.states import State
from tests.core.export_rig import ExportRig, handoff_id, refusal
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import Rig, one, prompt_of

CODE, CHAT = AdapterInfo("code", "c0de" * 16), AdapterInfo("chat", "ca7" * 16)
PROMPT = prompt_of(13)


def cached_tokens(rig: Rig, number: int, adapter: str, salt: str = "") -> int:
    rig.submit(number, PROMPT, 2, adapter=adapter, salt=salt)
    rig.run()
    return rig.ended(number).cached_tokens


def test_pages_are_shared_only_below_the_same_adapter_and_salt() -> None:
    rig = Rig(adapters=(CODE, CHAT, AdapterInfo("alias", CODE.digest)))
    keys = [("", ""), ("code", ""), ("chat", ""), ("code", "tenant"), ("", CODE.digest), ("", f"('{CODE.digest}', '')")]
    for number, (adapter, salt) in enumerate(keys):
        assert cached_tokens(rig, 10 + number, adapter, salt) == 0, "somebody else's pages"
    for number, (adapter, salt) in enumerate(keys):
        assert cached_tokens(rig, 20 + number, adapter, salt) == 12
    assert cached_tokens(rig, 30, "alias") == 12, "the same weights under another name"


def test_rows_carry_the_digest() -> None:
    rig = Rig(adapters=(CODE,))
    rig.submit(1, 5, adapter="code")
    rig.submit(2, 5)
    assert {row.request_id: row.adapter for row in rig.plan()} == {1: CODE.digest, 2: ""}
    rig.resolve()
    assert {row.request_id: row.adapter for row in rig.plan()} == {1: CODE.digest, 2: ""}, "decode rows, too"


def test_an_unknown_adapter_is_refused_and_names_the_known() -> None:
    rig = Rig(adapters=(CODE, CHAT))
    end = one(rig.submit(1, 5, adapter="cod"), Ended)
    assert (end.reason, end.field_name) == (EndReason.REJECTED, "lora_adapter")
    assert end.message == "adapter 'cod' is not served here; served: chat, code"


def test_a_name_may_change_its_weights_and_requests_keep_theirs() -> None:
    rig = Rig(adapters=(CODE,))
    rig.submit(1, 5, adapter="code")
    changed = AdapterInfo("code", "4e3" * 16)
    rig.send(AdaptersChanged((changed, CHAT)))
    rig.submit(2, 5, adapter="code")
    assert [row.adapter for row in rig.plan()] == [CODE.digest, changed.digest]
    assert rig.scheduler.adapters_in_use() == {CODE.digest, CHAT.digest, changed.digest}
    rig.resolve()
    rig.run()
    assert rig.scheduler.adapters_in_use() == {CHAT.digest, changed.digest}
    assert cached_tokens(rig, 3, "code") == 0


# ---- hand-off -----------------------------------------------------------------------------------------------------


def test_open_carries_name_and_digest() -> None:
    rig = ImportRig(adapters=(CODE,))
    opened = one(rig.submit(1, 10, peers=(peer(1),), adapter="code"), OpenStream).open
    assert (opened.adapter, opened.adapter_digest) == ("code", CODE.digest)


def test_prefill_needs_the_same_weights_whatever_it_calls_them() -> None:
    rig = ExportRig(adapters=(AdapterInfo("here", CODE.digest), AdapterInfo("chat", "0" * 64)))
    one(rig.open(1, 1, adapter="code", adapter_digest=CODE.digest), SendAccepted)
    assert [row.adapter for row in rig.plan()] == [CODE.digest]
    rig.resolve()
    end = one(rig.open(2, 2, adapter="chat", adapter_digest=CHAT.digest), EndStream)
    assert end.code is EndCode.MISMATCH
    assert end.message == f"adapter 'chat' ({CHAT.digest[:12]}) is not loaded here"
    assert rig.is_live(1) and not rig.is_live(2)


def test_an_attempt_with_another_adapter_is_none_of_this_hand_off() -> None:
    rig = ExportRig(adapters=(CODE, CHAT))
    rig.open(1, 1, adapter="code", adapter_digest=CODE.digest)
    effects = rig.open(2, 1, attempt=2, adapter="chat", adapter_digest=CHAT.digest)
    assert refusal(effects) is EndCode.INVALID
    assert rig.export(1).open.handoff_id == handoff_id(1)


@pytest.mark.parametrize("num_peers", [1, 2])
def test_a_refused_adapter_goes_to_the_next_peer_then_is_computed_here(num_peers: int) -> None:
    rig = ImportRig(adapters=(CODE,))
    rig.submit(1, 10, peers=tuple(peer(number + 1) for number in range(num_peers)), adapter="code")
    for stream in range(1, num_peers + 1):
        assert rig.streams[-1].stream_id == stream
        rig.send(StreamClosed(stream, EndCode.MISMATCH, "not loaded here"))
    assert rig.request(1).state is State.WAITING
    assert [row.adapter for row in rig.plan()] == [CODE.digest]
