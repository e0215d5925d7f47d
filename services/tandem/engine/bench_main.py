"""The process behind `tandem bench`: `python -m tandem.engine.bench_main KIND REQUEST`, started by the command line.

REQUEST is the JSON of the kind's request. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from tandem.engine.bench_engine import EngineBenchRequest, bench_engine
from tandem.engine.bench_model import MakeModelRequest, make_model
from tandem.engine.bench_table import write_report
from tandem.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; 0 done, 2 if it was asked for what this machine or checkpoint cannot do."""
    kind, text = argv
    try:
        if kind == "make-model":
            make_model(msgspec.json.decode(text, type=MakeModelRequest), say)
        else:
            request = msgspec.json.decode(text, type=EngineBenchRequest)
            write_report(bench_engine(request, say), request.json_path)
    except ConfigError as error:
        for fault in error.message.splitlines():
            print(f"tandem bench {kind}: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 1
    return 0


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
