"""`tandem bench engine`: prefill rate and decode step time of the real device, beside this machine's limits.

Every repetition probes the limits next to what it measures: on a shared machine only such ratios mean something. The
time of a cell is bounded; what does not fit into the pool, the context or the time is left out, and the report says
so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.config import CacheConfig, Config, ModelConfig, OperatorChoice, SchedulerConfig
from tandem.core.messages.plans import Row
from tandem.engine.bench_limits import Machine, Probes, Rates, Work, describe_machine, part_works, work_of
from tandem.engine.bench_plans import PROMPT_TOKENS, TimedPlans, pages_needed
from tandem.engine.bench_profile import StepProfile, StepProfiler
from tandem.engine.host import available_memory_bytes, usable_cpus
from tandem.engine.location import locate_checkpoint
from tandem.engine.models.spec import DecoderSpec, read_spec
from tandem.engine.models.tensors import expected_bytes
from tandem.engine.pool import MIN_PAGES
from tandem.engine.start import Engine, start_engine
from tandem.transfer.layout import DTYPE_BYTES, KvLayout

PREFILL_BATCHES = (1, 4)
_REPETITIONS_MAX = 9
_STEPS_SECONDS = 0.25  # of decode steps between two probes
_STEPS_MAX = 16
_PROFILE_SHARE = 0.25  # of a combination's time, in addition to it
_CPU_MEMORY_SHARE = 0.5  # of what the weights leave


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBenchRequest:
    """`cell_seconds` bounds one combination; `pool_bytes` 0: what the combinations need, if there is the memory.

    `profile`: run each combination some more times to see where its time goes.
    """

    model: str
    ops: OperatorChoice = "auto"
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (512, 8192, 32768)
    prompt_tokens: int = PROMPT_TOKENS
    num_threads: int = 0
    pool_bytes: int = 0
    page_tokens: int = CacheConfig().page_tokens
    cell_seconds: float = 20.0
    profile: bool = False
    json_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination. Medians; `ratio_to_floor` is the median of ratios to the floor probed beside each time.

    `parts_floor_seconds` is the sum of the floors of linears, output head, experts and attention. They run one after
    another, so a step can reach this, and the floor only where all parts have the same bound.
    """

    batch: int
    context: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    floor_seconds: float
    ratio_to_floor: float
    parts_floor_seconds: float
    ratio_to_parts_floor: float
    bound: str
    repetitions: int
    profile: StepProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """`matrix_rates`: operations a second by instruction set. `skipped`: what was left out, and why."""

    model: str
    architecture: str
    dtype: str
    operators: str
    numerics: str
    machine: Machine
    limits_from: str
    read_bytes_per_second: float
    matrix_rates: dict[str, float]
    weight_bytes: int
    page_tokens: int
    prefill: tuple[Cell, ...]
    decode: tuple[Cell, ...]
    skipped: tuple[str, ...]


def bench_engine(request: EngineBenchRequest, progress: Callable[[str], None]) -> EngineReport:
    """Start the engine, measure, stop it. Raises ConfigError for a checkpoint or operators that cannot run here."""
    num_threads = request.num_threads or usable_cpus()
    model = ModelConfig(path=request.model, ops=request.ops, threads=num_threads, device="cpu")
    folder = locate_checkpoint(model, progress).folder
    spec = read_spec(folder)
    pool_bytes = request.pool_bytes or _pool_bytes(request, spec)
    config = Config(
        model=model,
        cache=CacheConfig(pool_bytes=pool_bytes, page_tokens=request.page_tokens),
        scheduler=SchedulerConfig(max_running_requests=max(*request.batches, *PREFILL_BATCHES)),
    )
    engine = start_engine(config, progress)
    try:
        return _measure(request, engine, folder, num_threads, progress)
    finally:
        engine.device.close()


def _pool_bytes(request: EngineBenchRequest, spec: DecoderSpec) -> int:
    """What the largest combination needs, as far as the memory goes."""
    page_tokens = request.page_tokens
    itemsize = DTYPE_BYTES["float32" if spec.dtype == "float32" else "bfloat16"]
    page_bytes = itemsize * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * page_tokens
    combinations = [(batch, context) for batch in request.batches for context in request.contexts]
    combinations += [(batch, request.prompt_tokens) for batch in PREFILL_BATCHES]
    wanted = sorted(pages_needed(batch, tokens, page_tokens) * page_bytes for batch, tokens in combinations)
    # Packing keeps the weights a second time while they are read.
    spare = available_memory_bytes() - 2 * expected_bytes(spec, itemsize)
    fitting = [num_bytes for num_bytes in wanted if num_bytes <= spare * _CPU_MEMORY_SHARE]
    return max(fitting[-1] if fitting else 0, MIN_PAGES * page_bytes)


def _measure(
    request: EngineBenchRequest, engine: Engine, folder: Path, num_threads: int, progress: Callable[[str], None]
) -> EngineReport:
    layout, spec = engine.layout, engine.spec
    probes = Probes(engine.operators, layout.dtype, num_threads)
    progress(f"filling {layout.pool_bytes / 1e9:.2f} GB of KV pool")
    plans = TimedPlans(engine)
    profiler = None
    if request.profile and engine.profiler is not None:
        profiler = StepProfiler(engine.profiler, plans, probes, _PROFILE_SHARE * request.cell_seconds)
    cells = _Cells(engine, plans, probes, profiler, request.cell_seconds, progress)
    if request.profile and profiler is None:
        cells.skip("profile", f"operators {engine.operators} cannot tell where their time goes")
    for batch in PREFILL_BATCHES:
        cells.prefill(batch, request.prompt_tokens)
    for context in request.contexts:
        for batch in request.batches:
            cells.decode(batch, context)
    reads = [probes.measure().read for _ in range(3)]
    return EngineReport(
        model=folder.name,
        architecture=spec.architecture,
        dtype=layout.dtype,
        operators=engine.operators,
        numerics=engine.numerics,
        machine=describe_machine(num_threads),
        limits_from=probes.source,
        read_bytes_per_second=statistics.median([*reads, *cells.reads]),
        matrix_rates=probes.matrix_rates(),
        weight_bytes=engine.weight_bytes,
        page_tokens=layout.page_tokens,
        prefill=tuple(cells.prefills),
        decode=tuple(cells.decodes),
        skipped=tuple(cells.skipped),
    )


