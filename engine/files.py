"""Files that a crash cannot spoil: flushed writes, checksums, the lock of an output folder, strict JSON."""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import socket
from pathlib import Path

from engine.settings import UserError

MANIFEST = "manifest.json"  # of a checkpoint: the size and the SHA-256 of every other file in it
LOCK = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that know no locks


def strict_json(value) -> str:
    """JSON in one line, in which a number that is not finite is null: JSON has no NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network file systems answer for a folder
            raise
    finally:
        os.close(descriptor)


def write_text(path, text):
    """Write a file in one piece: after a crash it is the old one or the new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def iteration_of(folder) -> int | None:
    """The number in checkpoint-000123 or eval-000123; None for another name, such as an unfinished checkpoint's."""
    number = folder.name.partition("-")[2]
    return int(number) if number.isdecimal() else None


def cut_log(path, start):
    """Cut a jsonl where the lines of iteration `start` begin, or where a crash has cut a line off.

    Raises UserError where a line before that place is no line of a log.
    """
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"}\n"):
                break
            try:
                if json.loads(line)["iteration"] >= start:
                    break
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: holds a line that is no log's ({error!r}); mend it, or move the file away."
                                ) from error
            end += len(line)
    os.truncate(path, end)


# ------------------------------------------------------------------------------------------------ checksums


def seal(paths) -> dict:
    """Flush files -> {name: {"bytes", "sha256"}}, an entry of a manifest for each."""
    entries = {}
    for path in paths:
        flush(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def damage(folder, part=0, parts=1) -> str | None:
    """How a checkpoint's files differ from its manifest, in words; None if they do not.

    Sizes are compared first. Of the checksums this reads every `parts`-th file, beginning with number `part`.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in sorted(files.items())}
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} is no manifest"
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


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ one output, one run


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of an output folder. Raises UserError, which names host and process, while another one holds it.

    The operating system keeps the lock: it ends with its process, however that ends, on this host or over NFS. (A
    lock by fcntl, not flock: workers that are forked would inherit that one, and hold it after their program's death.)
    Where a file system has no locks, the file's text decides: it counts unless its process was on this host and is
    gone.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror}); name another folder.") from error
    with file:
        file.seek(0)
        holder = file.read()
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            free = error.errno in NO_LOCKS and _is_gone(holder)
        if not free:
            raise UserError(f"--output {folder} is in use by {holder.strip() or 'another process'}; wait for it or "
                            f"name another folder (if it is gone for certain, remove {folder / LOCK}).")
        file.truncate(0)
        since = datetime.datetime.now().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on host {socket.gethostname()} since {since}\n")
        file.flush()
        yield
        file.truncate(0)


def _is_gone(holder):
    """Whether the process that a lock's text names has ended; of another host's nothing is known."""
    words = holder.split()
    if len(words) < 5:
        return not words
    if words[4] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False
