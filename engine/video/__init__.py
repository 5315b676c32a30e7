"""Videos: which frames are taken, how they are decoded, and by which processes."""

from engine.video.frames import read_video

__all__ = ["read_video"]
