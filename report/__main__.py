"""Write a page about a run, RUN_DIR/report.html, that needs no network:

    python -m report RUN_DIR [--against OTHER ...] [--open] [--watch]
    python -m report RUN_DIR [--against OTHER ...] --video FILE --query SENTENCE [SENTENCE ...]

RUN_DIR and OTHER are the --output of invert4tvg.py or of evaluate.py; a run may be going on. The first time:
pip install -r report/requirements.txt
"""

import sys
import time
import webbrowser
from pathlib import Path

from engine.program.settings import UserError, command_line
from engine.video.frames import VideoError

MAX_RUNS = 6  # as many as there are colours


def parse(argv=None):
    parser = command_line("report", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", help="the --output of a run or of an evaluation")
    parser.add_argument("--against", metavar="OTHER", nargs="+", default=[], help="others to set beside it")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--watch", action="store_true", help="write the page anew every minute until the run ends")
    parser.add_argument("--video", metavar="FILE", help="a video of your own, for a film strip")
    parser.add_argument("--query", metavar="SENTENCE", nargs="+", default=[], help="what to look for in it")
    parser.add_argument("--tvg-reward", metavar="MODULE.NAME", nargs="+", default=[],
                        help="with --video: rewards of your own that the runs were trained with, to be imported")
    args = parser.parse_args(argv)
    if bool(args.video) != bool(args.query):
        parser.error("--video and --query belong together; give both or neither")
    if len(args.against) >= MAX_RUNS:
        parser.error(f"--against names {len(args.against)} folders; a page shows {MAX_RUNS - 1} beside the run")
    return args


def names_of(folders) -> list[str]:
    """A short name for each folder: its last part, with the one before it where two are the same."""
    paths = [Path(folder).resolve() for folder in folders]
    last = [path.name for path in paths]
    return [path.name if last.count(path.name) == 1 else "/".join(path.parts[-2:]) for path in paths]


def write_page(args) -> tuple[Path, bool]:
    """-> (the page's file, whether the run is still going)."""
    from report.page import make_page
    from report.runs import read_run_folder, state

    folders = [args.run, *args.against]
    runs = [read_run_folder(folder, name) for folder, name in zip(folders, names_of(folders))]
    if args.video:
        from report.own import look

        for run in runs:
            run.evaluations.append(look(run, args.video, args.query, args.tvg_reward))
    page = runs[0].folder / "report.html"
    page.write_text(make_page(runs, args.watch), encoding="utf-8")
    return page, bool(runs[0].log) and state(runs[0])["status"] == "running"


def has_begun(folder) -> bool:
    """Whether a run has finished an iteration; before the first there may be a log with a measurement alone.

    An evaluation has begun with its first prediction.
    """
    from report.runs import is_evaluation, read_jsonl

    return is_evaluation(folder) or any(row["task"] != "eval" for row in read_jsonl(Path(folder) / "metrics.jsonl"))


def write_pages(args):
    """One page, or with --watch one a minute until the run ends."""
    running = True
    opened = False
    for folder in (args.run, *args.against) if args.watch else ():
        if not has_begun(folder):
            print(f"waiting for the first iteration in {folder}", flush=True)
        while not has_begun(folder):
            time.sleep(1)
    while running:
        page, running = write_page(args)
        if args.open and not opened:
            webbrowser.open(page.resolve().as_uri())
            opened = True
        if not args.watch:
            break
        time.sleep(60 if running else 0)
    print(f"open this: {page.resolve()}")


def main(argv=None):
    args = parse(argv)
    try:
        write_pages(args)
    except ImportError as error:
        sys.exit(f"report: {error}; pip install -r report/requirements.txt installs what the page needs.")
    except (UserError, VideoError, OSError) as error:
        sys.exit(f"report: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
