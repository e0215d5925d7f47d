"""`tandem up`: a whole Tandem on this machine, for as long as it is wanted."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

from tandem.cli.cluster import Cluster, Shape, interrupted_or
from tandem.cli.launch import ChildDied, first_death
from tandem.config_values import SETTINGS, convert, suggestion
from tandem.errors import ConfigError, TandemError
from tandem.worker.lifespan import StopSignals


def shape_of(arguments: argparse.Namespace) -> Shape:
    """Return what the command line asks for; raises ConfigError with every fault."""
    faults: list[str] = []
    if arguments.unified is not None:
        counts = (0, 0, arguments.unified)
    else:
        counts = (arguments.prefill, arguments.decode, 0)
        if arguments.decode < 1:
            faults.append("--decode must be at least 1: decode workers own the requests")
    if min(counts) < 0 or sum(counts) < 1:
        faults.append("the numbers of workers must not be negative, and one must be there")
    settings = parse_settings([*_sizes(arguments), *arguments.set], faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return Shape(
        model=arguments.model,
        num_prefill=counts[0],
        num_decode=counts[1],
        num_unified=counts[2],
        transport=arguments.transport,
        prefill_loop=arguments.prefill_loop or arguments.loop,
        decode_loop=arguments.decode_loop or arguments.loop,
        port=arguments.port,
        settings=settings,
        config_file=arguments.config,
    )


def _sizes(arguments: argparse.Namespace) -> list[str]:
    """Return what --tensor-size and its like say, as settings; --set has the last word."""
    names = [setting.field.name for setting in SETTINGS.values() if setting.section == "parallel"]
    given = {name: getattr(arguments, name, None) for name in names}
    return [f"parallel.{name}={value}" for name, value in given.items() if value is not None]


def parse_settings(texts: Sequence[str], faults: list[str]) -> tuple[tuple[str, str], ...]:
    """Return the settings of `--set section.field=value`; what is wrong is added to `faults`."""
    settings = []
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in SETTINGS:
            faults.append(f"--set {text}: no such setting, write section.field=value{suggestion(key, SETTINGS)}")
            continue
        try:
            convert(SETTINGS[key], value, typed=False)
        except ValueError as error:
            faults.append(f"--set {text}: {error}")
        settings.append((key, value))
    return tuple(settings)


async def up(arguments: argparse.Namespace) -> int:
    """Start everything, say how to use it, and wait for Ctrl-C or a death."""
    began = time.monotonic()
    cluster = Cluster(shape_of(arguments), show, arguments.verbose)
    with StopSignals() as stop:
        try:
            starting = asyncio.ensure_future(cluster.start())
            if await interrupted_or(starting, stop.asked):
                starting.cancel()
                return 0
            starting.result()
            print(summary(cluster, time.monotonic() - began), flush=True)
            death = asyncio.ensure_future(first_death(cluster.children))
            if await interrupted_or(death, stop.asked):
                print("stopping", file=sys.stderr)
                return 0
            print(f"tandem up: {death.result()}; stopping the rest", file=sys.stderr)
            return 1
        except ChildDied as error:
            print(f"tandem up: {error}", file=sys.stderr)
            return error.exit_code
        except TandemError as error:
            print(f"tandem up: {error.message}", file=sys.stderr)
            return 1
        finally:
            await cluster.stop()


def show(name: str, line: str) -> None:
    """Show a line about a child."""
    print(f"  {name:<11} {line}", file=sys.stderr, flush=True)


def summary(cluster: Cluster, seconds: float) -> str:
    """Return what there is now, and the commands to try next."""
    lines = [f"Tandem is up after {seconds:.1f} s: {cluster.workers[0]['model']}", ""]
    lines.append(f"  {'program':<11}{'address':<23}{'loop':<18}{'KV tokens':<11}{'longest prompt':<16}transports")
    lines.append(f"  {'gateway':<11}{cluster.gateway_address}")
    lines += [_row(worker) for worker in cluster.workers]
    lines += transport_lines(cluster.workers)
    address = cluster.gateway_address
    where = "" if address == "127.0.0.1:50051" else f" --address {address}"
    lines += [
        "",
        "Try:",
        f'  tandem generate{where} "def fibonacci(n):"',
        f'  tandem chat{where} "import os"',
        f"  grpcurl -plaintext {address} list",
        "",
        "Ctrl-C stops everything.",
    ]
    return "\n".join(lines)


def _row(worker: dict[str, Any]) -> str:
    copies = f" x{worker['data_size']}" if worker["data_size"] > 1 else ""
    num_tokens = worker["num_pages"] * worker["page_tokens"]
    return (
        f"  {worker['program'] + copies:<11}{worker['address']:<23}{worker['loop']:<18}"
        f"{num_tokens:<11}{worker['max_req_input_len']:<16}{', '.join(worker['transports']) or '-'}"
    )


def transport_lines(workers: list[dict[str, Any]]) -> list[str]:
    """Return which transport a pair will use, and why not another."""
    exported = [worker["transports"] for worker in workers if worker["program"] == "prefill"]
    imported = [worker["transports"] for worker in workers if worker["program"] == "decode"]
    if not exported or not imported:
        return ["", "KV transport: none, every prompt is computed where it is decoded"]
    shared = [name for name in imported[0] if all(name in names for names in (*exported, *imported))]
    lines = ["", f"KV transport: {shared[0] if shared else 'none in common: prompts are computed on decode'}"]
    notes = dict.fromkeys(note for worker in workers for note in worker["transport_notes"])
    return [*lines, *(f"  {note}" for note in notes)]
