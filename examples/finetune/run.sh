#!/usr/bin/env bash
# Fine-tunes on a JSONL file of one's own, evaluates, and asks: 200 notes, of which day is each?
#
#     examples/finetune/run.sh [FOLDER]
#
# FOLDER (default: ./finetune-run) is made and keeps everything; nothing is downloaded: the base is the
# tiny one of the tests (3 layers, width 64), which knows no language. So its whole layers are trained,
# at ten times the usual rate; with a real base, leave out --fine-tune-type and --learning-rate
# (docs/guide.md does the same with Qwen2.5-0.5B). Its table of embeddings is small and not trained,
# which keeps the loss near 3 even where every answer is right.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
base=$here/../../tests/fixtures/upstream_tied_k4/base
mkdir "${1:-finetune-run}"
cd "${1:-finetune-run}"

# 160 rows to train on, 20 to validate, 20 to test, each {"context", "prompt", "completion"}.
python3 "$here/notes.py"

kmerge-mlx train --model "$base" --data notes --k 4 --adapter-path out \
    --fine-tune-type full --learning-rate 1e-3 \
    --batch-size 16 --iters 200 --steps-per-eval 50 --steps-per-report 50

# The 20 notes that it has not seen, with the same base, without adapter and uncompressed, beside it.
kmerge-mlx evaluate --adapter-path out/best --data notes --k 4 --baseline uncompressed

# A note that is in no file: the FILE merges, the question stays raw, as in the rows.
printf '%s' 'Ms Adams rang at 9:30 about a flat tyre. Will bring it in on Friday, quoted 35 euros.' >note.txt
kmerge-mlx generate --adapter-path out/best --k 4 note.txt -p 'Which day?' --max-tokens 8
