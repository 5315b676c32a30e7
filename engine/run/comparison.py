"""How two evaluations of the same rows compare, with what chance alone would do to their difference."""

import numpy as np

from engine.program.settings import UserError
from engine.run.predictions import key_of


def paired_bootstrap(ours: list[dict], theirs: list[dict], values_of, draws: int = 10_000,
                     seed: int = 0) -> dict[str, tuple]:
    """Two lists of predictions of the same rows -> {metric: (ours, theirs, low, high)}.

    values_of(prediction) gives {metric: value}, whose means over the rows are the metrics.
    low, high: the 95% interval of the difference when videos, the independent units, are drawn with replacement.
    Raises UserError when the rows differ.
    """
    other = {key_of(p): p for p in theirs}
    if {(*key_of(p), p["query"]) for p in ours} != {(*key_of(p), p["query"]) for p in theirs}:
        raise UserError("the two evaluations do not hold the same rows; evaluate both on the same file and tasks.")
    number = {video: i for i, video in enumerate(sorted({p["video"] for p in ours}))}
    sums = {}  # metric -> (videos, 3): rows, our sum, their sum
    for p in ours:
        our_values = values_of(p)
        their_values = values_of(other[key_of(p)])
        for name in our_values.keys() & their_values.keys():
            table = sums.setdefault(name, np.zeros((len(number), 3)))
            table[number[p["video"]]] += (1, our_values[name], their_values[name])
    rng = np.random.default_rng(seed)
    videos = len(number)
    times = rng.multinomial(videos, np.full(videos, 1 / videos), size=draws)  # (draws, videos): how often each is drawn
    result = {}
    for name, table in sorted(sums.items()):
        drawn_rows, drawn_ours, drawn_theirs = (times @ table).T  # (draws, videos) @ (videos, 3): each is (draws,)
        difference = (drawn_ours - drawn_theirs) / np.maximum(drawn_rows, 1)  # a draw may hold no row of a task
        low, high = np.quantile(difference, (0.025, 0.975))
        rows, our_sum, their_sum = table.sum(axis=0)
        result[name] = (our_sum / rows, their_sum / rows, low, high)
    return result


def format_comparison(table: dict) -> str:
    """What `paired_bootstrap` returns -> a table, a line a metric."""
    width = max([10, *(len(name) + 1 for name in table)])
    lines = [f"\n{'metric':<{width}}{'this':>8}{'other':>8}{'difference':>12}   95% interval over videos"]
    for name, (a, b, low, high) in table.items():
        lines.append(f"{name:<{width}}{a:8.1f}{b:8.1f}{a - b:+12.1f}   [{low:+.1f}, {high:+.1f}]")
    return "\n".join(lines)
