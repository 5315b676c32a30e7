"""The paper's ablations on the toy: one list of runs, the two at a time that make them, and tables over seeds.

    python -m demo.ablations ablations 10 11    make the runs of these seeds in runs/demo-SEED/, and print their table
    python -m demo.ablations claim 10 11 12     p = 0.8 against p = 1 at several lengths, with KL and without
    python -m demo.ablations hacking 10 11 12   the reward of Eq. 7 on a model that lists verbs now and then
    python -m demo.ablations ablations          print the table of demo/ablations.csv, which was made before

What is interrupted goes on when called again. Runs are taken two at a time, each run over all seeds before the next,
with their output in runs/demo-SEED/*.log.
"""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from demo.measured import LISTS, MEASURED, METRICS, RARE, T, collect, differences, interval, read_rows, spread
from engine.program.settings import command_line

COLUMNS = {"hacking": ("VD", "VD, rare", *LISTS)}  # of a sweep's tables; METRICS and RARE where it is not named
COMPARED = {"hacking": ("VD", "VD lists")}  # what is compared with the base run; R1@0.7 and mIoU elsewhere

# Each GRPO run and its options beyond demo/grpo.args, from the warm start unless FROM says otherwise.
ARMS = {
    "tvg-only": "--p 1",
    "grpo": "--p 0.8",
    "tvg-only-no-kl": "--p 1 --kl-coef 0",
    "grpo-no-kl": "--p 0.8 --kl-coef 0",
}
RUNS = {
    "claim": ARMS | {
        "tvg-only-800": "--p 1 --iterations 800",  # as many grounding iterations as "grpo" has
        "tvg-only-1080": "--p 1 --iterations 1080",  # as many seconds
        "tvg-only-200": "--p 1 --iterations 200",
        "grpo-200": "--p 0.8 --iterations 200",
        "tvg-only-2000": "--p 1 --iterations 2000",
        "grpo-2000": "--p 0.8 --iterations 2000",
    },
    "ablations": ARMS | {
        "vd": "--inversion-tasks vd",
        "ar": "--inversion-tasks ar",
        "vc": "--inversion-tasks vc",
        "ar-vd": "--inversion-tasks ar vd",
        "vc-ar": "--inversion-tasks vc ar",
        "vc-vd": "--inversion-tasks vc vd",
        "p-0.6": "--p 0.6",
        "p-0.4": "--p 0.4",
        "p-0.2": "--p 0.2",
        "p-0.0": "--p 0",
        "cosine": "--inversion-reward cosine",
        "invert-sft-grpo": "--p 0.8",
    },
    # Begun on a model that was taught to list verbs in a third of its descriptions.
    "hacking": {
        "lists": "--p 0 --inversion-tasks vd --max-new-tokens 32",
        "lists-cap": "--p 0 --inversion-tasks vd --max-new-tokens 32 --vd-verb-cap 2",
        "lists-cosine": "--p 0 --inversion-tasks vd --max-new-tokens 32 --inversion-reward cosine",
    },
}
FROM = {"invert-sft-grpo": "invert-sft"} | dict.fromkeys(RUNS["hacking"], "lister")
LENGTH = {"claim": "--iterations 1000", "ablations": "--iterations 1000", "hacking": "--iterations 300"}


class Line(NamedTuple):
    """A line of a table: a run, its label there, and the paper's R1@0.3 / 0.5 / 0.7 or mIoU, where it prints any."""

    run: str
    label: str
    paper: str = ""


