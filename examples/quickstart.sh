#!/usr/bin/env bash
# Converts a PyTorch checkpoint and generates from a compressed prompt, with nothing to download:
# the checkpoint is the tiny one of the parity tests, trained by the paper's own code.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
upstream=$here/../tests/fixtures/upstream_tied_k4
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

kmerge-mlx convert "$upstream/checkpoint" "$out/adapter" --model "$upstream/base" --k 4
kmerge-mlx info "$out/adapter"
kmerge-mlx generate --model "$upstream/base" --adapter-path "$out/adapter" --k 4 "$here/tree.txt"
