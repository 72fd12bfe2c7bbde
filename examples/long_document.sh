#!/usr/bin/env bash
# A long document is read once, merged, and asked three questions that stay raw.
#
#     examples/long_document.sh
#
# The document is a tree of 60 names and the reader the bundled model, so nothing is downloaded. That
# model was trained on trees of up to 20 names, merged together with their question, so it may be
# wrong here: the right answer stands beside each of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

kmerge-mlx data textualized-tree --stage x3large --max-nodes 60 --find-parent 3 \
    --train 0 --valid 0 --test 1 --out trees
python3 - <<'PYTHON'
import json

task = ", Task: Find Parent"
rows = [row for row in map(json.loads, open("trees/test.jsonl")) if task in row["prompt"]]
with open("document.txt", "w") as document, open("questions.txt", "w") as questions:
    document.write(rows[0]["prompt"].split(task)[0])
    for row in rows:
        print(row["completion"], task + row["prompt"].split(task)[1], sep="\t", file=questions)
PYTHON

# The document is read here, once: N tokens in N/4 positions, whose KV cache the file keeps.
kmerge-mlx cache document.txt --model bundled --k 4 --prompt-cache-file document.safetensors

# Each question begins where the document ended; its own tokens are all that is read.
while IFS=$'\t' read -r right question; do
    kmerge-mlx generate --prompt-cache-file document.safetensors -p "$question" --max-tokens 4 >answer.txt
    echo "$question$(cat answer.txt) (right: $right)"
done <questions.txt
