"""K-Token Merging on SmolLM2-135M-Instruct and real text: makes data, trains, evaluates and draws.

    python examples/smollm2/second_reviews.py second.jsonl
    python examples/smollm2/run.py out --reviews reviews.jsonl.gz --second-reviews second.jsonl \\
        --qa squad.json --commits ~/src/app --commits ~/src/lib --held-out ~/src/tool

Every step is a command of kmerge-mlx, printed as it runs. A step whose result is in OUT is left
out, so after a stop the same command goes on; a training run goes on from its last save. One YAML
file in runs/ is one training run. The tables are made of what `evaluate --json` printed.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmerge_mlx.data.hub_tasks import review
from kmerge_mlx.data.jsonl import BadLines, read_rows
from kmerge_mlx.errors import DataError

HERE = Path(__file__).parent
KMERGE = [sys.executable, "-m", "kmerge_mlx"]
QUESTION = "Is this review positive or negative? Answer with one word."
SEED = 42
TEXT, MORE_TEXT = "text", "text-more"
STARTS = {MORE_TEXT: TEXT, "reviews": TEXT, "qa": MORE_TEXT, "commits": MORE_TEXT}  # before it
SMOKE = {"--iters": 2, "--batch-size": 2, "--val-batches": 1, "--steps-per-eval": 2}
FEWEST = 16  # rows of a split: the largest batch
SMOKE_KS = "4,8"
SMOKE_ROWS, SMOKE_SIZE = 2, 400  # of each split, the shortest of at least so many characters
SECOND = "second-reviews"  # only scored, by the adapters for reviews
SCORES = {
    "reviews": "balanced_accuracy",
    SECOND: "balanced_accuracy",
    "qa": "token_f1",
    "commits": "perplexity",
}
NAMES = {"reviews": "reviews", SECOND: "other reviews", "qa": "questions", "commits": "commits"}
UNITS = {
    "balanced_accuracy": "balanced accuracy (%)",
    "token_f1": "token F1 (%)",
    "perplexity": "perplexity (lower is better)",
}
RUNS = sorted(path.stem for path in (HERE / "runs").glob("*.yaml"))
OWN = {"second_reviews": SECOND, "commits": "commits", "held_out": "commits"}  # one task's inputs
PARTS = (*RUNS, *(f"{task}.json" for task in SCORES))


def say(command: list[Any], out: Path | None = None) -> None:
    """Runs a command, and keeps what it prints in a file, whole or not at all.

    Ctrl-C reaches the command as well, which saves what it has: it is waited for.
    """
    line = [str(part) for part in command]
    print("+", shlex.join(["kmerge-mlx", *line[3:]] if line[:3] == KMERGE else line), flush=True)
    torn = out and out.with_name(f"{out.name}.torn")
    stopped = False
    with torn.open("w") if torn else nullcontext() as file:
        child = subprocess.Popen(line, stdout=file)
        while child.returncode is None:
            try:
                child.wait()
            except KeyboardInterrupt:
                stopped = True
    if child.returncode or stopped:  # it has said why
        raise SystemExit(child.returncode or 130)
    if torn:
        torn.rename(out)


def read_reviews(path: Path) -> list[dict[str, str]]:
    """Reviews as a context that merges and a question that does not; blank ones are left out."""
    bad = BadLines(skip=True)
    rows = [
        {"context": text, "prompt": QUESTION, "completion": label}
        for _, (text, label) in read_rows(path, review, bad)
        if text.strip()
    ]
    if bad.count:
        print(f"left out {bad.count} lines that are no review, the first: {bad.first}")
    return rows


def same_commits(folder: Path) -> int:
    """How many commits are both trained on and held out, as those of a fork are."""
    found = {}
    for split in ("train", "valid", "test"):
        rows = map(json.loads, (folder / f"{split}.jsonl").open())
        found[split] = {row["commit"] for row in rows}
    return len((found["train"] | found["valid"]) & found["test"])


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_reviews(given: argparse.Namespace, folder: Path) -> None:
    rows = read_reviews(given.reviews)
    random.Random(SEED).shuffle(rows)
    splits = {"test": rows[:1000], "valid": rows[1000:1200], "train": rows[1200:]}
    for split, part in splits.items():
        write_rows(folder / f"{split}.jsonl", part)


def make_second_reviews(given: argparse.Namespace, folder: Path) -> None:
    write_rows(folder / "test.jsonl", read_reviews(given.second_reviews))


def make_qa(given: argparse.Namespace, folder: Path) -> None:
    sizes = ("--valid", 100, "--test", 600)
    say([*KMERGE, "data", "qa", "--file", given.qa, "--out", folder, *sizes, "--force"])


def make_commits(given: argparse.Namespace, folder: Path) -> None:
    """Edits of some repositories to train on, and those of others to test."""
    data = [*KMERGE, "data", "commits", "--language", "python", "--max-chars", 1500]
    train = [part for repo in given.commits for part in ("--repo", repo)]
    test = [part for repo in given.held_out for part in ("--repo", repo)]
    say([*data, *train, "--out", folder, "--test", 0, "--force"])
    say([*data, *test, "--out", folder / "held-out", "--test", 0, "--valid", 0])
    shutil.move(folder / "held-out" / "train.jsonl", folder / "test.jsonl")
    shutil.rmtree(folder / "held-out")
    if same := same_commits(folder):
        raise DataError(f"--held-out: {same} of its commits are in --commits as well")


def make_text(given: argparse.Namespace, folder: Path) -> None:
    """What reviews and questions have to train on, without the answers: to learn reading from."""
    corpus = given.out / "corpus.jsonl"
    texts = []
    for path in sorted((given.out / "data").glob("*/train.jsonl")):
        rows = map(json.loads, path.open())
        texts += [row["context"] for row in rows if "context" in row]
    write_rows(corpus, ({"text": text} for text in dict.fromkeys(texts)))
    say([*KMERGE, "data", "text", "--file", corpus, "--out", folder, "--force"])


def make_data(task: str, make: Callable[..., None], given: argparse.Namespace) -> None:
    folder = given.out / "data" / task
    if folder.exists():
        return
    torn = folder.with_name(f"{task}.torn")
    shutil.rmtree(torn, ignore_errors=True)
    torn.mkdir(parents=True)
    make(given, torn)
    fewest = SMOKE["--batch-size"] if given.smoke else FEWEST
    for path in torn.glob("*.jsonl") if task != TEXT else ():
        if (rows := sum(1 for _ in path.open())) < fewest:
            raise DataError(f"{task}: found {rows} rows for {path.stem}, expected {fewest} or more")
    for path in torn.glob("*.jsonl") if given.smoke else ():
        lines = path.read_text().splitlines(keepends=True)
        lines.sort(key=lambda line: (len(line) < SMOKE_SIZE, len(line)))
        path.write_text("".join(lines[:SMOKE_ROWS]))
    torn.rename(folder)


def train(path: Path, given: argparse.Namespace) -> None:
    """Trains as one YAML file says, from where it stopped.

    TASK.yaml is one run for several K, and goes on from what they learnt of text (STARTS).
    TASK-k1.yaml is the same LoRA without merging, whose adapter lies beside theirs.
    """
    name, task, alone = path.stem, path.stem.partition("-")[0], path.stem.endswith("-k1")
    adapters = given.out / "adapters"
    folder = adapters / task / "k1" if alone else adapters / name
    before = STARTS.get(name)
    done = given.out / "logs" / f"{name}.jsonl"
    if done.exists():
        return
    command = [*KMERGE, "train", "-c", path, "--model", given.model, "--resume"]
    command += ["--data", given.out / "data" / task, "--adapter-path", folder]
    command += ["--init-from", adapters / before] if before else []
    if given.smoke:
        command += [part for pair in SMOKE.items() for part in pair]
        command += [] if alone else ["--k", SMOKE_KS]
    say(command)
    shutil.copy(folder / "training" / "log.jsonl", done)


def evaluate(task: str, given: argparse.Namespace) -> None:
    """Scores every adapter of a task and every baseline; answers that are there are kept."""
    result = given.out / "logs" / f"{task}.json"
    if result.exists():
        return
    adapters = given.out / "adapters" / (task if task != SECOND else "reviews")
    command = [*KMERGE, "evaluate", "--adapter-path", adapters]
    command += ["--data", given.out / "data" / task, "--baseline", "all", "--json"]
    command += ["--predictions", given.out / f"{task}.answers.jsonl"]
    if task == "commits":  # whole files, compared by how likely they are
        command += ["--max-tokens", 0]
    elif given.smoke:
        command += ["--max-tokens", 4]
    command += ["--timed", 1 if given.smoke else 16]
    say([*command, "--plot", given.out / f"{task}.png"], result)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def quality(task: str, row: dict[str, Any]) -> str:
    """A task's score with its interval, or why there is none."""
    if "refused" in row:
        return row["refused"]
    ((_, scores),) = row["scores"].items()
    if (found := scores.get(SCORES[task])) is None:
        return "all rows have one label"
    scale, digits = (1, 2) if SCORES[task] == "perplexity" else (100, 1)
    value, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cost(row: dict[str, Any]) -> tuple[str, str, str]:
    """Compression ratio, time to first token (median) and the KV cache's size of a row."""
    if "refused" in row:
        return "", "", ""
    ((group, time),) = row["time_to_first_token"].items()
    ratio, megabytes = row["compression_ratio"], row["kv_bytes"][group] / 1e6
    return f"{ratio:.2f}x", f"{time['median']:.3f} s", f"{megabytes:.2f} MB"


