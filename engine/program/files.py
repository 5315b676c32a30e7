"""Files that a crash cannot spoil: flushed writes, the lock of an output folder, strict JSON."""

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import socket
from pathlib import Path

from engine.program.settings import UserError

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
