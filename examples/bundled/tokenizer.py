"""The bundled model's tokenizer: bytes, and one token for each phrase of a textualized tree.

    python examples/bundled/tokenizer.py FOLDER

Owns: the vocabulary and the tokenizer folder. Does not know the model or its training.

Every letter is a token of its own: the two letters of a name are compared one by one (names as 676
whole tokens were learned at half the speed). So a node takes four tokens, "++", "A", "B" and the
end of its line; "Tree: " stands in the place of the root's depth. Questions are cut so that their
names, too, are the second and third of four. At K=4 a block is then a node or a name, and the same
name looks the same in both; at K=2 a name straddles two blocks. Whatever else is written falls
back to its bytes: every text round-trips, in Unicode's composed form (NFC), to which every Qwen2
tokenizer brings it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kmerge_mlx.files import write_json

MAX_DEPTH = 12
EOS = "<|endoftext|>"
TREE, CHILD, ANSWER = "Tree: ", ", Child", ", Answer: "
TASKS = (", Task: Parent/Child Relationship", f", Task: Find Parent{CHILD}")
PHRASES = (
    *("+" * depth for depth in range(1, MAX_DEPTH + 1)),
    TREE,
    *TASKS,
    ", Parent: ",
    CHILD,
    ": ",
    ANSWER,
    "true",
    "false",
)


def build() -> Tokenizer:
    """The tokenizer: 256 bytes, the phrases, the end of the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    # transformers 5 loads the tokenizer of any Qwen2 model as a Qwen2Tokenizer, which normalizes so
    # whatever this file says; then it had better say so.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # In a sequence of one, so that mlx-lm streams with its plain detokenizer: the one that it
    # chooses for a bare ByteLevel drops a text's first space and misspells the byte 0.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    # Ordinary tokens, not special ones: decoding shows them.
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return tokenizer


def save(folder: Path) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json into a folder.

    Returns:
        The tokenizer.
    """
    tokenizer = build()
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/bundled/tokenizer.py FOLDER")
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(f"{save(target).get_vocab_size()} tokens in {target}")
