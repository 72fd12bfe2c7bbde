#!/bin/sh
# Makes the bundled model from nothing: the base, then an adapter for each K. Go on after a stop by the same command.
#
#     examples/bundled/make.sh WORK_FOLDER
set -eu
work=${1:?usage: examples/bundled/make.sh WORK_FOLDER}
here=$(dirname "$0")
mkdir -p "$work"

python "$here/train_base.py" --out "$work/base" --resume
python "$here/pack.py" base "$work/base"
cp "$work/base.jsonl" "$here/logs/base.jsonl"

for k in 1 2 4; do
    kmerge-mlx train -c "$here/k$k.yaml" --model bundled --adapter-path "$work/k$k" --resume
    python "$here/pack.py" adapter "$work/k$k"
    cp "$work/k$k/training/log.jsonl" "$here/logs/k$k.jsonl"
done
