"""What huge pages bring: a decode step and a prompt, with them and without, in turns. Prints milliseconds and ratios.

    python bench/huge_pages.py --model DIR [--rounds 7]

Two processes hold the model; one of them has told the kernel that it wants no huge pages, and takes no reserved ones.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from tandem.config import CacheConfig, Config, ModelConfig
from tandem.engine.bench_plans import TimedPlans
from tandem.engine.start import start_engine

PR_SET_THP_DISABLE = 41
POOL_BYTES = 64 << 20
CONTEXT, PROMPT, STEPS = 512, 512, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", choices=("with", "without"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return serve(given)
    children = {name: spawn(given, name) for name in ("with", "without")}
    rounds = []
    for number in range(given.rounds):
        order = ("with", "without") if number % 2 else ("without", "with")
        rounds.append({name: ask(children[name]) for name in order})
    for child in children.values():
        child.communicate()
    for what in rounds[0]["with"]:
        medians = {name: statistics.median(each[name][what] for each in rounds) for name in children}
        ratio = statistics.median(each["with"][what] / each["without"][what] for each in rounds)
        shown = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians.items())
        print(f"{what}: {shown}, ratio {ratio:.3f}")
    return 0


def spawn(given: argparse.Namespace, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--model", given.model, "--threads", str(given.threads), "--child", name]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ask(child)  # warm
    return child


def ask(child: subprocess.Popen[str]) -> dict[str, float]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    reply: dict[str, float] = json.loads(child.stdout.readline())
    return reply


def serve(given: argparse.Namespace) -> int:
    if given.child == "without" and ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise SystemExit("this kernel does not turn huge pages off for a process")
    model = ModelConfig(path=given.model, device="cpu", threads=given.threads)
    cache = CacheConfig(pool_bytes=POOL_BYTES, huge_pages="off" if given.child == "without" else "auto")
    engine = start_engine(Config(model=model, cache=cache), lambda text: None)
    plans = TimedPlans(engine)
    steps: list[Any] = [plans.decode_rows(1, CONTEXT)]
    for _ in sys.stdin:
        decode = statistics.median(plans.seconds(steps) for _ in range(STEPS))
        prefill = plans.seconds([[row] for row in plans.prompt_rows(1, PROMPT)])
        print(json.dumps({f"decode step at {CONTEXT}": decode, f"prompt of {PROMPT}": prefill}), flush=True)
    engine.device.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
