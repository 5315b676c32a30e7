"""Demonstrations whose thought names a video's actions in order, with their times: set-up (b) of docs/results.md.

    python -m demo.timeline FOLDER    FOLDER/warmup-2.jsonl and FOLDER/train.txt -> FOLDER/timeline-2.jsonl
"""

import json
import sys
from pathlib import Path


def main(folder):
    actions = {}
    for line in (folder / "train.txt").read_text(encoding="utf-8").splitlines():
        head, sentence = line.split("##")
        name, start, end = head.split()
        actions.setdefault(name, []).append((float(start), float(end), sentence.rstrip(".").split()[-1]))
    rows = [json.loads(line) for line in (folder / "warmup-2.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["task"] == "tvg":
            timeline = " ".join(f"{start} {verb} {end}" for start, end, verb in sorted(actions[row["video"]]))
            row["completion"] = f"<think> {timeline} </think> <answer> {row['start']} to {row['end']} </answer>"
    (folder / "timeline-2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
