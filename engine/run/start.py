"""How the model that a program starts with was trained, which holds where the command line is silent.

One rule for training, evaluation and the page: an option of the command line counts, else what the start's run.json
notes, else the default. A start without run.json changes nothing.
"""

import os
from pathlib import Path

from engine.model.loading import find_model, newest_checkpoint
from engine.program.earlier import as_today
from engine.program.lookup import is_ours
from engine.program.settings import UserError, option
from engine.run.checkpoints import read_run

# How videos are sampled, answers laid out, and what grounding is asked for. vd_match is not among these: it says what
# counts as right, for every model alike.
TRAINED_WITH = ("fps", "max_pixels", "min_frame_pixels", "max_frame_pixels", "max_new_tokens", "inversion_format",
                "tvg_format", "tvg_reward")


def from_start(settings, given=()) -> dict:
    """The options, not `given` on the command line, with which the model of `settings` was trained.

    An evaluation also measures the tasks of one's own that it learned. Prints what is no default. Raises UserError
    where there is no such model, or where an option names an object from outside this repository.
    """
    return _inherited(_record_of(settings.model), settings, given)


def from_run(settings, given=()) -> dict:
    """The same for training: where --output holds a run to go on with, that run's options count, not its start's."""
    checkpoint = newest_checkpoint(settings.output)
    if checkpoint:
        try:
            return _inherited(checkpoint / "run.json", settings, given)
        except UserError:  # damaged, or with a reward that the command line must name: `open_run` says so
            pass
    return from_start(settings, given)


def _record_of(model) -> Path | None:
    """The run.json of a folder, of its newest checkpoint or of a hub's model, without its weights; None if it has none.

    The hub is asked where the model is not on this machine.
    """
    if Path(model).is_dir():
        try:
            record = find_model(model) / "run.json"
        except OSError as error:
            raise UserError(str(error)) from error
        return record if record.is_file() else None
    from huggingface_hub import snapshot_download  # not above: a mistyped option should not wait for it

    for here in (True, False):
        try:
            record = Path(snapshot_download(model, allow_patterns="run.json", local_files_only=here)) / "run.json"
            return record if record.is_file() else None
        except OSError:  # it is not here, or the hub cannot be reached: `find_model` will say so
            continue
        except ValueError as error:
            raise UserError(f"--model {model}: there is no such folder, and it is no hub id ({error}); give one of "
                            "these.") from error
    return None


def _inherited(record, settings, given) -> dict:
    if record is None:
        return {}
    noted = as_today(read_run(record.parent)["config"])
    taken = {name: noted[name] for name in TRAINED_WITH if name in noted}
    own_tasks = tuple(task for task in noted.get("inversion_tasks", ()) if "." in task)
    if own_tasks and hasattr(settings, "tasks") and not settings.video:
        taken["tasks"] = type(settings).tasks + own_tasks
    taken = {name: value for name, value in taken.items() if name not in given}
    texts = []
    for name, value in taken.items():
        words = value if isinstance(value, tuple) else (value,)
        text = " ".join([option(name), *map(str, words)])
        for word in words:
            if isinstance(word, str) and "." in word and not is_ours(word, record):
                raise UserError(f"{record}: names {word}, which is not of this repository and is imported only where "
                                f"the command line names it; if you trust it, give {text}.")
        if value != getattr(type(settings), name):
            texts.append(text)
    if texts and os.environ.get("RANK", "0") == "0":
        print(f"from {record}, where the command line does not say otherwise: {' '.join(texts)}")
    return taken
