"""A long training of a tiny model: do its memory and its file descriptors grow?

    python tests/long/soak.py --iterations 3000

Every twentieth of the run the memory (VmRSS) and the descriptors of the training and of its worker are read from /proc,
so this runs on Linux. The slopes are those of least squares over the second half. It fails where memory grows by more
than 10 MB, or descriptors by more than one, in 1,000 iterations of a run of 3,000 or more: a clip that is kept is half
a megabyte.
"""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import numpy as np
import tiny

COLUMNS = ("memory, MB", "descriptors", "worker's memory, MB", "worker's descriptors")


def usage(pid):
    """-> (MB, descriptors) of a process."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        kilobytes = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return kilobytes / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def children(pid):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def slopes(rows):
    """Rows of (iteration, four readings) -> each reading's growth in 1,000 iterations, over the second half."""
    table = np.array(rows[len(rows) // 2:], dtype=float)
    return np.polyfit(table[:, 0], table[:, 1:], 1)[0] * 1000


def campaign(folder, iterations):
    config = tiny.make(folder / "start", iterations=iterations, save_every=250, max_new_tokens=8, group_size=2,
                       eval_every=max(1, iterations // 4), eval_limit=2, save_rollouts=1)
    config = dataclasses.replace(config, eval_annotations=config.annotations)
    shutil.rmtree(config.output, ignore_errors=True)
    pids = tiny.start(config, folder / "output.txt")
    log = Path(config.output) / "metrics.jsonl"
    rows = []
    every = max(1, iterations // 20)
    done = size = 0
    began = time.monotonic()
    while done < iterations and not os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.02)
        if not log.exists() or log.stat().st_size == size:
            continue
        size = log.stat().st_size
        done = log.read_text(encoding="utf-8").count('"seconds"')
        if done >= every * (len(rows) + 1):
            workers = children(pids[0])
            if len(workers) == 1:  # an evaluation has its own
                rows.append((done, *usage(pids[0]), *usage(workers[0])))
    status = tiny.wait(pids)
    found = slopes(rows)
    print(f"{done} iterations in {time.monotonic() - began:.0f} s, status {status}, {len(rows)} readings, from "
          f"{rows[0][1]:.0f} to {rows[-1][1]:.0f} MB and {rows[0][2]} to {rows[-1][2]} descriptors")
    for name, slope in zip(COLUMNS, found):
        print(f"    {name}: {slope:+.3f} in 1,000 iterations")
    grows = iterations >= 3000 and (max(found[0], found[2]) > 10 or max(found[1], found[3]) > 1)
    return [] if status == [0] and not grows else ["it grows, or failed"]


if __name__ == "__main__":
    tiny.main(__doc__, campaign, iterations=3000)
