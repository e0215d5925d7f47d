"""Everything encrypted, over real processes: right answers, strangers refused everywhere, certificates changed live."""

from __future__ import annotations

import random
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest

from tandem.rpc.gen.handoff.v1 import handoff_service_pb2 as handoff_pb
from tandem.rpc.gen.handoff.v1.handoff_service_pb2_grpc import HandoffServiceStub
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.certificates import PEER_NAME, Authority, flags
from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Program, Service, free_port
from tests.e2e.test_faults import collect

OVERRIDE = (("grpc.ssl_target_name_override", PEER_NAME),)
SECONDS = 40.0  # for a change of files to be noticed, on a busy machine
FRESH = (("grpc.use_local_subchannel_pool", 1),)  # a channel with a connection of its own


@dataclass
class Secured:
    """A service with TLS everywhere, and the files behind it."""

    service: Service
    clients: Authority  # of the gateway's certificate
    pods: Authority
    prefill: Program
    decode: Program
    gateway: Program
    kv_port: int
    pod_files: tuple[Path, Path, Path] = field(default=(Path(), Path(), Path()))

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.prefill, self.decode, self.gateway

    def ask_anew(self, prompt: list[int], max_tokens: int = 8) -> list[int]:
        """Ask over a new connection, which trusts whatever authority the clients know now."""
        credentials = grpc.ssl_channel_credentials(self.clients.ca_file.read_bytes())
        with grpc.secure_channel(self.gateway.address, credentials, options=FRESH) as channel:
            return collect(InferenceServiceStub(channel), prompt, max_tokens)

    def wait_logged(self, text: str, programs: tuple[Program, ...], at_least: int = 1) -> None:
        deadline = time.monotonic() + SECONDS
        while any(program.log_path.read_text(errors="replace").count(text) < at_least for program in programs):
            assert time.monotonic() < deadline, [program.log() for program in programs]
            time.sleep(0.05)


@pytest.fixture
def secured(service: Service, tmp_path: Path) -> Secured:
    clients, pods = Authority(tmp_path / "clients"), Authority(tmp_path / "pods")
    tls, kv_port = pods.pod(), free_port()
    peer_flags = [*flags(tls), "--transfer.transport", "tcp"]
    prefill = service.worker("prefill", *peer_flags, "--transfer.port", str(kv_port), "--server.handoff-port", "0")
    decode = service.worker("decode", *peer_flags)
    both = replace(tls, **{name: getattr(clients.gateway(), name) for name in ("certificate_file", "key_file")})
    for worker in (prefill, decode):
        worker.wait_ready()
    service.credentials = grpc.ssl_channel_credentials(clients.ca)
    gateway = service.gateway([prefill], [decode], *flags(both))
    files = (Path(tls.peer_certificate_file), Path(tls.peer_key_file), Path(tls.peer_ca_file))
    return Secured(service, clients, pods, prefill, decode, gateway, kv_port, files)


class Load:
    """Requests, one after another in each of some threads, over new and old connections, until told to stop."""

    def __init__(self, secured: Secured, oracle: Oracle) -> None:
        self._secured = secured
        self._oracle = oracle
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.answers: list[tuple[list[int], list[int]]] = []
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(3)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        source = random.Random(seed)
        stub = self._secured.service.stub(self._secured.gateway)
        while not self._stop.is_set():
            prompt = random_prompt(source, 120)
            try:
                output = collect(stub, prompt, 8) if seed else self._secured.ask_anew(prompt)
            except BaseException as error:
                self.errors.append(error)
                return
            with self._lock:
                self.answers.append((prompt, output))

    def wait_answers(self, num_more: int) -> None:
        wanted = len(self.answers) + num_more
        deadline = time.monotonic() + 60
        while len(self.answers) < wanted and not self.errors:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def check(self) -> None:
        """Fail unless every request was answered, and answered right."""
        assert not self.errors, self.errors
        for prompt, output in random.Random(1).sample(self.answers, min(10, len(self.answers))):
            self._oracle.check(prompt, output, 8)


