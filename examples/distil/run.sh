#!/usr/bin/env bash
# Self-distillation without labels: what the uncompressed base says is what is learnt.
#
#     examples/distil/run.sh [FOLDER]
#
# FOLDER (default: ./distil-run) is made and keeps everything; nothing is downloaded. The bundled
# adapter was trained on trees merged together with their question. Here it learns to read a merged
# tree and a raw question, from such prompts alone: the base writes their answers and its
# distributions are the target. Printed last: KL(base || compressed), before and after.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir "${1:-distil-run}"
cd "${1:-distil-run}"

kmerge-mlx data textualized-tree --stage large --max-nodes 15 --find-parent 4 --questions-per-tree 2 \
    --train 60 --valid 8 --test 0 --out trees
python3 "$here/prompts.py" trees prompts

kmerge-mlx train --model bundled --init-from bundled --data prompts --k 4 --adapter-path out \
    --teacher base --teacher-answers --teacher-max-tokens 4 \
    --batch-size 8 --iters 40 --steps-per-eval 20 --steps-per-report 20 --val-batches -1

python3 - <<'PYTHON'
import json

rows = [row for row in map(json.loads, open("out/training/log.jsonl")) if "val_kl" in row]
best = min(rows, key=lambda row: row["val_kl"])
for when, row in (("before", rows[0]), (f"after {best['iteration']} iterations", best)):
    print(f"{when}: KL {row['val_kl']:.3f} nats a token, {row['val_accuracy']:.0%} of the base's answers")
PYTHON