class _Cells:
    """Measures one combination after another, and learns from each how long the next may take."""

    def __init__(
        self,
        engine: Engine,
        plans: TimedPlans,
        probes: Probes,
        profiler: StepProfiler | None,
        seconds_max: float,
        progress: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._plans = plans
        self._probes = probes
        self._profiler = profiler
        self._seconds_max = seconds_max
        self._progress = progress
        self.prefills: list[Cell] = []
        self.decodes: list[Cell] = []
        self.skipped: list[str] = []
        self.reads: list[float] = []

    def prefill(self, batch: int, prompt_tokens: int) -> None:
        """Measure prompts, one plan each: that is how the scheduler's token budget makes them."""
        name = f"prefill of {batch} x {prompt_tokens}"
        if self._fits(name, batch, prompt_tokens):
            rows = self._plans.prompt_rows(batch, prompt_tokens)
            self._cell(name, [[row] for row in rows], batch, 0, 1, self.prefills)

    def decode(self, batch: int, context: int) -> None:
        """Measure steps of `batch` requests that have `context` tokens each, the new one included."""
        name = f"decode of {batch} at {context}"
        if self._fits(name, batch, context):
            self._cell(name, [self._plans.decode_rows(batch, context)], batch, context, _STEPS_MAX, self.decodes)

    def _fits(self, name: str, batch: int, num_tokens: int) -> bool:
        layout, context_max = self._engine.layout, self._engine.spec.max_context_tokens
        needed = pages_needed(batch, num_tokens, layout.page_tokens)
        if num_tokens > context_max:
            self.skip(name, f"the model's context is {context_max}")
        elif needed > layout.num_pages:
            self.skip(name, f"{needed * layout.page_bytes / 1e9:.1f} GB of KV, the pool has {_gigabytes(layout)}")
        else:
            return True
        return False

    def _cell(
        self, name: str, plans: Sequence[Sequence[Row]], batch: int, context: int, steps_max: int, cells: list[Cell]
    ) -> None:
        self._progress(name)
        itemsize = DTYPE_BYTES[self._engine.layout.dtype]
        works = [work_of(self._engine.spec, rows, itemsize) for rows in plans]
        parts = [part_works(self._engine.spec, rows, itemsize) for rows in plans]
        slowest = max((cell.ratio_to_floor for cell in cells), default=1.0)
        rates = self._probes.measure()
        guess = slowest * sum(rates.floor_seconds(work) for work in works)
        if guess > self._seconds_max:
            self.skip(name, f"would take about {guess:.0f} s, more than {self._seconds_max:g} s")
            return
        first = self._plans.seconds(plans)  # memory and threads warm up
        steps = max(1, min(steps_max, int(_STEPS_SECONDS / first)))
        times, floors, part_floors = self._repeat(plans, works, parts, first, steps)
        seconds = statistics.median(times)
        num_tokens = sum(row.num_tokens for rows in plans for row in rows)
        cell = Cell(
            batch=batch,
            context=context,
            num_tokens=num_tokens,
            seconds=seconds,
            tokens_per_second=num_tokens / seconds,
            floor_seconds=statistics.median(floors),
            ratio_to_floor=_median_ratio(times, floors),
            parts_floor_seconds=statistics.median(part_floors),
            ratio_to_parts_floor=_median_ratio(times, part_floors),
            bound=rates.bound(works[0]),
            repetitions=len(times) * steps,
            profile=None if self._profiler is None else self._profiler.profile(plans, parts, seconds),
        )
        cells.append(cell)

    def _repeat(
        self,
        plans: Sequence[Sequence[Row]],
        works: Sequence[Work],
        parts: Sequence[dict[str, Work]],
        first: float,
        steps: int,
    ) -> tuple[list[float], list[float], list[float]]:
        """Times of one step; the floor and the sum of the parts' floors at the limits probed before and after each."""
        times: list[float] = []
        floors: list[float] = []
        part_floors: list[float] = []
        spent = first
        before = self._probes.measure()
        while len(times) < _REPETITIONS_MAX and (spent + first * steps <= self._seconds_max or not times):
            times.append(statistics.median(self._plans.seconds(plans) for _ in range(steps)))
            after = self._probes.measure()
            floors.append(sum((before.floor_seconds(work) + after.floor_seconds(work)) / 2 for work in works))
            part_floors.append((_parts_floor(before, parts) + _parts_floor(after, parts)) / 2)
            spent += times[-1] * steps
            self.reads += [after.read]
            before = after
        return times, floors, part_floors

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name}: {reason}")
        self._progress(f"{name}: left out: {reason}")


def _parts_floor(rates: Rates, parts: Sequence[dict[str, Work]]) -> float:
    return sum(sum(rates.part_floors(works).values()) for works in parts)


def _median_ratio(times: Sequence[float], floors: Sequence[float]) -> float:
    return statistics.median(time / floor for time, floor in zip(times, floors, strict=True))


def _gigabytes(layout: KvLayout) -> str:
    return f"{layout.pool_bytes / 1e9:.1f} GB"