def test_a_right_answer_with_everything_encrypted(secured: Secured, oracle: Oracle, tmp_path: Path) -> None:
    stub = secured.service.stub(secured.gateway)
    prompt = random_prompt(random.Random(1), 200)
    request = greedy(prompt, 16)
    request.output.return_timing = True
    messages = list(stub.StreamGenerate(request, timeout=60))
    oracle.check(prompt, [token for message in messages for token in message.token_ids], 16)
    timing = messages[-1].timing
    assert (timing.kv_transport, timing.kv_bytes > 0) == ("tcp", True)
    assert secured.decode.worker_metric("local_prefills") == 0
    line = [sys.executable, "-m", "tandem.cli.main", "generate", "x = ", "--max-tokens", "4"]
    line += ["--address", secured.gateway.address]
    good = subprocess.run([*line, "--tls-ca-file", str(secured.clients.ca_file)], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    for extra, remedy in (
        ([], "say --tls and, for an authority of your own, --tls-ca-file"),
        (["--tls-ca-file", str(secured.pods.ca_file)], "name the authority of its certificate with --tls-ca-file"),
    ):
        bad = subprocess.run([*line, *extra], capture_output=True, text=True)
        assert (bad.returncode, remedy in bad.stderr) == (1, True), bad.stderr


# ---- strangers ------------------------------------------------------------------------------------------------------


def status_of(call: Callable[..., object], *arguments: object) -> str:
    try:
        call(*arguments)
    except grpc.RpcError as error:
        return f"{error.code().name} {error.details()}"
    return "OK"


def ask_info(address: str, credentials: grpc.ChannelCredentials | None) -> worker_pb.GetWorkerInfoResponse:
    with channel_to(address, credentials) as channel:
        return WorkerServiceStub(channel).GetWorkerInfo(worker_pb.GetWorkerInfoRequest(), timeout=5)


def open_handoff(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    with channel_to(address, credentials) as channel:
        opening = handoff_pb.HandoffRequest(open=handoff_pb.Open(handoff_id=secrets.token_bytes(16)))
        for _ in HandoffServiceStub(channel).Handoff(iter([opening]), timeout=5):
            return


def channel_to(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, options=FRESH)
    return grpc.secure_channel(address, credentials, options=(*OVERRIDE, *FRESH))


def knock(port: int, authority: Authority, pair: tuple[Path, Path] | None, patience: float = 15.0) -> str:
    """Connect to the KV port by TLS and return how that ends: b'' and errors are refusals."""
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    if pair is not None:
        context.load_cert_chain(*pair)
    try:
        raw = socket.create_connection(("127.0.0.1", port), 5)
        with raw, context.wrap_socket(raw, server_hostname=PEER_NAME) as sock:
            sock.settimeout(patience)
            return "closed" if sock.recv(1) == b"" else "talks"
    except TimeoutError:
        return "waits"  # for our Hello: we are in
    except OSError as error:
        return type(error).__name__


def test_strangers_are_refused_at_every_port_and_harm_nobody(secured: Secured, oracle: Oracle, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")

    def shown(pair: tuple[bytes, bytes] | None) -> grpc.ChannelCredentials:
        chain, key = pair or (None, None)
        return grpc.ssl_channel_credentials(secured.pods.ca, key, chain)

    ours = shown(secured.pods.issue(PEER_NAME))
    handoffs = ask_info(secured.prefill.address, ours).info.handoff_address
    assert handoffs not in ("", secured.prefill.address)
    named = shown(secured.pods.issue("somebody"))
    foreign = [None, shown(None), shown(other.issue(PEER_NAME))]
    with Load(secured, oracle) as load:
        for address in (secured.prefill.address, secured.decode.address):
            assert status_of(ask_info, address, ours) == "OK"
            answer = status_of(ask_info, address, named)
            assert answer == f"PERMISSION_DENIED your certificate is for somebody, not for {PEER_NAME}"
            for credentials in foreign:
                answer = status_of(ask_info, address, credentials)
                assert answer.startswith("UNAVAILABLE")
        assert not status_of(open_handoff, handoffs, ours).startswith(("UNAVAILABLE", "PERMISSION"))
        assert status_of(open_handoff, handoffs, named).startswith("PERMISSION_DENIED")
        assert all(status_of(open_handoff, handoffs, c).startswith("UNAVAILABLE") for c in foreign)
        assert knock(secured.kv_port, secured.pods, secured.pods.write("good", PEER_NAME), 0.5) == "waits"
        assert knock(secured.kv_port, secured.pods, secured.pods.write("named", "somebody")) not in ("waits", "talks")
        assert knock(secured.kv_port, secured.pods, other.write("foreign", PEER_NAME)) not in ("waits", "talks")
        assert knock(secured.kv_port, secured.pods, None) not in ("waits", "talks")
        stub = InferenceServiceStub(grpc.insecure_channel(secured.gateway.address))
        assert status_of(lambda: stub.ListModels(pb.ListModelsRequest(), timeout=5)).startswith("UNAVAILABLE")
        load.wait_answers(6)
    load.check()
    assert secured.decode.worker_metric("local_prefills") == 0
    assert "its certificate is for somebody" in secured.prefill.log()
    assert "a KV connection from 127.0.0.1 is refused" in secured.prefill.log()


def test_a_gateway_without_a_certificate_gets_no_session(secured: Secured, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    for tls in (None, other.pod()):
        program = Program(
            "gateway",
            tmp_path,
            *("--model.path", str(secured.service.checkpoint)),
            *("--gateway.decode", secured.decode.address),
            *(flags(tls) if tls is not None else []),
        )
        secured.service.programs.append(program)
        program.wait_ready()
        reason = "it closes the connection: it may want TLS" if tls is None else "not from the authorities that we know"
        secured.wait_logged(f"no session with worker {secured.decode.address}", (program,))
        secured.wait_logged(reason, (program,))


# ---- changes --------------------------------------------------------------------------------------------------------


def test_rotation_under_load_loses_nothing(secured: Secured, oracle: Oracle, tmp_path: Path) -> None:
    """A new authority, in the three steps that docs/security.md gives: trust both, show the new one, trust the new."""
    certificate, key, authorities = secured.pod_files
    successor = Authority(tmp_path / "successor")
    told = f"{certificate} was read again"
    with Load(secured, oracle) as load:
        load.wait_answers(3)
        authorities.write_bytes(secured.pods.ca + successor.ca)
        secured.wait_logged(told, secured.programs, 1)
        chain, secret = successor.issue(PEER_NAME)
        key.write_bytes(secret)
        certificate.write_bytes(chain)
        secured.wait_logged(told, secured.programs, 2)
        authorities.write_bytes(successor.ca)
        secured.wait_logged(told, secured.programs, 3)
        secured.clients.gateway()
        secured.wait_logged("gateway.crt was read again", (secured.gateway,), 1)
        load.wait_answers(6)
    load.check()
    old = grpc.ssl_channel_credentials(secured.pods.ca, *reversed(secured.pods.issue(PEER_NAME)))
    assert status_of(ask_info, secured.decode.address, old).startswith("UNAVAILABLE")
    new = grpc.ssl_channel_credentials(successor.ca, *reversed(successor.issue(PEER_NAME)))
    assert status_of(ask_info, secured.decode.address, new) == "OK"
    assert secured.decode.worker_metric("local_prefills") == 0


def test_a_broken_new_file_keeps_the_old(secured: Secured, oracle: Oracle) -> None:
    certificate, key, _ = secured.pod_files
    whole = key.read_bytes()
    key.write_bytes(whole[:100])
    gateway_key = certificate.parent.parent / "clients" / "gateway.key"
    gateway_whole = gateway_key.read_bytes()
    gateway_key.write_bytes(b"")
    secured.wait_logged(f"stays in use: tls.peer_key_file {key}", secured.programs)
    secured.wait_logged(f"stays in use: tls.key_file {gateway_key}", (secured.gateway,))
    prompt = random_prompt(random.Random(7), 150)
    oracle.check(prompt, secured.ask_anew(prompt), 8)
    assert all(program.log().count("stays in use: tls.peer_key_file") <= 2 for program in secured.programs)
    key.write_bytes(whole)
    gateway_key.write_bytes(gateway_whole)
    oracle.check(prompt, secured.ask_anew(prompt), 8)


def test_a_program_does_not_start_with_a_broken_file(service: Service, tmp_path: Path) -> None:
    tls = Authority(tmp_path / "pods").pod()
    Path(tls.peer_ca_file).write_bytes(b"nothing")
    for program in (service.worker("decode", *flags(tls)), service.worker("prefill", *flags(tls))):
        assert program.process.wait(60) == 2
        assert f"tls.peer_ca_file {tls.peer_ca_file}: there is no whole PEM certificate in it" in program.log()
