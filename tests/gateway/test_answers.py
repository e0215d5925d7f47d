"""Stop strings through the whole gateway: spanning tokens and frames, reported, and told to the worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.errors import TandemError
from tandem.gateway import sequence
from tandem.gateway.journal import Journal
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.fakes.worker import FakeWorker, scripted
from tests.gateway.harness import Setup, byte_worker, collect, failure, run, text_request
from tests.gateway.model import ids_of


@pytest.mark.parametrize("tokens_per_step", [1, 3, 16])
@pytest.mark.parametrize(("include", "shown"), [(False, "one "), (True, "one STOP")])
def test_a_stop_string_across_tokens(tmp_path: Path, tokens_per_step: int, include: bool, shown: str) -> None:
    async def scenario(setup: Setup) -> None:
        stop = pb.StopConditions(stop=["STOP", "never"], include_stop_in_output=include)
        request = text_request("x", max_tokens=200, stop=stop, output=pb.OutputOptions(return_token_ids=True))
        messages = await collect(setup.stub.StreamGenerate(request))
        assert "".join(message.text for message in messages) == shown
        last = messages[-1]
        assert last.finish_reason == pb.FINISH_REASON_STOP
        assert last.stop_string == "STOP"
        assert last.usage.completion_tokens == len("one STOP")
        assert [token for message in messages for token in message.token_ids] == ids_of("one STOP")
        _, reason, _ = await setup.worker.aborted()
        assert reason == "STOP"
        assert setup.worker.inflight == 0

    worker = byte_worker(
        token=scripted(ids_of("one STOP and STOP")), tokens_per_step=tokens_per_step, step_seconds=0.002
    )
    run(tmp_path, scenario, worker)


def test_a_held_back_beginning_is_shown_at_the_end(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request("x", max_tokens=6, stop=pb.StopConditions(stop=["STOP"]))
        messages = await collect(setup.stub.StreamGenerate(request))
        assert "".join(message.text for message in messages) == "oneSTO"
        assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("oneSTO"))))


def test_a_stop_string_on_the_last_token(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        answer = await setup.stub.Generate(text_request("x", max_tokens=7, stop=pb.StopConditions(stop=["STOP"])))
        assert (answer.choices[0].text, answer.choices[0].stop_string) == ("one", "STOP")
        assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("oneSTOP"))))


def test_stop_strings_work_without_text(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request(
            "x", max_tokens=60, stop=pb.StopConditions(stop=["ST"]), output=pb.OutputOptions(no_text=True)
        )
        (choice,) = (await setup.stub.Generate(request)).choices
        assert (choice.text, list(choice.token_ids)) == ("", ids_of("oneST"))

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("oneSTOP"))))


def test_a_worker_without_a_last_word_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "LAST_WORD_SECONDS", 0.05)

    class Silent(FakeWorker):
        def _end(self, *arguments: object, **options: object) -> object:  # type: ignore[override]
            from tandem.rpc.gen.worker.v1 import worker_service_pb2

            return worker_service_pb2.SequenceEnd(rid=10**9)

    async def scenario(setup: Setup) -> None:
        answer = await setup.stub.Generate(text_request("x", max_tokens=60, stop=pb.StopConditions(stop=["ST"])))
        assert answer.choices[0].text == "one"
        assert answer.usage.completion_tokens == 5

    run(tmp_path, scenario, Silent(vocab_size=258, token=scripted(ids_of("oneSTOP")), stall_after=10))


def test_a_worker_that_leaves_tokens_out_fails_the_request(tmp_path: Path) -> None:
    class Forgetful(FakeWorker):
        def _tokens(self, rid, running, tokens):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            found = super()._tokens(rid, running, tokens)
            return replace(found, first_index=found.first_index + (found.first_index > 2))

    async def scenario(setup: Setup) -> None:
        _, error = await failure(setup.stub.StreamGenerate(text_request("x", max_tokens=60)))
        assert "left out 1 tokens" in error.message
        await setup.worker.aborted()

    run(tmp_path, scenario, Forgetful(vocab_size=258, token=scripted(ids_of("x")), step_seconds=0.01))


def test_journal_gives_each_index_once() -> None:
    journal = Journal()
    assert journal.accept(0, [1, 2, 3]) == 0
    assert journal.accept(1, [2, 3, 4]) == 2
    assert journal.accept(0, [1]) == 1
    assert journal.accept(4, []) == 0
    assert journal.token_ids == [1, 2, 3, 4]
    with pytest.raises(TandemError, match="left out 1"):
        journal.accept(5, [9])
    with pytest.raises(TandemError, match="changed"):
        journal.accept(3, [5])
    journal.cut(2)
    assert len(journal) == 2
    assert journal.accept(2, [7]) == 0