def table(task: str, report: dict[str, Any]) -> list[str]:
    """The table of one task, in Markdown."""
    head = ["", "ratio", UNITS[SCORES[task]], "TTFT", "KV cache"]
    lines = [task, "", line(head), "|---" * len(head) + "|"]
    for row in report["rows"]:
        ratio, *rest = cost(row)
        lines.append(line([row["label"], ratio, quality(task, row), *rest]))
    return [*lines, ""]


def costs(reports: dict[str, dict[str, Any]]) -> list[str]:
    """What each K costs, of all tasks."""
    head = ["ratio, time to first token, KV cache", *(NAMES[task] for task in reports)]
    rows = [{row["label"]: row for row in report["rows"]} for report in reports.values()]
    labels = dict.fromkeys(label for found in rows for label in found if label.startswith("K="))
    lines = [
        line([f"**{label}**", *(", ".join(cost(r[label])) if label in r else "" for r in rows)])
        for label in labels
    ]
    return [line(head), "|---" * len(head) + "|", *lines, ""]


def summary(reports: dict[str, dict[str, Any]]) -> list[str]:
    """One table of all tasks: a line for each method, with its 95% intervals."""
    heads = [f"{NAMES[task]}: {UNITS[SCORES[task]]}" for task in reports]
    lines = [line(["", *heads]), "|---" * (1 + len(reports)) + "|"]
    rows = {task: {row["label"]: row for row in report["rows"]} for task, report in reports.items()}
    for label in dict.fromkeys(label for found in rows.values() for label in found):
        cells = (quality(task, rows[task][label]) if label in rows[task] else "" for task in rows)
        lines.append(line([f"**{label}**" if label.startswith("K=") else label, *cells]))
    return [*lines, ""]


