"""The command `tandem`. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.

Every subcommand imports what it needs when it runs: `tandem --help` is quick, and no torch is loaded but in a rank.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import get_args

from tandem.cli.bench import add_bench
from tandem.cli.client_options import add_client_options
from tandem.cli.lora_options import add_lora
from tandem.config import LoopName, TransportChoice
from tandem.config_load import PROGRAM_SECTIONS
from tandem.errors import ConfigError

_SIZES = {
    "tensor": "ranks that share every layer",
    "pipeline": "stages that share the layers",
    "data": "copies of the model behind one address",
    "expert": "ranks that share the experts",
}
_EPILOG = """\
one program alone (each has its own --help with every setting):
  gateway | prefill | decode | unified

examples:
  tandem demo                                   see it work, in less than half a minute
  tandem up                                     the built-in demo model, 1 prefill + 1 decode
  tandem up --model Qwen/Qwen3-0.6B --decode 2  a model from the Hugging Face hub
  tandem generate "def fibonacci(n):"           ask what `tandem up` serves
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    try:
        if name in PROGRAM_SECTIONS:
            from tandem.cli.programs import run

            return run(name, words[1:], os.environ)
        if name == "loops":
            from tandem.cli import loops

            return loops.run(words[1:], os.environ)
        arguments = _parser().parse_args(words or ["--help"])
        return int(arguments.run(arguments))
    except ConfigError as error:
        for fault in error.message.splitlines():
            print(f"tandem {name}: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem",
        description="Serves large language models with prefill and decode on separate workers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_up(commands)
    _add_demo(commands)
    generate = commands.add_parser("generate", help="continue a text, with a running gateway")
    generate.add_argument("--token-ids", default="", metavar="N,N", help="a prompt of token ids instead of a text")
    add_client_options(generate)
    generate.set_defaults(run=_run_generate)
    chat = commands.add_parser("chat", help="answer a message, with a running gateway")
    chat.add_argument("--system", default="", help="system message before it")
    add_client_options(chat)
    chat.set_defaults(run=_run_chat)
    doctor = commands.add_parser("doctor", help="what this machine has, what is lost without the rest, how to get it")
    doctor.set_defaults(run=_run_doctor)
    commands.add_parser("loops", help="the event loops, and which one a configuration selects")
    add_lora(commands)
    add_bench(commands)
    return parser


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = commands.add_parser("up", help="start a gateway and workers on this machine; Ctrl-C stops them")
    up.add_argument("--model", default="demo", help="checkpoint folder, hub id, or demo (default)")
    up.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers (default 1; 0: none)")
    up.add_argument("--decode", type=int, default=1, metavar="M", help="decode workers (default 1)")
    up.add_argument("--unified", type=int, nargs="?", const=1, metavar="N", help="N unified workers instead of both")
    _add_transport_and_loop(up)
    up.add_argument("--prefill-loop", choices=get_args(LoopName), help="loop of the prefill workers only")
    up.add_argument("--decode-loop", choices=get_args(LoopName), help="loop of the decode and unified workers only")
    for size, meaning in _SIZES.items():
        up.add_argument(f"--{size}-size", metavar="N", help=f"{meaning} (parallel.{size}_size of every worker)")
    up.add_argument("--port", type=int, default=50051, help="port of the gateway (default 50051; 0: any free one)")
    up.add_argument("--config", default="", metavar="FILE", help="settings file for all programs")
    up.add_argument("--verbose", action="store_true", help="show all log lines of the programs")
    up.set_defaults(run=_run_up)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="start all, stream one answer of the demo model, say how, stop")
    demo.add_argument("--prompt", default="", help="Python code to continue")
    demo.add_argument("--max-tokens", type=int, default=64, help="length of the answer (default 64)")
    _add_transport_and_loop(demo)
    demo.add_argument("--verbose", action="store_true", help="show all log lines of the programs")
    demo.set_defaults(run=_run_demo)


def _add_transport_and_loop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transport", choices=get_args(TransportChoice), default="auto", help="what moves KV pages")
    parser.add_argument("--loop", choices=get_args(LoopName), default="auto", help="event loop of the workers")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="a setting for all")


def _run_up(arguments: argparse.Namespace) -> int:
    from tandem.cli.up import up

    return asyncio.run(up(arguments))


def _run_demo(arguments: argparse.Namespace) -> int:
    from tandem.cli.demo import demo

    return asyncio.run(demo(arguments))


def _run_generate(arguments: argparse.Namespace) -> int:
    from tandem.cli.client import generate

    return asyncio.run(generate(arguments))


def _run_chat(arguments: argparse.Namespace) -> int:
    from tandem.cli.client import chat

    return asyncio.run(chat(arguments))


def _run_doctor(arguments: argparse.Namespace) -> int:
    from tandem.cli.doctor import report

    lines, code = report()
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
