"""`tandem bench loops`: the loops `normal`, `overlap` and, with stages, `pipelined` in turns, on the same load.

The scheduler, the device and the loop are the worker's own; the ports are in memory, so that nothing but the loops
differs and no pipe is measured. A load is what a worker of one role computes: prompts and answers, prompts only, or
answers only; it keeps `concurrency` requests alive: whoever ends makes room for the next. Normal and overlap share an
engine, the stages of pipelined have processes of their own.
Run by the command line as `python -m tandem.worker.bench_loops loops REQUEST`, REQUEST being JSON.
"""

from __future__ import annotations

import json
import random
import secrets
import select
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec

from tandem.config import CacheConfig, Config, ModelConfig, OperatorChoice, ParallelConfig, Role, SchedulerConfig
from tandem.core.messages.requests import Drain, Ended, EndReason, Submit, Tokens
from tandem.core.messages.sampling import SamplingParams
from tandem.core.roles import Loop, Pacing, loop_of
from tandem.core.scheduler import TOKEN_BYTES, Scheduler
from tandem.core.settings import SchedulerSettings
from tandem.core.token_ids import BYTES_PER_TOKEN, pack
from tandem.engine.device import Device
from tandem.engine.start import Engine, start_engine
from tandem.errors import ConfigError, TandemError
from tandem.worker.chores import Chores
from tandem.worker.follower_process import Follower
from tandem.worker.leader import LOCAL_HOST, start_ranks
from tandem.worker.loop import run

