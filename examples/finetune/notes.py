"""200 notes of a bicycle workshop, and the day that each of them names, as rows to train on."""

import json
import random
from pathlib import Path

WHO = ["Ms Adams", "Mr Brown", "Dr Costa", "Ms Dubois", "Mr Evans", "Dr Fischer"]
WHAT = ["the brakes of her bike", "a flat tyre", "the front light", "new gears", "a loose chain"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]

rng = random.Random(0)
rows = []
for _ in range(200):
    who, what, day = rng.choice(WHO), rng.choice(WHAT), rng.choice(DAYS)
    hour, minute, price = rng.randint(8, 17), rng.randint(10, 59), rng.randint(20, 90)
    note = f"{who} rang at {hour}:{minute} about {what}. "
    note += f"Will bring it in on {day}, quoted {price} euros."
    rows.append(json.dumps({"context": note, "prompt": "Which day?", "completion": day}) + "\n")

folder = Path("notes")
folder.mkdir(exist_ok=True)
for split, part in {"train": rows[:160], "valid": rows[160:180], "test": rows[180:]}.items():
    (folder / f"{split}.jsonl").write_text("".join(part), encoding="utf-8")
