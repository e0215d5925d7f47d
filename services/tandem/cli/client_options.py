"""The options that `tandem generate` and `tandem chat` share. Light: imported by every `tandem`."""

from __future__ import annotations

import argparse

DEFAULT_ADDRESS = "127.0.0.1:50051"  # where `tandem up` puts its gateway


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument("text", nargs="?", help="what to send; left out: read from stdin")
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help=f"gateway, host:port (default {DEFAULT_ADDRESS})")
    add_tls_options(parser)
    parser.add_argument("--model", default="", help="name of a served model; left out: the only one")
    parser.add_argument("--adapter", default="", metavar="NAME", help="LoRA adapter; left out: the model as it is")
    parser.add_argument("--max-tokens", type=int, help="longest answer; left out: the gateway's default")
    parser.add_argument("--temperature", type=float, help="0 is greedy; left out: the model's default")
    parser.add_argument("--top-p", type=float, help="left out: the model's default")
    parser.add_argument("--seed", type=int, help="makes a sampled answer repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of the request")
    parser.add_argument("--stats", action="store_true", help="show TTFT, TPOT, KV and token ids on stderr")


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """Add what a gateway with TLS asks of its clients."""
    parser.add_argument("--tls", action="store_true", help="the gateway has TLS; any of the next four says so as well")
    parser.add_argument("--tls-ca-file", default="", metavar="FILE", help="PEM authorities; left out: the public ones")
    parser.add_argument("--tls-server-name", default="", metavar="NAME", help="name in its certificate, if not ADDRESS")
    parser.add_argument("--tls-certificate-file", default="", metavar="FILE", help="PEM chain to show to the gateway")
    parser.add_argument("--tls-key-file", default="", metavar="FILE", help="PEM key of that certificate")
