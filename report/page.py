"""The page: what runs, curves, strips and analysis found, put into page.html."""

import re
import time
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from report import analysis, curves, strips
from report.runs import Run, choose_groups, comparable, differences, row_of, state

MAX_STACKED = 6  # evaluations below one film strip


def marked(completion) -> Markup:
    """A completion as HTML, its tags and its answer in colour."""
    text = str(escape(completion))
    text = re.sub(r"(&lt;(?:answer|time)&gt;)(.*?)(&lt;/(?:answer|time)&gt;)", r"\1<b>\2</b>\3", text, flags=re.DOTALL)
    return Markup(re.sub(r"&lt;/?\w+&gt;", r'<span class="soft" style="display:inline">\g<0></span>', text))


def shade(advantage) -> str:
    """The colour of a completion: green above 0, red below, stronger further away; an advantage is rarely above 2.5.

    None, of a completion whose advantage was not kept, has no colour.
    """
    if advantage is None:
        return ""
    colour = "--good" if advantage > 0 else "--bad"
    strength = min(abs(advantage) / 2.5, 1)
    return f"background:rgb(var({colour}) / {0.35 * strength:.2f});border-color:rgb(var({colour}) / {strength:.2f})"


def minutes(seconds) -> str:
    whole = round(seconds / 60)
    return f"{whole // 60} h {whole % 60:02d} min" if whole >= 60 else f"{max(whole, 1)} min"


def span_text(span) -> str:
    return f"{span[0]:.1f} to {span[1]:.1f}" if span else "no span"


def plain(value) -> str:
    """A setting as one would type it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


FILTERS = {"marked": marked, "shade": shade, "minutes": minutes, "span": span_text, "plain": plain,
           "clip": lambda percent: round(min(max(percent, 0.0), 100.0), 2), "filename": lambda path: Path(path).name}


def make_page(runs: list[Run], watched=False) -> str:
    """Everything about a run, and about others beside it, as one HTML document."""
    films = strips.Films()
    groups = [(group, shot_of_group(runs[0], group)) for group in choose_groups(runs[0].groups)]
    sets = [latest(entries) for entries in comparable(runs)]
    cases = [cases_of(entries, films) for entries in sets]
    films.add(shot for _, shot in groups)
    progress = state(runs[0]) if runs[0].log else None
    left = progress["seconds_left"] if progress else None
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= FILTERS
    return environment.get_template("page.html").render(
        runs=runs, state=progress, watched=watched, ends=clock(time.time() + left) if left else "",
        now=time.strftime("%Y-%m-%d %H:%M"), sections=curves.sections([run for run in runs]),
        comparisons=comparisons_of(sets), tasks=sorted({group.task for group, _ in groups}),
        groups=[(group, strips.group_strip(films, shot, group)) for group, shot in groups],
        cases=[found for found in cases if found["cases"]], errors=errors_of(runs[0], sets), metrics=analysis.METRICS,
        config_differences=differences(runs), version_differences=differences(runs, "environment"),
        films=films, folder=str(runs[0].folder.resolve()))


def clock(seconds) -> str:
    """A time of today as 14:05, of another day with its date."""
    when = time.localtime(seconds)
    same_day = when[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", when)


def shot_of_group(run, group) -> strips.Shot:
    row = group.rows[0]
    excerpt = (row["video_start"], row["video_end"]) if "video_start" in row else None
    return strips.Shot(str(Path(run.videos(), row["video"])), excerpt)


# ------------------------------------------------------------------------------------------------ evaluations


def latest(entries) -> list:
    """Evaluations of the same rows -> at most MAX_STACKED: of the first run the newest first, then earlier ones in
    order and evenly spaced; of each other run the newest.
    """
    own = [entry for entry in entries if entry[0] is entries[0][0]]
    others = {run.name: (run, evaluation) for run, evaluation in entries if run is not own[0][0]}
    most = max(1, MAX_STACKED - 1 - len(others))
    places = np.linspace(0, len(own) - 2, min(most, len(own) - 1)).round().astype(int)
    return [own[-1], *(own[place] for place in places), *others.values()]


def by_label(entries) -> list[tuple]:
    return [(evaluation.label, evaluation.predictions) for _, evaluation in entries]


def last_of_each_run(entries) -> list[tuple]:
    """(label, predictions) of the newest evaluation of every run."""
    newest = {}
    for n, (run, evaluation) in enumerate(entries):
        if n == 0 or run is not entries[0][0]:  # the first run's newest stands first
            newest[run.name] = (evaluation.label, evaluation.predictions)
    return list(newest.values())


def comparisons_of(sets) -> list[dict]:
    """The first run's newest evaluation against each other run's, or against its own earliest."""
    found = []
    for entries in sets:
        if not any(p.get("truth") for p in entries[0][1].predictions):
            continue  # of one's own video
        (ours, our_rows), *others = last_of_each_run(entries)
        if not others and len(entries) > 1:
            others = by_label(entries)[1:2]
        found += [{"ours": ours, "theirs": theirs, "table": analysis.differences(our_rows, their_rows)}
                  for theirs, their_rows in others]
    return found


def cases_of(entries, films) -> dict:
    """The cases of one set of evaluations, with their strips."""
    labelled = by_label(entries)
    folders = folders_of(entries)
    own = sum(run is entries[0][0] for run, _ in entries)
    in_order = [*labelled[1:own], labelled[0], *labelled[own:]]  # a run's iterations one after the other
    chosen = strips.choose_cases(labelled)

    def shot(p):
        return strips.Shot(analysis.video_of(p, folders), p.get("excerpt") and tuple(p["excerpt"]))

    films.add(shot(p) for found in chosen.values() for p in found)
    cases = {kind: [{"query": p["query"], "video": Path(p["video"]).name,
                     "strip": films.strip(shot(p), strips.case_bars(p, in_order)),
                     "completions": completions_of(p, in_order)} for p in found]
             for kind, found in chosen.items()}
    rows = len(analysis.grounding(labelled[0][1]))
    title = f"{rows} annotated rows" if rows else "a video of your own"
    return {"title": f"{title}: {', '.join(label for label, _ in in_order)}", "cases": cases}


def folders_of(entries) -> set[str]:
    """Where the videos of evaluations may lie."""
    return {run.videos() for run, _ in entries} | {e.settings.get("videos", "") for _, e in entries}


def completions_of(prediction, labelled) -> list[tuple]:
    """What each evaluation's model wrote to a grounding row."""
    return [(label, p["completion"]) for label, predictions in labelled for p in predictions
            if p["task"] == "tvg" and p["sample"] == 0 and row_of(p) == row_of(prediction)]


def errors_of(run, sets) -> dict | None:
    """The error analysis of the largest set of grounding rows."""
    for entries in sets:
        folders = folders_of(entries)
        newest = [(label, [p | {"video": analysis.video_of(p, folders)} for p in rows])
                  for label, rows in last_of_each_run(entries)]
        if analysis.grounding(newest[0][1]):
            changed = []
            for theirs, rows in newest[1:]:
                won, lost = analysis.changed_rows(newest[0][1], rows)
                for title, found in ((f"rows that {newest[0][0]} wins over {theirs}", won),
                                     (f"rows that {theirs} wins over {newest[0][0]}", lost)):
                    changed.append({"title": title, "ours": newest[0][0], "theirs": theirs, "rows": found})
            return {"labels": [label for label, _ in newest], "changed": changed,
                    "table": analysis.error_table(newest, analysis.training_queries(run))}
    return None
