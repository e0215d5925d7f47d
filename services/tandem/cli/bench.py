"""`tandem bench`: made models, the engine beside the machine's limits, the event loops beside each other.

Nothing is measured in this process: each benchmark runs in one of its own, which may load torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any, get_args

from tandem.cli.bench_shapes import SHAPES
from tandem.config import CacheConfig, OperatorChoice, Role
from tandem.errors import ConfigError

_ENGINE_PROGRAM, _LOOPS_PROGRAM = "tandem.engine.bench_main", "tandem.worker.bench_loops"
_COUNT_MAX = 1 << 24
_MOST = {"pool_bytes": 1 << 44, "page_tokens": CacheConfig.__dataclass_fields__["page_tokens"].metadata["high"]}


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its kinds."""
    bench = commands.add_parser("bench", help="benchmarks; ratios within one run are what counts")
    kinds = bench.add_subparsers(title="benchmarks", metavar="KIND", required=True)
    _add_make_model(kinds)
    _add_engine(kinds)
    _add_loops(kinds)


def _add_make_model(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    make = kinds.add_parser("make-model", help="write a checkpoint with random weights in the shape of a known model")
    make.add_argument("--shape", choices=tuple(SHAPES), required=True, help="whose shape")
    make.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    make.add_argument("--layers", type=int, default=0, help="only so many of its layers (default: all)")
    make.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default bfloat16)")
    make.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    make.set_defaults(run=_run_make_model)


def _add_engine(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    engine = kinds.add_parser("engine", help="prefill rate and decode step time beside the limits of this machine")
    _add_model(engine)
    engine.add_argument("--batches", default="1,8,32", metavar="N,N", help="decode batches (default 1,8,32)")
    engine.add_argument("--contexts", default="512,8192,32768", metavar="N,N", help="(default 512,8192,32768)")
    engine.add_argument("--prompt-tokens", type=int, default=1024, help="length of prefill's prompts (default 1024)")
    engine.add_argument("--pool-bytes", type=int, default=0, help="KV pool (default: what is needed, if it is there)")
    engine.add_argument(
        "--page-tokens",
        type=int,
        default=CacheConfig().page_tokens,
        help=f"tokens in a page of it (default {CacheConfig().page_tokens})",
    )
    engine.add_argument("--cell-seconds", type=float, default=20.0, help="bound of one combination (default 20)")
    engine.add_argument("--profile", action="store_true", help="some more steps that say where the time goes")
    engine.add_argument("--json", default="", metavar="FILE", help="write the result there as well")
    engine.set_defaults(run=_run_engine)


def _add_loops(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    loops = kinds.add_parser("loops", help="the same load through the loops normal and overlap, in turns")
    _add_model(loops)
    loops.add_argument("--requests", type=int, default=24, help="in a round (default 24)")
    loops.add_argument("--concurrency", type=int, default=8, help="requests at once (default 8)")
    loops.add_argument("--prompt-tokens", type=int, default=128, help="longest prompt (default 128)")
    loops.add_argument("--max-tokens", type=int, default=32, help="longest answer (default 32)")
    loops.add_argument(
        "--roles",
        default="unified",
        metavar="ROLE,ROLE",
        help="whose work: unified, prefill (prompts), decode (answers)",
    )
    loops.add_argument("--stages", type=int, default=1, help="more than 1: the pipelined loop, too (default 1)")
    loops.add_argument("--rounds", type=int, default=3, help="of each loop (default 3)")
    loops.add_argument("--json", default="", metavar="FILE", help="write the result there as well")
    loops.set_defaults(run=_run_loops)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id, or demo (default)")
    parser.add_argument("--ops", choices=get_args(OperatorChoice), default="auto", help="operators (default auto)")
    parser.add_argument("--threads", type=int, default=0, help="compute threads (default: the CPUs of this process)")


def _run_make_model(arguments: argparse.Namespace) -> int:
    _check_counts(arguments, least=0, names=("seed", "layers"))
    shape = SHAPES[arguments.shape]
    request = {
        "config": {**shape, "num_hidden_layers": arguments.layers or shape["num_hidden_layers"]},
        "folder": arguments.out,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
    }
    return _run(_ENGINE_PROGRAM, "make-model", request)


def _run_engine(arguments: argparse.Namespace) -> int:
    _check_counts(arguments, least=0, names=("threads", "pool_bytes"))
    _check_counts(arguments, least=1, names=("prompt_tokens", "page_tokens", "cell_seconds"))
    request = {
        **_model_of(arguments),
        "batches": _numbers(arguments.batches, "--batches"),
        "contexts": _numbers(arguments.contexts, "--contexts"),
        "prompt_tokens": arguments.prompt_tokens,
        "pool_bytes": arguments.pool_bytes,
        "page_tokens": arguments.page_tokens,
        "cell_seconds": arguments.cell_seconds,
        "profile": arguments.profile,
    }
    return _run(_ENGINE_PROGRAM, "engine", request)


def _run_loops(arguments: argparse.Namespace) -> int:
    names = ("requests", "concurrency", "prompt_tokens", "max_tokens", "rounds", "stages")
    _check_counts(arguments, least=0, names=("threads",))
    _check_counts(arguments, least=1, names=names)
    roles = [role for role in arguments.roles.split(",") if role]
    if not roles or any(role not in get_args(Role) for role in roles):
        raise ConfigError(f"--roles: {arguments.roles!r} is no list of {', '.join(get_args(Role))}")
    counts = {name: getattr(arguments, name) for name in names}
    return _run(_LOOPS_PROGRAM, "loops", {**_model_of(arguments), **counts, "roles": roles})


def _model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "ops": arguments.ops,
        "num_threads": arguments.threads,
        "json_path": arguments.json,
    }


def _check_counts(arguments: argparse.Namespace, *, least: int, names: tuple[str, ...]) -> None:
    for name in names:
        most = _MOST.get(name, _COUNT_MAX)
        if not least <= getattr(arguments, name) <= most:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is not in [{least}, {most}]")


def _numbers(text: str, flag: str) -> list[int]:
    words = [word for word in text.split(",") if word]
    if not words or not all(word.isdecimal() and 0 < int(word) <= _COUNT_MAX for word in words):
        raise ConfigError(f"{flag}: {text!r} is no list of positive numbers with commas between")
    return [int(word) for word in words]


def _run(program: str, kind: str, request: dict[str, Any]) -> int:
    """Run a benchmark in a process of its own, whose output is ours. Ctrl-C reaches both."""
    process = subprocess.Popen([sys.executable, "-m", program, kind, json.dumps(request)])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
