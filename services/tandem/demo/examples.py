"""Prompts with known answers: what greedy decoding of the demo model must give, in whatever way it is served.

`python -m tandem.demo.examples` writes examples.json again, which is needed after training.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.demo import examples_path, model_path

LENGTH = 28  # tokens of an answer
MARGIN = 0.15  # the least lead of a chosen token's logit, so that rounding decides nothing

PROMPTS = (
    "class Foo(object):\n    def __init__(self",
    "import os\n\nclass Point:\n    def __eq__(self, other",
    "import os\nimport sys\n\n\ndef read(path):\n    with open(path",
)


@dataclass(frozen=True)
class Example:
    """A prompt and its greedy answer; `margin` is the smallest lead of a token of the answer over the next best."""

    prompt: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    margin: float


def load() -> list[Example]:
    """The examples that come with the package."""
    return [Example(**entry) for entry in json.loads(examples_path().read_text(encoding="utf-8"))]


def reference(folder: Path, prompts: tuple[str, ...], length: int = LENGTH) -> list[Example]:
    """Greedy answers by transformers in float32, reading the whole sequence again for every token."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples: list[Example] = []
    for prompt in prompts:
        start: list[int] = tokenizer.encode(prompt).ids
        ids, margin = list(start), float("inf")
        for _ in range(length):
            with torch.inference_mode():
                logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            best = logits.topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
        answer = ids[len(start) :]
        examples.append(Example(prompt, start, answer, tokenizer.decode(answer), round(margin, 3)))
    return examples


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tandem.demo.examples", description=__doc__)
    parser.add_argument("--out", type=Path, default=examples_path(), help="file to write (default: in the package)")
    out: Path = parser.parse_args().out
    examples = reference(model_path(), PROMPTS)
    for example in examples:
        print(f"--- least margin {example.margin}\n{example.prompt}|{example.text}")
    close = [example.prompt for example in examples if example.margin <= MARGIN]
    if close:
        raise SystemExit(f"nothing written: near-ties after {close}; choose other prompts")
    out.write_text(json.dumps([asdict(example) for example in examples], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
