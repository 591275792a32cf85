"""English prompts, and a text to score.

The prompts are the beginnings of topics of Python's own reference (`pydoc_data.topics` of the
standard library), some with the start of another in common, and a few chats. The text is the
Apache License, which lies in this repository.
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tests.harness.provenance import ROOT

TEXT_TOKENS = 2000
# (topic, tokens): lengths around blocks of 32, and past the budget of a step (256).
PROMPTS = (
    ("assert", 10), ("bltin-null-object", 16), ("break", 17), ("continue", 31), ("del", 32),
    ("global", 33), ("if", 50), ("lambda", 64), ("pass", 75), ("return", 100), ("while", 128),
    ("integers", 150), ("exceptions", 200), ("for", 256), ("slicings", 257), ("booleans", 333),
    ("class", 400), ("with", 512), ("objects", 640), ("naming", 800),
)  # fmt: skip
# (topic, tokens, another topic, tokens): the first tokens are in the cache by then.
SHARED = (("naming", 416, "while", 40), ("naming", 500, "for", 20), ("objects", 257, "if", 0))
CHATS = ("What is the capital of France?", "Write a haiku about the sea.", "What is 12 plus 30?")
# The first chat's answer has to name this.
CAPITAL = "Paris"
# Index of the first chat among the prompts.
CHAT = len(PROMPTS) + len(SHARED)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def load_tokenizer(checkpoint: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of every prompt."""
    found = [_first(tokenizer, topics[topic], count) for topic, count in PROMPTS]
    for topic, count, other, more in SHARED:
        start = _first(tokenizer, topics[topic], count)
        found.append(start + _first(tokenizer, topics[other], more))
    for question in CHATS:
        said = (("system", SYSTEM), ("user", question))
        chat = "".join(f"<|im_start|>{who}\n{what}<|im_end|>\n" for who, what in said)
        found.append(tokenizer.encode(f"{chat}<|im_start|>assistant\n").ids)
    return found


def text(tokenizer: Any) -> list[int]:
    """Token ids of the text."""
    return _first(tokenizer, (ROOT / "LICENSE").read_text(), TEXT_TOKENS)


def _first(tokenizer: Any, content: str, count: int) -> list[int]:
    ids: list[int] = tokenizer.encode(content).ids[:count]
    if len(ids) < count:
        raise ValueError(f"text of {len(ids)} tokens, {content[:40]!r}: expected {count}")
    return ids