LOOPS: tuple[Pacing, ...] = ("normal", "overlap")
_WHAT: dict[Role, str] = {"unified": "prompts and answers", "prefill": "prompts only", "decode": "answers only"}
_POOL_BYTES = 1 << 30
_SHORTEST = 0.5  # of the longest prompt and answer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopsRequest:
    """`prompt_tokens` and `max_tokens` are the longest; lengths are drawn from half of that up.

    `roles`: whose part of the work is done. Prefill draws one token a prompt; decode's prompts have one token.
    """

    model: str
    ops: OperatorChoice = "auto"
    num_threads: int = 0
    requests: int = 24
    concurrency: int = 8
    prompt_tokens: int = 128
    max_tokens: int = 32
    rounds: int = 3
    json_path: str = ""
    roles: tuple[Role, ...] = ("unified",)
    stages: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One pass of the load through one loop; seconds. `host_seconds`: the loop's thread outside of its wait."""

    loop: Pacing
    wall_seconds: float
    device_seconds: float
    host_seconds: float
    output_tokens: int
    ttft: tuple[float, ...]
    itl: tuple[float, ...]
    outputs: tuple[tuple[int, ...], ...]
    role: Role = "unified"
    prompt_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of answers; where there are only prompts, of those."""
        return (self.prompt_tokens if self.role == "prefill" else self.output_tokens) / self.wall_seconds

    @property
    def idle_share(self) -> float:
        """The part of the time in which the device computed nothing."""
        return 1.0 - self.device_seconds / self.wall_seconds


class MemoryPorts:
    """Ports that end at a load in this process. Notes when every token came out."""

    def __init__(self, device: Device, load: Sequence[Submit], concurrency: int) -> None:
        self._device = device
        self._waiting = deque(load)
        self._events: deque[object] = deque()
        self._running = 0
        self._submitted: dict[int, float] = {}
        self.arrivals: dict[int, list[float]] = {submit.request_id: [] for submit in load}
        self.outputs: dict[int, list[int]] = {submit.request_id: [] for submit in load}
        self.waited_seconds = 0.0
        for _ in range(min(concurrency, len(load))):
            self._submit_next()

    def wait(self, until: float | None) -> list[object]:
        began = time.monotonic()
        seconds = None if until is None else max(0.0, until - began)
        ready, _, _ = select.select([self._device], [], [], 0.0 if self._events else seconds)
        ended = time.monotonic()
        self.waited_seconds += ended - began
        events = list(self._events)
        self._events.clear()
        for event in events:
            if isinstance(event, Submit):
                self._submitted[event.request_id] = ended
        return events + (list(self._device.resolved()) if ready else [])

    def flush(self, effects: list[object]) -> None:
        now = time.monotonic()
        for effect in effects:
            if isinstance(effect, Tokens):
                self.arrivals[effect.request_id] += [now] * len(effect.token_ids)
                self.outputs[effect.request_id] += effect.token_ids
            elif isinstance(effect, Ended):
                if effect.reason is not EndReason.LENGTH:
                    raise TandemError(f"a request ended {effect.reason.value}: {effect.message}")
                self._running -= 1
                self._submit_next()

    def ttft(self) -> list[float]:
        return [times[0] - self._submitted[number] for number, times in self.arrivals.items()]

    def itl(self) -> list[float]:
        return [after - before for times in self.arrivals.values() for before, after in pairwise(times)]

    def _submit_next(self) -> None:
        if self._waiting:
            self._running += 1
            self._events.append(self._waiting.popleft())
        elif not self._running:
            self._events.append(Drain())


def make_load(request: LoopsRequest, vocab_size: int, role: Role = "unified", seed: int = 0) -> list[Submit]:
    """Random prompts; equal for equal requests."""
    generator = random.Random(seed)
    load = []
    for number in range(request.requests):
        prompt_tokens = generator.randint(max(1, int(request.prompt_tokens * _SHORTEST)), request.prompt_tokens)
        max_tokens = generator.randint(max(1, int(request.max_tokens * _SHORTEST)), request.max_tokens)
        prompt_tokens = 1 if role == "decode" else prompt_tokens
        max_tokens = 1 if role == "prefill" else max_tokens
        prompt = pack(generator.randrange(vocab_size) for _ in range(prompt_tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        load.append(Submit(request_id=number + 1, prompt_token_ids=prompt, sampling=sampling))
    return load


@dataclass(frozen=True, slots=True)
class Lane:
    """A loop and the engine that it runs on."""

    loop: Loop
    engine: Engine


def run_round(lane: Lane, load: Sequence[Submit], concurrency: int, role: Role = "unified") -> Round:
    """Serve the load with a scheduler of its own; the device and its pool stay."""
    loop, engine = lane.loop, lane.engine
    settings = SchedulerSettings(
        role="unified",
        chain=loop.chain,
        stages=loop.stages,
        num_pages=engine.layout.num_pages,
        page_tokens=engine.layout.page_tokens,
        max_context_tokens=engine.spec.max_context_tokens,
        vocab_size=engine.spec.vocab_size,
        scheduler=SchedulerConfig(max_running_requests=concurrency),
    )
    scheduler = Scheduler(settings, lambda: secrets.token_bytes(TOKEN_BYTES))
    ports = MemoryPorts(engine.device, load, concurrency)
    chores = Chores(lambda message: None, time.monotonic)
    began = time.monotonic()
    run(scheduler, engine.device, ports, time.monotonic, loop.depth, chores)
    wall = time.monotonic() - began
    return Round(
        loop=loop.pacing,
        wall_seconds=wall,
        device_seconds=scheduler.load(time.monotonic()).device_seconds,
        host_seconds=wall - ports.waited_seconds,
        output_tokens=sum(map(len, ports.outputs.values())),
        ttft=tuple(ports.ttft()),
        itl=tuple(ports.itl()),
        outputs=tuple(map(tuple, ports.outputs.values())),
        role=role,
        prompt_tokens=sum(len(submit.prompt_token_ids) for submit in load) // BYTES_PER_TOKEN,
    )


def bench_loops(request: LoopsRequest, progress: Callable[[str], None]) -> list[Round]:
    """Run the rounds in turns, after one of each that is not counted. Raises ConfigError as the engine's start does."""
    config = Config(
        model=ModelConfig(path=request.model, ops=request.ops, threads=request.num_threads, device="cpu"),
        cache=CacheConfig(pool_bytes_max=_POOL_BYTES),
        scheduler=SchedulerConfig(max_running_requests=request.concurrency),
    )
    lanes = start_lanes(config, request.stages, progress)
    try:
        engine = lanes[0].engine
        most = min(engine.spec.max_context_tokens, engine.layout.num_pages * engine.layout.page_tokens)
        if request.prompt_tokens + request.max_tokens > most:
            raise ConfigError(f"--prompt-tokens: prompt and answer exceed the {most} tokens that fit")
        rounds = []
        for role in request.roles:
            load = make_load(request, engine.spec.vocab_size, role)
            for number in range(request.rounds + 1):
                for lane in lanes:
                    what = f"round {number} of {request.rounds}" if number else "warming up"
                    progress(f"{_WHAT[role]}: {what}, {lane.loop.pacing}")
                    done = run_round(lane, load, request.concurrency, role)
                    rounds += [done] if number else []
        return rounds
    finally:
        for device in {id(lane.engine): lane.engine.device for lane in lanes}.values():
            device.close()


