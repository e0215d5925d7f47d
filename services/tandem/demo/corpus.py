"""What the demo model reads: the Python standard library, and the byte-level BPE tokenizer trained on it."""

from __future__ import annotations

import ast
import hashlib
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING)  # ids 0 and 1
VOCABULARY = 4096

# Folders that hold no code worth reading: installed packages, tables, generated files, deliberately odd sources.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "lib2to3", "idle_test", "encodings", "__pycache__", "lib-dynload", "pydoc_data"}
    | {"data", "cjkencodings", "encoded_modules", "tokenizedata", "crashers", "leakers", "_bundled"}
)
_SKIPPED_FILES = frozenset({"entities.py", "stringprep.py"})  # tables
_MAX_TEST_BYTES = 60_000  # tests outweigh the library: take the smaller ones
_MAX_BYTES = 250_000
_MIN_BYTES = 200
_MIN_LETTERS = 0.45  # share of letters among the characters that are not blank; tables of numbers have far fewer

# How text is cut before merging: words with one leading mark or blank, up to three digits, runs of marks, line ends.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as recent models do
)


@dataclass(frozen=True)
class Document:
    """One text, named by its path inside the standard library."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the text is kept for validation; decided by the name alone, about one in a hundred."""
        return hashlib.sha256(self.name.encode()).digest()[0] < 3


def normalise(text: str) -> str:
    """Spaces for tabs, plain line ends, nothing at the end of a line, exactly one line end at the end."""
    lines = (line.rstrip() for line in text.expandtabs(4).splitlines())
    return "\n".join(lines).strip("\n") + "\n"


def collect() -> list[Document]:
    """Every text of the corpus once, in a fixed order."""
    seen: set[bytes] = set()
    documents: list[Document] = []
    for document in (*_sources(Path(sysconfig.get_path("stdlib"))), *_topics()):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            documents.append(document)
    return documents


def _sources(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        # The build's own settings (_sysconfigdata, config-*) name folders of the machine that built Python.
        generated = inside.name.startswith("_sysconfigdata") or inside.parts[0].startswith("config-")
        if generated or inside.name in _SKIPPED_FILES or not _SKIPPED_FOLDERS.isdisjoint(inside.parts):
            continue
        limit = _MAX_TEST_BYTES if {"test", "tests"} & set(inside.parts) else _MAX_BYTES
        if not _MIN_BYTES <= path.stat().st_size <= limit or "bad" in inside.stem:
            continue
        try:
            text = normalise(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if _is_code(text):
            yield Document(inside.as_posix(), text)


def _is_code(text: str) -> bool:
    printed = [character for character in text if not character.isspace()]
    if not printed or sum(map(str.isalpha, printed)) < _MIN_LETTERS * len(printed):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _topics() -> Iterator[Document]:
    """The chapters of the language reference that `help()` shows."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", normalise(text))


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """A byte-level BPE tokenizer: it can write any text, and decoding gives back exactly what was encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer=trainer)
    return tokenizer
