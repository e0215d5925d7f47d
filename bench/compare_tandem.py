"""Tandem's process of bench/compare.py: the real device, prompts in plans of their own as the scheduler makes them."""

from __future__ import annotations

from typing import Any

from compare_protocol import Setup, serve

from tandem.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from tandem.engine.bench_limits import Probes, describe_machine, work_of
from tandem.engine.bench_plans import TimedPlans, pages_needed
from tandem.engine.location import locate_checkpoint
from tandem.engine.models.spec import read_spec
from tandem.engine.pool import MIN_PAGES
from tandem.engine.start import start_engine
from tandem.transfer.layout import DTYPE_BYTES

PAGE_TOKENS = CacheConfig().page_tokens


class TandemEngine:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        combinations = [(batch, setup.prompt_tokens) for batch in setup.prefill_batches]
        combinations += [(batch, setup.context + setup.steps) for batch in setup.decode_batches]
        num_pages = max(MIN_PAGES, *(pages_needed(batch, tokens, PAGE_TOKENS) for batch, tokens in combinations))
        self._engine = start_engine(self._config(num_pages), lambda text: print(text, flush=True))
        self._plans = TimedPlans(self._engine)
        self._probes = Probes(self._engine.operators, self._engine.layout.dtype, setup.threads)
        self.version = f"{self._engine.operators}, {self._engine.layout.dtype} weights"

    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        return self._plans.execute([[row] for row in self._plans.rows_of(prompts)])

    def decode(self, batch: int) -> list[float]:
        steps = [self._plans.decode_rows(batch, self._setup.context + step + 1) for step in range(self._setup.steps)]
        return [self._plans.seconds([rows]) for rows in steps]

    def machine(self) -> dict[str, Any]:
        """The processor, and the matrix rates of its instruction sets."""
        machine = describe_machine(self._setup.threads)
        return {
            "cpu": machine.cpu,
            "flags": list(machine.flags),
            "matrix_rates": self._probes.matrix_rates(),
            "weight_bytes": self._engine.weight_bytes,
            "architecture": self._engine.spec.architecture,
        }

    def limits(self) -> dict[str, Any]:
        """Read bandwidth and matrix rate of just now, and the floors that follow from them, in seconds."""
        rates = self._probes.measure()
        itemsize = DTYPE_BYTES[self._engine.layout.dtype]
        floors = {}
        for batch in self._setup.prefill_batches:
            rows = self._plans.prompt_rows(batch, self._setup.prompt_tokens)
            floors[f"prefill {batch}"] = sum(
                rates.floor_seconds(work_of(self._engine.spec, [row], itemsize)) for row in rows
            )
        for batch in self._setup.decode_batches:
            rows = self._plans.decode_rows(batch, self._setup.context)
            floors[f"decode {batch}"] = rates.floor_seconds(work_of(self._engine.spec, rows, itemsize))
        return {"read": rates.read, "multiply": rates.multiply, "floors": floors}

    def _config(self, num_pages: int) -> Config:
        setup = self._setup
        model = ModelConfig(path=setup.model, threads=setup.threads, device="cpu", ops=setup.options["ops"])
        most = max(*setup.prefill_batches, *setup.decode_batches)
        spec = read_spec(locate_checkpoint(model, print).folder)
        itemsize = DTYPE_BYTES["float32" if spec.dtype == "float32" else "bfloat16"]
        page_bytes = itemsize * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * PAGE_TOKENS
        return Config(
            model=model,
            cache=CacheConfig(pool_bytes=num_pages * page_bytes),
            scheduler=SchedulerConfig(max_running_requests=most),
        )


if __name__ == "__main__":
    serve(TandemEngine)
