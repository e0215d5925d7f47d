"""Workers that come and go while requests run on them."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tandem.gateway.membership import Endpoint
from tests.fakes.worker import scripted
from tests.gateway.harness import Setup, byte_worker, collect, failure, run, text_request, until
from tests.gateway.model import ids_of


def test_a_worker_that_is_found_later_is_used(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        late = byte_worker(token=scripted(ids_of("x")))
        address = await late.start()
        fleet = setup.gateway.fleet
        fleet.update([Endpoint(setup.worker.address), Endpoint(address)])
        await until(lambda: fleet.count_ready("decode") == 2)
        assert fleet.count_sessions() == {"up": 2, "down": 0, "refused": 0}
        fleet.update([Endpoint(address)])
        await until(lambda: fleet.count_ready("decode") == 1, 10)
        await collect(setup.stub.StreamGenerate(text_request("ab")))
        assert len(late.submits) == 1
        await late.kill()

    run(tmp_path, scenario)


def test_a_worker_that_leaves_finishes_what_it_has(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        fleet, worker = setup.gateway.fleet, setup.worker
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=300))
        await until(lambda: worker.inflight == 1)
        fleet.update([])
        assert len("".join(message.text for message in await collect(call))) == 300
        await until(lambda: not fleet.views(), 10)
        await until(lambda: not worker.sessions)

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("x")), step_seconds=0.005))


def test_a_draining_endpoint_gets_nothing_new(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        fleet, worker = setup.gateway.fleet, setup.worker
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=100))
        await until(lambda: worker.inflight == 1)
        fleet.update([Endpoint(worker.address, draining=True)])
        code, _ = await failure(setup.stub.Generate(text_request("ab")))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert len("".join(message.text for message in await collect(call))) == 100
        fleet.update([Endpoint(worker.address)])
        await collect(setup.stub.StreamGenerate(text_request("ab")))

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("x")), step_seconds=0.005))


def test_an_address_that_is_never_answered_is_let_go(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        fleet = setup.gateway.fleet
        fleet.update([Endpoint(setup.worker.address), Endpoint("127.0.0.1:1")])
        assert fleet.count_sessions() == {"up": 1, "down": 1, "refused": 0}
        fleet.update([Endpoint(setup.worker.address)])
        await until(lambda: fleet.count_sessions()["down"] == 0, 10)

    run(tmp_path, scenario)


def test_a_worker_of_another_model_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(setup: Setup) -> None:
        fleet = setup.gateway.fleet
        await until(lambda: fleet.count_sessions()["refused"] == 1)
        code, _ = await failure(setup.stub.Generate(text_request("ab")))
        assert code is grpc.StatusCode.UNAVAILABLE

    run(tmp_path, scenario, byte_worker(model="another"), ready=False)
    assert "it serves another, this gateway m" in caplog.text
