"""Where the video of an annotation is: names are looked up in the folder of --videos."""

import functools
import json
import os
from pathlib import Path

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
        if not allowed:
            raise UserError(f"{len(missing)} of {len({s.video for s in samples})} videos are missing (named above); "
                            "see --videos, or go on without them with --allow-missing-videos.")


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


def video_finder(video_dir):
    """-> find(name): the path of an annotation's video id or path in `video_dir`, whatever the container's suffix.

    A name that exists as it stands is taken. One that names a folder is looked up there and then in `video_dir`.
    """
    @functools.cache
    def files_of(folder):
        """The files of a folder, by name and by name without suffix."""
        try:
            files = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
        except (OSError, ValueError):  # there is none of that name, or the name can be none
            return {}, {}
        videos = [Path(file) for file in files if Path(file).suffix.lower() in VIDEO_SUFFIXES]
        videos.sort(key=lambda video: VIDEO_SUFFIXES.index(video.suffix.lower()), reverse=True)
        return {file: folder / file for file in files}, {video.stem: folder / video for video in videos}

    def find(name):
        folders, file = name_parts(name)
        stem = file.removesuffix(Path(file).suffix) if Path(file).suffix.lower() in VIDEO_SUFFIXES else file
        for folder in (Path(video_dir, folders), Path(video_dir)):
            files, stems = files_of(folder)
            if file in files or stem in stems:
                return str(files.get(file) or stems[stem])
        return str(Path(video_dir, file if stem != file else f"{file}.mp4"))

    return find
