"""Whether a checkpoint is as it was written: a manifest holds the size and the SHA-256 of each of its files."""

import hashlib
import json
import shutil
from pathlib import Path

import torch.distributed as dist

from engine.model.loading import weight_files
from engine.program.files import flush, iteration_of
from engine.program.ranks import gather, on_rank_0, say
from engine.program.settings import UserError

MANIFEST = "manifest.json"  # of a checkpoint: the size and the SHA-256 of every other file in it


def seal(paths) -> dict:
    """Flush files -> {name: {"bytes", "sha256"}}, an entry of a manifest for each."""
    entries = {}
    for path in paths:
        flush(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def damage(folder, part=0, parts=1, only=None) -> str | None:
    """How a checkpoint's files (or `only` these paths of it) differ from its manifest, in words; None if they do not.

    Sizes are compared first. Of the checksums this reads every `parts`-th file, beginning with number `part`.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in sorted(files.items())}
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} is no manifest"
    if only is not None:
        expected = {name: entry for name, entry in expected.items() if folder / name in only}
    for name, (size, _) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    for name in list(expected)[part::parts]:
        try:
            if _sha256(folder / name) != expected[name][1]:
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def weights_damage(folder) -> str | None:
    """As `damage`, of those weights alone that are still there; each rank reads a share, and all get the answer."""
    reason = damage(folder, dist.get_rank(), dist.get_world_size(), only=weight_files(folder))
    return next(filter(None, gather(reason)), None)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_whole(output):
    """-> the newest checkpoint whose files are as they were written, or None; damaged ones are named and put aside.

    Every rank reads a share of the files. Raises UserError where checkpoints are there and none is whole.
    """
    ours = [path for path in Path(output).glob("checkpoint-*")
            if iteration_of(path) is not None and ((path / MANIFEST).exists() or (path / "run.json").exists())]
    damaged = []
    for checkpoint in gather(sorted(ours, key=iteration_of, reverse=True))[0]:
        reasons = gather(damage(checkpoint, dist.get_rank(), dist.get_world_size()))
        reason = next(filter(None, reasons), None)
        if reason is None:
            on_rank_0(_put_aside, damaged)
            return checkpoint
        say(f"{checkpoint} is damaged: {reason}.")
        damaged.append(checkpoint)
    if damaged:
        raise UserError(f"--output {output}: no checkpoint there is whole ({reason} in {damaged[-1].name}); name "
                        "another folder to begin anew.")
    return None


def _put_aside(checkpoints):
    """Rename damaged checkpoints, which would else be taken for newer ones."""
    for checkpoint in checkpoints:
        aside = checkpoint.with_suffix(".damaged")
        if aside.exists():
            shutil.rmtree(aside)
        checkpoint.rename(aside)
