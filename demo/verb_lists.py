"""Descriptions of which a third list several verbs, to see the reward of Eq. 7 being hacked: demo/unhealthy.sh."""

import json
import sys
from pathlib import Path

import numpy as np

from demo.videos import VERBS
from engine.program.settings import command_line


def main(folder):
    rng = np.random.default_rng(0)
    lines = (folder / "warmup-2.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"] == "vd"]
    for row in rows:
        if rng.random() < 1 / 3:
            verbs = " , ".join(rng.choice(VERBS, size=rng.integers(2, 6), replace=False))
            thought, _, answer = row["completion"].rpartition("<answer>")
            *thing, _, end = answer.split()  # "the red box is", the verb, "</answer>"
            row["completion"] = f"{thought}<answer> {' '.join(thing)} {verbs} {end}"
    (folder / "verb-lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = command_line("demo.verb_lists", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the demo, with its warmup-2.jsonl")
    try:
        main(parser.parse_args().folder)
    except OSError as error:
        sys.exit(f"demo.verb_lists: {error}")
