"""Kill trainings with SIGKILL at random moments, start them again, and compare them bit for bit with one left in peace.

    python tests/long/kills.py --kills 100

Of the kills 30 in 100 come while a checkpoint is being written, 20 end one of two processes, 10 both. A training is
killed again and again until it is finished. Then its weights, optimiser state, log (without the seconds measured),
completions and evaluations must be those of the undisturbed one. The other process of two must end by itself.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import tiny

from engine.model.loading import newest_checkpoint

KINDS = {  # name: (processes, of those killed, share of the kills)
    "one process, at any moment": (1, 1, 0.4),
    "one process, while a checkpoint is written": (1, 1, 0.3),
    "one of two processes": (2, 1, 0.2),
    "both of two processes": (2, 2, 0.1),
}
CHANGES = {"iterations": 8, "save_every": 2, "save_rollouts": 1, "eval_every": 4, "eval_limit": 2, "keep": 2}
PATIENCE = 60  # seconds for what is left of two processes


def result(output):
    """All that a finished run leaves, but for seconds and its own folder's name -> {file: content}."""
    output = Path(output)
    files = {}
    for path in sorted(newest_checkpoint(output).iterdir()):
        if path.name == "run.json":
            record = json.loads(path.read_text())
            record["config"].pop("output")
            record.pop("run")  # its identity
            files[path.name] = record
        elif path.name != "manifest.json":
            files[path.name] = path.read_bytes()
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    files["metrics.jsonl"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in log]
    for path in (*output.glob("rollouts.*"), *output.glob("eval-*/*")):
        files[str(path.relative_to(output))] = path.read_bytes()
    return files


def difference(one, other):
    """The first name under which two results differ, or ""."""
    return next((name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)), "")


class Run:
    """A training that is killed until it is finished."""

    def __init__(self, config, folder, processes):
        self.config = dataclasses.replace(config, output=str(folder / "run"))
        self.folder = folder
        self.processes = processes
        folder.mkdir(parents=True)

    def start(self):
        return tiny.start(self.config, self.folder / "output.txt", self.processes)

    def joined(self):
        """How often its processes have found each other and a model."""
        log = self.folder / "output.txt"
        return log.read_text().count("model: ") if log.exists() else 0

    def is_writing(self, checkpoint="*"):
        return any(Path(self.config.output).glob(f"checkpoint-{checkpoint}.partial"))

    def kill(self, rng, victims, duration, while_writing):
        """Start it and kill some of its processes -> (whether it was hit, seconds until the others ended, fault)."""
        newest = newest_checkpoint(self.config.output)
        done = int(newest.name.split("-")[1]) if newest else 0
        which = f"{rng.randrange(done, CHANGES['iterations'], CHANGES['save_every']) + CHANGES['save_every']:06d}"
        joined = self.joined()
        pids = self.start()
        # Until both have joined, torchrun alone could tell one of the other's end.
        while victims < self.processes and self.joined() == joined:
            time.sleep(0.01)
        ends = time.monotonic() + rng.uniform(0, duration)
        while time.monotonic() < ends or while_writing:
            if while_writing and self.is_writing(which):
                time.sleep(rng.uniform(0, 0.05))
                break
            if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        chosen = rng.sample(pids, victims)
        for pid in chosen:
            os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        statuses = tiny.wait(pids, PATIENCE)
        seconds = time.monotonic() - killed_at
        hit = -signal.SIGKILL in statuses
        fault = ""
        if None in statuses:
            fault = f"a process lived on for {PATIENCE} seconds after the other's death"
        elif not hit and statuses != [0] * len(pids):
            fault = f"it ended with {statuses}"
        if tiny.left_behind(pids[0]):
            fault = fault or "a worker was left behind"
        return hit, seconds, fault

    def finish(self, expected):
        """Let it end -> what is wrong with it, or ""."""
        statuses = tiny.wait(self.start())
        if statuses != [0] * self.processes:
            return f"it ended with {statuses}; see {self.folder}/output.txt"
        name = difference(result(self.config.output), expected)
        return name and f"{name} differs from the undisturbed run's; see {self.folder}"


def campaign(folder, kills, seed=0):
    rng = random.Random(seed)
    config = tiny.make(folder / "start", **CHANGES)
    config = dataclasses.replace(config, eval_annotations=config.annotations)
    expected, durations = {}, {}
    for processes in (1, 2):
        undisturbed = Run(config, folder / f"undisturbed-{processes}", processes)
        began = time.monotonic()
        assert tiny.wait(undisturbed.start()) == [0] * processes, undisturbed.folder
        durations[processes] = time.monotonic() - began
        expected[processes] = result(undisturbed.config.output)
        print(f"undisturbed, {processes} processes: {durations[processes]:.1f} s, {len(expected[processes])} files")
    failures = []
    for kind, (processes, victims, share) in KINDS.items():
        wanted = max(1, round(kills * share))
        while_writing = "written" in kind
        hits = runs = survived = 0
        latencies = []
        run = None
        while hits < wanted:
            if run is None:
                run = Run(config, folder / f"{kind.split(',')[-1].strip().replace(' ', '-')}-{runs}", processes)
                runs += 1
                pending = 0
            hit, seconds, fault = run.kill(rng, victims, durations[processes], while_writing)
            durations[processes] *= 1.02 if hit else 0.7  # a machine is not always equally fast
            if while_writing and not run.is_writing():
                hit = False  # the checkpoint was whole already
            hits += hit
            pending += hit
            if victims < processes and hit:
                latencies.append(seconds)
            if fault:
                failures.append(f"{kind}: {fault}")
            is_finished = newest_checkpoint(run.config.output) and (
                newest_checkpoint(run.config.output).name == f"checkpoint-{CHANGES['iterations']:06d}")
            if is_finished or hits == wanted or fault or while_writing and pending == 5:
                fault = run.finish(expected[processes])
                if fault:
                    failures.append(f"{kind}: {fault}")
                else:
                    survived += pending
                    shutil.rmtree(run.folder)
                run = None
        text = f"{kind}: {survived} of {hits} kills survived, {runs} runs compared"
        if latencies:
            text += f"; the other process ended within {max(latencies):.1f} s"
        print(text, flush=True)
    print("\n".join(failures))
    return failures


if __name__ == "__main__":
    tiny.main(__doc__, campaign, kills=100, seed=0)
