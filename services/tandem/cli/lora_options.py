"""The options of `tandem lora`. Light: imported by every `tandem`."""

from __future__ import annotations

import argparse

from tandem.cli.client_options import add_tls_options

_EXAMPLES = """\
FILE has one example a line: {"text": "..."}, or {"prompt": "...", "completion": "..."} where only the completion is
learned. The worker needs --server.admin on and --lora.folder DIR, where the adapter is saved in PEFT format; it is
served by its name as soon as it is trained. Ctrl-C cancels the training. docs/lora.md has the rest.
"""


def add_lora(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `tandem lora train|cancel|load`."""
    lora = commands.add_parser("lora", help="train a LoRA adapter on a running worker, or load one")
    deeds = lora.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = deeds.add_parser(
        "train",
        help="train an adapter on a JSONL file, in the gaps of a running unified or prefill worker",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("file", metavar="FILE", help="JSONL file with the examples")
    _add_worker(train, "name of the adapter: letters, digits and ._-")
    train.add_argument("--rank", type=int, help="rank of the products (default 8)")
    train.add_argument("--alpha", type=float, help="their scale is alpha / rank (default twice the rank)")
    train.add_argument("--rslora", action="store_true", help="their scale is alpha / sqrt(rank)")
    train.add_argument("--targets", default="", metavar="A,B", help="linears, e.g. q_proj,v_proj (default: all seven)")
    train.add_argument("--learning-rate", type=float, metavar="X", help="of AdamW (default 0.0002)")
    train.add_argument("--epochs", type=int, metavar="N", help="how often each example is seen (default 1)")
    train.add_argument("--batch-size", type=int, metavar="N", help="examples of one step (default 4)")
    train.add_argument("--max-sequence-tokens", type=int, metavar="N", help="cut of an example (default: the worker's)")
    train.add_argument("--seed", type=int, default=0, help="of the start and of the order (default 0)")
    train.set_defaults(run=_train)
    cancel = deeds.add_parser("cancel", help="end the training under way")
    _add_worker(cancel, "only if it trains this adapter", required=False)
    cancel.set_defaults(run=_cancel)
    load = deeds.add_parser("load", help="serve an adapter of the worker's lora.folder, or what is in its place now")
    _add_worker(load, "name of the adapter, which is that of its folder")
    load.set_defaults(run=_load)


def _add_worker(parser: argparse.ArgumentParser, name_help: str, *, required: bool = True) -> None:
    parser.add_argument("--worker", required=True, metavar="HOST:PORT", help="the worker's gRPC address")
    parser.add_argument("--name", required=required, default="", help=name_help)
    add_tls_options(parser)


def _train(arguments: argparse.Namespace) -> int:
    from tandem.cli.lora import train

    return train(arguments)


def _cancel(arguments: argparse.Namespace) -> int:
    from tandem.cli.lora import cancel

    return cancel(arguments)


def _load(arguments: argparse.Namespace) -> int:
    from tandem.cli.lora import load

    return load(arguments)