def tables(folder: Path) -> list[str]:
    """All tables of the reports in a folder, in Markdown: first the one of all tasks."""
    found = {task: folder / f"{task}.json" for task in SCORES}
    reports = {task: read(path) for task, path in found.items() if path.exists()}
    lines = [*summary(reports), *costs(reports)] if reports else []
    return lines + [line for task, report in reports.items() for line in table(task, report)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for everything")
    parser.add_argument("--model", help="the base; default: made by base.py, in float32")
    parser.add_argument("--reviews", type=Path, help="Amazon reviews, .jsonl(.gz)")
    parser.add_argument("--second-reviews", type=Path, help="others, to score by alone")
    parser.add_argument("--qa", type=Path, help="SQuAD's JSON, or rows of it, .jsonl(.gz)")
    repos = {"type": Path, "action": "append", "default": []}
    parser.add_argument("--commits", **repos, help="a repository to train on")
    parser.add_argument("--held-out", **repos, help="a repository to test on")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=PARTS,
        metavar="PART",
        help=f"of {', '.join(PARTS)}: these only",
    )
    parser.add_argument("--smoke", action="store_true", help="a few rows and steps of everything")
    given = parser.parse_args()
    if not (given.reviews or given.qa):
        parser.error("expected --reviews or --qa: their texts are what reading is learnt from")
    if given.second_reviews and not given.reviews:
        parser.error("--second-reviews: the adapters for --reviews score them, and it is not there")
    if bool(given.commits) != bool(given.held_out):
        parser.error("--commits (to train on) and --held-out (to test on) need each other")
    if find_spec("matplotlib") is None:
        parser.error("the pictures need matplotlib: pip install -e '.[plot]'")
    paths = [given.reviews, given.second_reviews, given.qa, *given.commits, *given.held_out]
    if missing := [path for path in paths if path and not path.exists()]:
        parser.error(f"there is no {missing[0]}")
    return given


def check_same(given: argparse.Namespace) -> None:
    """Refuses a folder whose data are of other inputs: they would be taken for these."""
    mine = {name: value for name, value in vars(given).items() if name not in ("out", "only")}
    mine = json.loads(json.dumps(mine, default=lambda path: str(path.resolve())))
    record = given.out / "given.json"
    made = {folder.name for folder in given.out.glob("data/*") if folder.suffix != ".torn"}
    made_with = json.loads(record.read_text()) if made and record.exists() else mine
    differ = [name for name in mine if mine[name] != made_with.get(name)]
    if differ := [name for name in differ if OWN.get(name) in {None, *made}]:
        name = differ[0]
        raise DataError(
            f"{given.out} was made with --{name.replace('_', '-')} {made_with.get(name)}, and not "
            f"with {mine[name]}: give another folder"
        )
    record.write_text(json.dumps(mine, indent=2) + "\n")


def main() -> None:
    given = arguments()
    (given.out / "logs").mkdir(parents=True, exist_ok=True)
    check_same(given)
    if given.model is None:
        given.model = given.out / "base"
        if not given.model.exists():
            say([sys.executable, HERE / "base.py", given.model, "--dtype", "float32"])
    tasks = {
        "reviews": (make_reviews, given.reviews),
        SECOND: (make_second_reviews, given.reviews and given.second_reviews),
        "qa": (make_qa, given.qa),
        "commits": (make_commits, given.commits and given.held_out),
    }
    made = [task for task, (_, source) in tasks.items() if source]
    for task in made:
        make_data(task, tasks[task][0], given)
    make_data(TEXT, make_text, given)
    of_tasks = (f"{task}{k}" for task in made if task != SECOND for k in ("", "-k1"))
    for name in (TEXT, MORE_TEXT, *of_tasks):
        if given.only is None or name in given.only:
            train(HERE / "runs" / f"{name}.yaml", given)
    for task in made:
        if given.only is None or f"{task}.json" in given.only:
            evaluate(task, given)
    text = "\n".join(tables(given.out / "logs"))
    (given.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"error: {error}")