START = {"start": [Line("warm", "warm start, supervised")]}
TABLES = {
    "ablations": START | {
        "Table 2: inversion tasks": [
            Line("tvg-only", "TVG only", "78.7 / 64.1 / 36.9"),
            Line("vd", "VD", "79.1 / 64.3 / 39.4"),
            Line("ar", "AR", "78.2 / 65.2 / 43.8"),
            Line("vc", "VC", "78.8 / 68.0 / 42.0"),
            Line("ar-vd", "AR + VD", "79.6 / 67.9 / 43.6"),
            Line("vc-ar", "VC + AR", "78.8 / 68.1 / 43.8"),
            Line("vc-vd", "VC + VD", "80.0 / 68.5 / 42.1"),
            Line("grpo", "all three", "80.8 / 69.0 / 44.0")],
        "Figure 5: share of inversion, 1 - p": [
            Line("tvg-only", "0", "78.7 / 64.1 / 36.9"),
            Line("grpo", "0.2", "80.8 / 69.0 / 44.0, the best"),
            Line("p-0.6", "0.4", "curve"),
            Line("p-0.4", "0.6", "curve, below 0"),
            Line("p-0.2", "0.8", "curve, below 0"),
            Line("p-0.0", "1", "curve, the worst")],
        "Table 3: reward of inversion": [
            Line("grpo", "binary", "80.8 / 69.0 / 44.0"),
            Line("cosine", "cosine", "76.2 / 62.2 / 39.8")],
        "Figure 1: action understanding": [
            Line("warm", "before", "bars"),
            Line("tvg-only", "TVG only", "bars, VC, AR, VD lower"),
            Line("grpo", "with inversion", "bars, VC, AR, VD kept"),
            Line("tvg-only-no-kl", "TVG only, no KL"),
            Line("grpo-no-kl", "with inversion, no KL")],
        "Figure 6: Invert-SFT": [
            Line("warm", "before", "mIoU 18.0"),
            Line("invert-sft", "after Invert-SFT", "mIoU 17.8"),
            Line("grpo", "trained without it", "mIoU 57.9"),
            Line("invert-sft-grpo", "trained after it", "mIoU 57.9")],
        "Figure 4: other videos, other format": [
            Line("tvg-only-transfer", "TVG only", "bars"),
            Line("grpo-transfer", "with inversion", "bars, higher")],
    },
    "claim": START | {
        "p = 0.8 against p = 1": [
            Line("tvg-only", "TVG only"),
            Line("grpo", "with inversion"),
            Line("tvg-only-800", "TVG only, 800 iterations"),
            Line("tvg-only-1080", "TVG only, 1,080 iterations"),
            Line("tvg-only-no-kl", "TVG only, no KL"),
            Line("grpo-no-kl", "with inversion, no KL"),
            Line("tvg-only-200", "TVG only, 200 iterations"),
            Line("grpo-200", "with inversion, 200 iterations"),
            Line("tvg-only-2000", "TVG only, 2,000 iterations"),
            Line("grpo-2000", "with inversion, 2,000 iterations")],
    },
    "hacking": {
        "reward of descriptions": [
            Line("warm", "warm start, supervised"),
            Line("lister", "taught to list verbs, where GRPO begins"),
            Line("lists", "binary, no cap"),
            Line("lists-cap", "binary, cap of 2 verbs"),
            Line("lists-cosine", "cosine, no cap")],
    },
}

# ------------------------------------------------------------------------------------------------ making the runs


def make_runs(sweep, seeds):
    """Make the warm starts of all seeds, then each run of all seeds, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        for jobs in ([(seed, "warm") for seed in seeds], [(seed, name) for name in RUNS[sweep] for seed in seeds]):
            made = [pool.submit(make_run, sweep, seed, name) for seed, name in jobs]
            for (seed, name), result in zip(jobs, made):
                try:
                    result.result()
                except subprocess.CalledProcessError as error:
                    pool.shutdown(cancel_futures=True)
                    log = Path(f"runs/demo-{seed}/{name}.log")
                    last = log.read_text(encoding="utf-8").strip().split("\n")[-1]
                    sys.exit(f"demo.ablations: {name} of seed {seed} ended with status {error.returncode}, see {log}: "
                             f"{last}")


def make_run(sweep, seed, name):
    """Train a run and measure it, with the programs' output in runs/demo-SEED/NAME.log."""
    out = Path(f"runs/demo-{seed}")
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(out / f"{name}.log", "a", encoding="utf-8") as log:
        for command in commands(sweep, seed, name):
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
    print(f"seed {seed}: {name} is finished", flush=True)


