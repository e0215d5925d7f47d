"""`tandem demo`: a prefill worker, a decode worker and a gateway on this machine, one answer, and how it came about."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from tandem.cli.client import ask, statistics
from tandem.cli.cluster import Cluster, Shape, interrupted_or
from tandem.cli.launch import ChildDied
from tandem.cli.up import parse_settings, show, transport_lines
from tandem.errors import ConfigError, TandemError
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as inference_pb2
from tandem.worker.lifespan import StopSignals

POOL_BYTES = 256 << 20
PROMPT = '''import os
import sys


def read_lines(path, encoding="utf-8"):
    """Return the lines of a file.

    Blank lines and comments are skipped.
    """
    lines = []
    with open(path, encoding=encoding) as f:
        for line in f:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
'''


async def demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration and return the exit code."""
    faults: list[str] = []
    settings = parse_settings(arguments.set, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    shape = Shape(
        transport=arguments.transport,
        prefill_loop=arguments.loop,
        decode_loop=arguments.loop,
        port=0,
        settings=(("cache.pool_bytes", str(POOL_BYTES)), *settings),
    )
    cluster = Cluster(shape, show, arguments.verbose)
    with StopSignals() as stop:
        try:
            running = asyncio.ensure_future(_run(cluster, arguments))
            if await interrupted_or(running, stop.asked):
                running.cancel()
                return 0
            running.result()
            return 0
        except ChildDied as error:
            print(f"tandem demo: {error}", file=sys.stderr)
            return error.exit_code
        except TandemError as error:
            print(f"tandem demo: the answer failed: {error.message}", file=sys.stderr)
        finally:
            await cluster.stop()
    return 1


async def _run(cluster: Cluster, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    print("Starting a gateway, a prefill worker and a decode worker on this machine", file=sys.stderr, flush=True)
    await cluster.start()
    print(
        f"All three serve after {time.monotonic() - began:.1f} s. The built-in model continues this code:\n", flush=True
    )
    prompt = arguments.prompt or PROMPT
    request = inference_pb2.GenerateRequest(
        text=prompt,
        # A model of a few million parameters repeats itself when it is greedy; this draw does not.
        sampling=inference_pb2.SamplingParams(
            max_tokens=arguments.max_tokens, temperature=0.5, frequency_penalty=0.2, seed=6
        ),
        output=inference_pb2.OutputOptions(return_timing=True),
    )

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write(_dim(prompt))
    answer = await ask(cluster.gateway_address, request, write, timeout_seconds=60.0)
    loops = ", ".join(worker["loop"] for worker in cluster.workers)
    print("\n\nHow it came about:")
    for line in [*statistics(answer), f"loops       {loops}", *transport_lines(cluster.workers)[1:]]:
        print(f"  {line}")
    print("\nNext: `tandem up` stays up; `tandem --help` shows the rest.", flush=True)


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text
