"""Videos: the frames nearest to regular times, decoded by PyAV, with their true times and sampling rate.

T frames of H x W pixels; two frames make one grid step, and 28 x 28 pixels of it one visual token. Times are seconds.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import av
import numpy as np
import torch

from engine.program.settings import UserError
from engine.video.packets import end_of_pictures, scan_packets, skip_plan
from engine.video.stream import Stream

SIDE = 28  # frame sides are multiples of 28 pixels: Qwen2.5-VL merges 2 x 2 patches of 14 x 14 into a token
MAX_PIXELS = 3584 * SIDE**2  # a video's budget over its two-frame grids: 3,584 tokens (Appendix C: "2.8 million")
MIN_FRAME_PIXELS, MAX_FRAME_PIXELS = 16 * SIDE**2, 768 * SIDE**2
MAX_FRAMES = 768


class VideoError(UserError):
    """A video file that cannot be read; the message names it."""


class Clip(NamedTuple):
    """Sampled frames (T, 3, H, W) uint8, their true times (T,) in the video's seconds, and the sampling rate in Hz."""

    frames: torch.Tensor
    times: np.ndarray  # not a tensor: a worker hands each of those over by a connection of its own
    fps: float
    end: float | None = None  # when the video's pictures end, seconds; None where the clip ends before


def read_video(path, fps=2.0, max_pixels=MAX_PIXELS, start=None, end=None,
               min_frame_pixels=MIN_FRAME_PIXELS, max_frame_pixels=MAX_FRAME_PIXELS, until=math.inf):
    """Sample the frames nearest to t = start + k / fps seconds, up to `end` (default: the whole video).

    T is even, 2 to 768. A segment shorter than two frames is widened to 1 / fps seconds, though not past `until`; a
    count that comes out odd is rounded up, its last target being `end` itself; over 768 frames the whole is sampled at
    a lower rate, which `fps` of the result states. With `start`, decoding begins at the key frame before it; what no
    wanted frame needs is not decoded, and only wanted frames are converted, to RGB and the size of the first one in one
    pass.

    Raises VideoError naming the file when it cannot be decoded, when a segment starts after the last picture's end,
    and when a frame that comes is further from its target than the file promises, by more than half a step of 1 / fps
    seconds: up to there, a damaged frame gives way to its neighbour.
    """
    try:
        with contextlib.closing(Stream(path)) as video:
            start = start or 0.0
            end = min(until, math.inf if end is None else max(end, start + 1 / fps))
            # From 1 / fps earlier: a segment at the video's end is widened to the left.
            packets, at_end, seek_to = scan_packets(video, max(0.0, start - 1 / fps), end)
            known_times = np.sort([packet.time for packet in packets if packet.is_shown])
            videos_end = None
            if at_end:
                videos_end = end_of_pictures(packets, video.stated_duration, 1 / fps)
                check_start(path, start, videos_end)
                end = min(end, videos_end)
            targets, fps = _targets(start, end, fps)
            size = functools.partial(fit_size, frames=len(targets), max_pixels=max_pixels,
                                     min_frame_pixels=min_frame_pixels, max_frame_pixels=max_frame_pixels)
            frames, times = _decode_checked(video, packets, seek_to, targets, _nearest_times(known_times, targets),
                                            0.5 / fps, size)
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise VideoError(f"{path}: cannot be decoded as a video ({error}).") from error
    return Clip(torch.from_numpy(frames), times, fps, videos_end)


def check_start(path, start, videos_end):
    """Raise VideoError where a segment starts after the video's last picture has ended."""
    if start > videos_end + 1e-6:
        raise VideoError(f"{path}: the segment starts at {start:g} s, after the video's end at {videos_end:g} s.")


def _decode_checked(video, packets, seek_to, targets, nearest, tolerance, size):
    """Decode the frames at the `nearest` times; where one does not come, look again -> `_decode_nearest`'s result.

    Raises ValueError where a frame stays further from its target than its nearest time, by over `tolerance` seconds.
    """
    plan = skip_plan(packets, nearest)
    looks = [({}, seek_to)]  # a wanted packet may hold no frame, or a damaged one: look at every frame there is
    if plan:
        looks.insert(0, (plan, seek_to))
    if seek_to:
        looks.append(({}, 0.0))
    for look, seek_from in looks:
        video.seek(seek_from)
        frames, times = _decode_nearest(video, look, targets, size)
        excess = abs(times - targets) - abs(nearest - targets) if len(times) else np.array([math.inf])
        if video.begins_whole and (not look or excess.max() <= 1e-6):
            break
    if not len(times):
        raise ValueError("no frame of it decodes")
    if excess.max() > tolerance:
        worst = excess.argmax()
        raise ValueError(f"for the frame at {nearest[worst]:g} s none nearer than that at {times[worst]:g} s decodes")
    return frames, times