def start_lanes(config: Config, stages: int, progress: Callable[[str], None]) -> list[Lane]:
    """Start what runs the loops. Pipelined ranks get as many compute threads in all as the one engine has."""
    engine = start_engine(config, progress)
    lanes = [Lane(loop_of("unified", pacing), engine) for pacing in LOOPS]
    if stages > 1:
        try:
            parted = replace(config, parallel=ParallelConfig(pipeline_size=stages))
            followers = [Follower.spawn(rank) for rank in range(1, stages)]
            ranks = start_ranks("unified", parted, LOCAL_HOST, followers, progress)
        except BaseException:
            engine.device.close()
            raise
        lanes.append(Lane(loop_of("unified", "pipelined", stages), ranks.engine))
    return lanes


def summary_of(rounds: Sequence[Round]) -> dict[str, object]:
    """Medians of each loop over one role's rounds, and how they compare. `ideal`: with all host work overlapped."""
    by_loop = {loop: [one for one in rounds if one.loop == loop] for loop in dict.fromkeys(one.loop for one in rounds)}
    normal = by_loop["normal"]
    ideals = [(one.device_seconds + one.host_seconds) / max(one.device_seconds, one.host_seconds) for one in normal]
    ratios = {
        f"{loop}_over_normal": statistics.median(
            one.tokens_per_second / other.tokens_per_second for one, other in zip(found, normal, strict=True)
        )
        for loop, found in by_loop.items()
        if loop != "normal"
    }
    return {
        "loops": {loop: _figures(found) for loop, found in by_loop.items()},
        **ratios,
        "ideal": statistics.median(ideals),
        "same_tokens": len({one.outputs for one in rounds}) == 1,
    }


def _figures(rounds: Sequence[Round]) -> dict[str, float]:
    ttft = sorted(value for one in rounds for value in one.ttft)
    itl = sorted(value for one in rounds for value in one.itl) or [0.0]
    return {
        "tokens_per_second": statistics.median(one.tokens_per_second for one in rounds),
        "device_idle_share": statistics.median(one.idle_share for one in rounds),
        "host_seconds_share": statistics.median(one.host_seconds / one.wall_seconds for one in rounds),
        "ttft_p50": _quantile(ttft, 0.5),
        "ttft_p99": _quantile(ttft, 0.99),
        "itl_p50": _quantile(itl, 0.5),
        "itl_p99": _quantile(itl, 0.99),
    }


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def lines_of(summary: dict[str, object]) -> list[str]:
    """The summary as a table."""
    loops = summary["loops"]
    assert isinstance(loops, dict)
    lines = [
        f"{'loop':<11}{'tokens/s':>10}{'device idle':>13}{'host':>8}"
        f"{'TTFT p50':>12}{'p99':>10}{'ITL p50':>12}{'p99 ms':>10}"
    ]
    for loop, found in loops.items():
        times = [found[name] * 1e3 for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")]
        lines.append(
            f"{loop:<11}{found['tokens_per_second']:>10.1f}{found['device_idle_share']:>13.1%}"
            f"{found['host_seconds_share']:>8.1%}{times[0]:>12.1f}{times[1]:>10.1f}{times[2]:>12.2f}{times[3]:>10.2f}"
        )
    lines += [
        "",
        f"overlap / normal: {summary['overlap_over_normal']:.3f} of the tokens/s; "
        f"ideal {summary['ideal']:.3f} = (device + host) / max(device, host)",
        *(
            [f"pipelined / normal: {summary['pipelined_over_normal']:.3f} of the tokens/s"]
            if "pipelined_over_normal" in summary
            else []
        ),
        "tokens of all rounds: " + ("equal" if summary["same_tokens"] else "NOT equal"),
    ]
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0 done, 2 if it was asked for what cannot be."""
    request = msgspec.json.decode(argv[1], type=LoopsRequest)
    try:
        rounds = bench_loops(request, lambda text: print(text, file=sys.stderr, flush=True))
    except ConfigError as error:
        print(f"tandem bench loops: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 1
    summaries = {role: summary_of([one for one in rounds if one.role == role]) for role in request.roles}
    for role, summary in summaries.items():
        print("\n".join([f"{role}: {_WHAT[role]}", *lines_of(summary), ""]))
    if request.json_path:
        content = {"roles": summaries, "rounds": [{**asdict(one), "outputs": None} for one in rounds]}
        Path(request.json_path).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
