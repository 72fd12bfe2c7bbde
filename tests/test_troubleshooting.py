"""docs/troubleshooting.md has every message that the package can raise, and no other.

What counts as a message: ``tests/messages.py``. The page's entries are what stands in backticks in
the first column of its tables, with ``...`` for what varies. An entry covers a message if its
constant pieces stand in the message in that order, the first of them at the beginning unless the
entry begins with ``...``; the end is free. So one entry may cover a family. An entry says at least
two words of its own, so that none covers everything. ``PARTS`` are texts that are never seen alone.
"""

from __future__ import annotations

import re

from tests.messages import ROOT, messages

PAGE = ROOT / "docs" / "troubleshooting.md"
PARTS = {
    "the base in ...",
    "the encoder has",
    "lm_head's LoRA has",
    "expected ... for its tensors",
    "..., expected at most ... times as many",
    "save the state dict in PyTorch: torch.save(model.state_dict(), new_path)",
    "save that dictionary alone: torch.save(torch.load(path, weights_only=True)[{}], new_path)",
    "a device or a pipe",
    "give the file itself",
    "..., expected pairs for a dict",
    "..., expected only _metadata",
    "expected only those of a state dict",
    "save only its tensors in PyTorch: torch.save(model.state_dict(), new_path)",
    "save tensor.contiguous()",
    "... of ... bytes",
    "re-save it in PyTorch, which stores without compression or a password",
    "damaged, or saved after torch.serialization.set_crc32_options(False)",
    "merge encoder",
    "no key",
    "no answer",
    "no prompt",
    "it is left out",
    "Tree: ..., Task: Find Parent, Child: ..., Answer: ",
    "Tree: ..., Task: Parent/Child Relationship, Parent: ..., Child: ..., Answer: ",
    "... tokens, depth ...%",
    "a few minutes",
    "cannot read",
    "cannot write",
    "full fine-tuning",
    "the base model",
    "the adapter",
    "an adapter for K = 1, which has none",
    "no adapter",
    "a whole number",
    "the model",
    "an object",
    "true or false",
    "a whole number of ... to ...",
    "up to ... texts of 1 to ... characters",
    "textualized-tree, ... tree ...",
    "the save of iteration ... is whole",
    "one of ...",
    "bytes, such as 4GB",
    "the embedding table",
    "re-save it in PyTorch: torch.save(torch.load(path, weights_only=True), new_path)",
    "a Git LFS pointer",
    "fetch the file itself: git lfs pull",
    "decompress it first",
    "gzip data",
    "a tar, perhaps by PyTorch before 0.1.10",
    "the format of PyTorch before 1.6",
    "a bare pickle",
    "save it as float32",
    "save two real tensors",
    "save it as float16",
    "save its dequantize()",
    "save its to_dense()",
}


def entries() -> list[str]:
    """What stands in backticks in the first column of the page's tables."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", row)[1] for row in rows]
    return [entry for cell in cells for entry in re.findall(r"`([^`]+)`", cell)]


def covers(entry: str, text: str) -> bool:
    """Whether the entry's pieces stand in the text, in order and from its beginning."""
    pattern = ".*".join(re.escape(piece) for piece in entry.split("..."))
    return re.match(pattern, text, re.DOTALL) is not None


def test_every_message_has_an_entry_on_the_page():
    listed = entries()
    missing = sorted(
        f"{message.place}: {message.text}"
        for message in messages()
        if message.text not in PARTS and not any(covers(entry, message.text) for entry in listed)
    )
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_every_part_that_needs_no_entry_is_still_in_the_source():
    assert PARTS - {message.text for message in messages()} == set()


def test_an_entry_says_enough_to_be_searched_for():
    short = [entry for entry in entries() if len(re.findall(r"\w+", entry)) < 2]
    assert short == []


def test_every_entry_on_the_page_is_still_a_message():
    texts = {message.text for message in messages()} - PARTS
    stale = [entry for entry in entries() if not any(covers(entry, text) for text in texts)]
    assert not stale, "no message of the package is:\n" + "\n".join(stale)