def _targets(start, end, fps):
    """-> (target times (T,), true fps) for [start, end]; T even, 2 to MAX_FRAMES."""
    start = max(0.0, min(start, end - 1 / fps))  # a segment at the very end is widened to the left
    count = math.ceil((end - start) * fps - 1e-6)
    count = min(MAX_FRAMES, max(2, count + count % 2))
    if count == MAX_FRAMES:
        fps = min(fps, MAX_FRAMES / (end - start))
    return np.minimum(start + np.arange(count) / fps, end), fps


def _nearest_times(known_times, targets):
    """-> (T,) the nearest to each target among the sorted `known_times`; the earlier of two that are equally near."""
    i = np.searchsorted(known_times, targets)
    before = known_times[np.maximum(i - 1, 0)]
    after = known_times[np.minimum(i, len(known_times) - 1)]
    return np.where(abs(targets - before) <= abs(after - targets), before, after)


def _decode_nearest(video, plan, targets, size):
    """Decode from here on; convert only the frames nearest to the targets -> ((T, 3, H, W) uint8, times (T,))."""
    images = []
    times = []
    seen_size = None  # (height, width) of every frame as it is seen, from the first wanted one
    before = None  # (time, frame) of the frame before this one
    reformatter = av.video.reformatter.VideoReformatter()  # one scaler a video: making it costs more than using it

    def keep(t, frame):
        nonlocal seen_size
        if times and times[-1] == t:  # low frame rates: one frame is nearest to several targets
            images.append(images[-1])
        else:
            is_turned, flips = _orientation(frame)
            if seen_size is None:  # chosen for the picture as it is seen, while it is scaled as it is stored
                seen_size = size(frame.width, frame.height) if is_turned else size(frame.height, frame.width)
            height, width = seen_size[::-1] if is_turned else seen_size
            image = reformatter.reformat(frame, width, height, format="rgb24", interpolation="BICUBIC", threads=1)
            image = image.to_ndarray().transpose((2, 1, 0) if is_turned else (2, 0, 1))
            images.append(image[:, ::flips[0], ::flips[1]])
        times.append(t)

    for frame in video.frames(plan):
        t = video.time_of(frame)
        if t is None:
            continue
        while len(times) < len(targets) and targets[len(times)] <= t:
            target = targets[len(times)]
            earlier_is_nearer = before and target - before[0] <= t - target
            keep(*(before if earlier_is_nearer else (t, frame)))
        before = (t, frame)
        if len(times) == len(targets):
            break
    while before and len(times) < len(targets):  # targets after the last frame
        keep(*before)
    return np.array(images, order="C"), np.array(times)


def _orientation(frame):
    """How to turn a stored picture upright -> (whether rows become columns, then (1 or -1 down, 1 or -1 across)).

    From the container's display matrix, which maps a stored (x, y) to (a x + c y, b x + d y); -1 runs backwards.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, (1, 1)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # in units of 2**-16
    is_turned = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if is_turned else (a, d)
    return is_turned, (-1 if down < 0 else 1, -1 if across < 0 else 1)


def fit_size(height, width, frames, max_pixels=MAX_PIXELS, min_frame_pixels=MIN_FRAME_PIXELS,
             max_frame_pixels=MAX_FRAME_PIXELS):
    """-> (height, width), multiples of 28 near the aspect ratio, for `frames` frames within the video's budget.

    The budget counts two-frame grids, so a frame may hold 2 * max_pixels / frames pixels, at most `max_frame_pixels`.
    That limit is never below `min_frame_pixels` (by default 16 tokens a grid): beyond 448 frames, 224 s at 2 FPS, a
    long video therefore exceeds `max_pixels` (up to 6,144 tokens at 768 frames) instead of becoming unrecognisable.
    """
    most = max(min(max_frame_pixels, 2 * max_pixels / frames), min_frame_pixels)
    h = max(SIDE, round(height / SIDE) * SIDE)
    w = max(SIDE, round(width / SIDE) * SIDE)
    if h * w < min_frame_pixels:
        scale = math.sqrt(min_frame_pixels / (height * width))
        h, w = (math.ceil(side * scale / SIDE) * SIDE for side in (height, width))
    if h * w > most:
        scale = math.sqrt(most / (height * width))
        h, w = (max(SIDE, math.floor(side * scale / SIDE) * SIDE) for side in (height, width))
    return h, w