def commands(sweep, seed, name):
    """The programs behind a run, in order."""
    out = f"runs/demo-{seed}"

    def train(name, *options):
        return [sys.executable, "invert4tvg.py", "@demo/toy.args", "--videos", f"{out}/videos", "--seed", str(seed),
                *options, "--output", f"{out}/{name}"]

    def evaluate(model, name, annotations):
        return [sys.executable, "evaluate.py", "--videos", f"{out}/videos", "--annotations", f"{out}/{annotations}",
                "--workers", "1", "--micro-batch", "128", "--model", f"{out}/{model}", "--output", f"{out}/{name}"]

    if name == "warm":
        yield ["bash", "demo/warm_start.sh", str(seed)]
        yield evaluate("warm", "warm-test", "test.txt")
        return
    rows = f"{out}/train.txt"
    if name == "invert-sft-grpo":
        pairs = f"{out}/invert-sft.jsonl"
        yield [sys.executable, "-m", "papers.stages", "invert-sft", "--annotations", rows, "--output", pairs]
        yield train("invert-sft", "--model", f"{out}/warm", "--demonstrations", pairs, "--inversion-format", "answer",
                    "--iterations", "100", "--lr", "1e-4")
        yield evaluate("invert-sft", "invert-sft-test", "test.txt")
    if name == "lists":
        yield [sys.executable, "-m", "demo.verb_lists", out]
        yield train("lister", "--model", f"{out}/warm", "--demonstrations", f"{out}/verb-lists.jsonl", "--lr", "1e-3",
                    "--iterations", "60")
        yield evaluate("lister", "lister-test", "test.txt")
    options = [*LENGTH[sweep].split(), *RUNS[sweep][name].split()]
    yield train(name, "@demo/grpo.args", "--model", f"{out}/{FROM.get(name, 'warm')}", "--annotations", rows, *options)
    yield evaluate(name, f"{name}-test", "test.txt")
    if name in ("grpo", "tvg-only"):  # Figure 4: videos of another kind, annotations of another format
        yield evaluate(name, f"{name}-transfer", "transfer.json")


# ------------------------------------------------------------------------------------------------ tables


def base_of(run):
    """The run that a run is compared with: one of grounding alone, or the descriptions without a cap."""
    if run == "lister" or run.startswith("lists"):
        return "lists"
    if run.endswith("-transfer"):
        return "tvg-only-transfer"
    for suffix in ("-no-kl", "-200", "-2000"):
        if run == f"grpo{suffix}":
            return f"tvg-only{suffix}"
    return "tvg-only"


def gains(rows, run, metric="R1@0.7"):
    """What `run` has over its base, seed by seed: seeds differ more than runs do, so only pairs compare."""
    return differences(rows, run, base_of(run), metric)


def table(sweep, rows):
    """The tables of a sweep, without the lines of runs that were not made."""
    seeds = sorted({int(row["seed"]) for row in rows})
    columns = [name for name in COLUMNS.get(sweep, METRICS + RARE) if name in rows[0]]
    compared = COMPARED.get(sweep, ("R1@0.7", "mIoU"))
    base = "no cap" if sweep == "hacking" else "TVG only"
    minus = " | ".join(f"{metric} minus {base}, same seed" for metric in compared)
    lines = [f"Mean (standard deviation) over seeds {', '.join(map(str, seeds))}; percent. Differences: mean [95% "
             "interval by Student's t].", ""]
    for section, runs in TABLES[sweep].items():
        made = [line for line in runs if any(row["run"] == line.run for row in rows)]
        if not made:
            continue
        lines.append(f"| {section} | {' | '.join(columns)} | {minus} | the paper's |")
        lines.append("|---" * (len(columns) + 4) + "|")
        for run, label, paper in made:
            cells = [spread([float(row[name]) for row in rows if row["run"] == run]) for name in columns]
            cells += [interval(gains(rows, run, metric)) for metric in compared]
            lines.append(f"| {label} | {' | '.join(cells)} | {paper} |")
        lines.append("")
    return "\n".join(lines)


def main(sweep, seeds):
    if sweep not in RUNS or not all(seed.isdigit() for seed in seeds):
        given = " ".join([sweep, *seeds])
        sys.exit(f"demo.ablations: {given}: give {', '.join(RUNS)}, then seeds, such as 0 2 3.")
    if len(set(seeds)) > len(T) + 1:
        sys.exit(f"demo.ablations: {len(set(seeds))} seeds; give at most {len(T) + 1}, as far as its quantiles go.")
    path = Path(f"demo/{sweep}.csv")
    if not seeds and not path.exists():
        sys.exit(f"demo.ablations: {path} is not there: {sweep} was not measured yet; give seeds to make its runs.")
    if seeds:
        make_runs(sweep, seeds)
        path = Path(f"runs/{sweep}.csv")
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("seed", "run", *MEASURED))
            writer.writeheader()
            writer.writerows(collect({line.run for lines in TABLES[sweep].values() for line in lines}, seeds))
    print(table(sweep, read_rows(path)))


if __name__ == "__main__":
    parser = command_line("demo.ablations", __doc__)
    parser.add_argument("sweep", choices=RUNS, help="which runs")
    parser.add_argument("seeds", nargs="*", help="make the runs of these seeds first, such as 0 2 3")
    given = parser.parse_args()
    try:
        main(given.sweep, given.seeds)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"demo.ablations: {error}")
