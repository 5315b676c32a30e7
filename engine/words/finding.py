"""Where the video of an annotation is: names are looked up in the folder of --videos, and in those inside it."""

import functools
import json
import os
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from engine.program.ranks import say
from engine.program.settings import UserError
from engine.words.formats import RowError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".3gp", ".mpg", ".mpeg", ".wmv", ".flv", ".ts",
                  ".gif")  # where two files share a name, the first of these is taken


def missing_videos(samples):
    """-> the sorted paths of `samples` that are no files."""
    return sorted(video for video in {s.video for s in samples} if not os.path.isfile(video))


def report_missing(samples, allowed):
    """List the videos that are not there; raise UserError unless that is `allowed`."""
    missing = missing_videos(samples)
    if missing:
        folder = Path(missing[0]).parent
        if not folder.is_dir():
            raise UserError(f"--videos {folder}: there is no such folder; name the one that holds the video files.")
        names = missing[:20] + ([f"and {len(missing) - 20} more"] if len(missing) > 20 else [])
        say("missing: " + "\nmissing: ".join(names))
        count = len({s.video for s in samples})
        what = f"the folder {contents_of(folder)}" if len(missing) == count else "these are named above"
        if not allowed:
            raise UserError(f"--videos {folder}: {len(missing)} of {count} videos are missing, and {what}; name the "
                            "folder that holds them, or go on without them with --allow-missing-videos.")


def contents_of(folder) -> str:
    """What is in a folder and in those inside it, in words."""
    paths = [path for scanned in scan_all(folder) for path in scanned.files.values()]
    videos = [path for path in paths if is_video(path)]
    if videos:
        return f"holds {len(videos)} others, {videos[0].relative_to(folder)} among them"
    if paths:
        return f"holds no video but {len(paths)} other files, {paths[0].relative_to(folder)} among them"
    return "is empty"


def name_parts(name):
    """An annotation's name of a video -> (the folders that it names, the name of the file).

    Folders count only inside the video folder: "charades/x.mp4" has one, "/data/x.mp4" and "../x.mp4" have none.
    """
    if not isinstance(name, str):
        raise RowError(f"the video {json.dumps(name)[:60]} is no name")
    *folders, file = name.replace("\\", "/").split("/")
    if file in ("", ".", ".."):
        raise RowError(f'the video "{name}" is no name')
    outside = folders and (not folders[0] or folders[0].endswith(":"))  # from the root, or from a drive
    if outside or ".." in folders:
        return "", file
    return "/".join(folder for folder in folders if folder not in ("", ".")), file


# ------------------------------------------------------------------------------------------------ the folder


class Scanned(NamedTuple):
    """What a folder holds. Names are in Unicode's composed form, in which annotations mostly are, and disks often not.
    """

    files: dict  # name -> path
    videos: dict  # name without suffix -> path
    folders: list  # paths


def scan(folder) -> Scanned:
    """One folder; nothing where there is none of that name, or where it cannot be read."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (OSError, ValueError):  # a name may be none for a file system
        return Scanned({}, {}, [])
    files = {composed(entry.name): folder / entry.name for entry in entries if entry.is_file()}
    videos = [path for path in files.values() if is_video(path)]
    videos.sort(key=lambda path: VIDEO_SUFFIXES.index(path.suffix.lower()), reverse=True)
    folders = [folder / entry.name for entry in entries if entry.is_dir()]
    return Scanned(files, {composed(path.stem): path for path in videos}, folders)


def scan_all(folder):
    """Yield what a folder and each one inside it hold; links are followed, in a circle only once."""
    waiting = [Path(folder)]
    visited = set()
    while waiting:
        folder = waiting.pop()
        if os.path.realpath(folder) not in visited:
            visited.add(os.path.realpath(folder))
            scanned = scan(folder)
            yield scanned
            waiting += reversed(scanned.folders)


def is_video(path):
    return path.suffix.lower() in VIDEO_SUFFIXES


def composed(name):
    return unicodedata.normalize("NFC", name)


def video_finder(video_dir):
    """-> find(name): the path of an annotation's video id or path in `video_dir`, whatever the container's suffix.

    A name that exists as it stands is taken. One that names a folder is looked up there, then in `video_dir`, and at
    last in all folders inside, of which those come first that end in the named one. `find` raises UserError where two
    of these hold it.
    """
    scanned = functools.cache(scan)

    @functools.cache
    def everywhere():
        """File names, and names of videos without suffix -> the folders that hold one."""
        places = defaultdict(set)
        for inside in scan_all(video_dir):
            for name, path in (*inside.files.items(), *inside.videos.items()):
                places[name].add(path.parent)
        return places

    def find(name):
        folders, file = name_parts(name)
        file = composed(file)
        stem = file.removesuffix(Path(file).suffix) if is_video(Path(file)) else file

        def look(folder):
            inside = scanned(folder)
            return inside.files.get(file) or inside.videos.get(stem)

        for folder in (Path(video_dir, folders), Path(video_dir)):
            if look(folder):
                return str(look(folder))
        places = sorted(place for place in everywhere()[file] | everywhere()[stem] if look(place))
        places = [place for place in places if f"/{place.as_posix()}".endswith(f"/{folders}")] or places
        if len(places) > 1:
            raise UserError(f"--videos {video_dir}: holds {file} twice, as {look(places[0])} and {look(places[1])}; "
                            "move one of them away, or name the folder that is meant.")
        if places:
            return str(look(places[0]))
        return str(Path(video_dir, file if stem != file else f"{file}.mp4"))

    return find
