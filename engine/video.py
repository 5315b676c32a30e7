"""Videos: the frames nearest to regular times, decoded by PyAV, with their true times and sampling rate.

T frames of H x W pixels; two frames make one grid step, and 28 x 28 pixels of it one visual token. Times are seconds.
"""

import functools
import math
from typing import NamedTuple

import av
import numpy as np
import torch

SIDE = 28  # frame sides are multiples of 28 pixels: Qwen2.5-VL merges 2 x 2 patches of 14 x 14 into a token
MAX_PIXELS = 3584 * SIDE**2  # a video's budget over its two-frame grids: 3,584 tokens (Appendix C: "2.8 million")
MIN_FRAME_PIXELS, MAX_FRAME_PIXELS = 16 * SIDE**2, 768 * SIDE**2
MAX_FRAMES = 768


class VideoError(RuntimeError):
    """A video file that cannot be read; the message names it."""


class Clip(NamedTuple):
    """Sampled frames (T, 3, H, W) uint8, their true times (T,) in the video's seconds, and the sampling rate in Hz."""

    frames: torch.Tensor
    times: np.ndarray  # not a tensor: a worker hands each of those over by a connection of its own
    fps: float


def read_video(path, fps=2.0, max_pixels=MAX_PIXELS, start=None, end=None,
               min_frame_pixels=MIN_FRAME_PIXELS, max_frame_pixels=MAX_FRAME_PIXELS):
    """Sample the frames nearest to t = start + k / fps seconds, up to `end` (default: the whole video).

    T is even, 2 to 768. A segment shorter than two frames is widened to 1 / fps seconds; a count that comes out odd
    is rounded up, its last target being `end` itself; over 768 frames the whole is sampled at a lower rate, which
    `fps` of the result states. With `start`, decoding begins at the key frame before it; what no wanted frame needs
    is not decoded, and only wanted frames are converted, to RGB and their size in one pass.

    Raises VideoError naming the file when it cannot be decoded.
    """
    try:
        with av.open(str(path)) as container:
            video = _Timed(container)
            start = start or 0.0
            end = math.inf if end is None else max(end, start + 1 / fps)
            packets, at_end, seek_to = _scan_packets(video, start, end)
            known_times = np.sort([packet.time for packet in packets])
            if at_end:
                last_frame_lasts = (known_times[-1] - known_times[0]) / max(1, len(known_times) - 1) or 1 / fps
                end = min(end, known_times[-1] + last_frame_lasts)
            targets, fps = _targets(start, end, fps)
            size = functools.cache(functools.partial(
                fit_size, frames=len(targets), max_pixels=max_pixels,
                min_frame_pixels=min_frame_pixels, max_frame_pixels=max_frame_pixels))
            nearest = _nearest_times(known_times, targets)
            plan = _skip_plan(packets, nearest, video.decoder.has_b_frames)
            video.seek(min(seek_to, targets[0]))
            frames, times = _decode_nearest(video, plan, targets, size)
            if plan and not (len(times) and (abs(times - targets) <= abs(nearest - targets)).all()):
                # A wanted packet held no frame, or a damaged one: look at every frame there is.
                video.seek(min(seek_to, targets[0]))
                frames, times = _decode_nearest(video, {}, targets, size)
            if not len(times):
                raise ValueError("no frame of it decodes")
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise VideoError(f"{path}: cannot be decoded as a video ({error}).") from error
    return Clip(torch.from_numpy(frames), times, fps)


class _Timed:
    """A container's first video stream, seen in seconds from the player's zero."""

    def __init__(self, container):
        self.container = container
        self.stream = container.streams.video[0]
        self.unit = float(self.stream.time_base)  # seconds
        self.origin = (container.start_time or 0) / av.time_base  # seconds
        self.decoder = self.stream.codec_context
        if self.decoder is None:
            raise ValueError("its codec is unknown")
        # Workers, where torch has one thread, are the parallelism; in a process alone, more pay on large frames.
        pixels = self.decoder.width * self.decoder.height
        self.decoder.thread_count = min(16, torch.get_num_threads(), 1 + pixels // 2**17)
        self.decoder.thread_type = "FRAME"
        self.decoder.open()  # before anything is skipped: dav1d (AV1) keeps to what it is opened with

    def seconds(self, stamp):
        return stamp * self.unit - self.origin

    def time_of(self, packet_or_frame):
        """Presentation time; some containers (AVI) state only the decoding time."""
        stamp = packet_or_frame.pts
        if stamp is None:
            stamp = packet_or_frame.dts
        return None if stamp is None else self.seconds(stamp)

    def seek(self, t):
        self.container.seek(int((t + self.origin) / self.unit), stream=self.stream, backward=True)

    def frames(self, plan):
        """Decode from here on, as `plan` (see `_skip_plan`) says where it says anything, in order of presentation."""
        wanted = sum(skip == "DEFAULT" for skip in plan.values())
        gap = False
        for packet in self.container.demux(self.stream):
            skip = plan.get(packet.pts)
            if skip == "ALL":
                gap = True
                continue
            if gap:  # the next packet is a key frame: go on as after a seek
                yield from self.decoder.decode(None)
                self.decoder.flush_buffers()
                gap = False
            self.decoder.skip_frame = skip or "DEFAULT"
            yield from packet.decode()
            wanted -= skip == "DEFAULT"
            if plan and not wanted:
                yield from self.decoder.decode(None)
                break


class _Packet(NamedTuple):
    """What demultiplexing alone tells of a frame."""

    time: float  # of presentation, seconds
    stamp: int | None  # the same in the stream's units, where the container states it
    is_key: bool


def _scan_packets(video, start, end):
    """Packets from the key frame before `start` to `end`, by demultiplexing alone: nothing is decoded.

    Headers lie about duration and rate often enough that only packets are believed. Returns (packets in decoding order,
    whether the file ended, the time to seek to).
    """
    for back in (0, 4, 16, math.inf):
        seek_to = max(0.0, start - back)
        packets = []
        at_end = True
        video.seek(seek_to)
        for packet in video.container.demux(video.stream):
            t = video.time_of(packet)
            begun = packets or packet.is_keyframe or not seek_to
            if packet.size and t is not None and begun:
                packets.append(_Packet(t, packet.pts, packet.is_keyframe))
            # Packets come in decoding order: once dts is past `end`, so is every later presentation time.
            if packet.dts is not None and video.seconds(packet.dts) > end:
                at_end = False
                break
        # Then from further back: MPEG-TS seeks past the key frame, and one frame alone does not tell how long it lasts.
        is_complete = packets and packets[0].time <= start and (len(packets) > 1 or not at_end)
        if not start or is_complete:
            break
    if not packets:
        raise ValueError("it holds no frame")
    return packets, at_end, seek_to


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


def _skip_plan(packets, nearest, reordered):
    """How to decode the packets, by their time stamps, so that the frames at the `nearest` times come out.

    "DEFAULT": wanted. "NONREF": needed only if other frames may refer to it. "ALL": left out, as nothing wanted
    follows before the next key frame. Empty, which is to decode everything, when stamps do not tell packets apart or,
    frames being `reordered`, are in the order of decoding (AVI).
    """
    stamps = [packet.stamp for packet in packets]
    if None in stamps or len(set(stamps)) < len(stamps) or reordered and stamps == sorted(stamps):
        return {}
    wanted = set(nearest)
    plan = {}
    needed = False  # by a wanted frame that comes later in the file
    earliest = math.inf  # time of the wanted frames between here and the next key frame
    for packet in reversed(packets):
        is_wanted = packet.time in wanted
        if is_wanted:
            needed = True
            earliest = min(earliest, packet.time)
        plan[packet.stamp] = "DEFAULT" if is_wanted else "NONREF" if needed else "ALL"
        if packet.is_key:
            # Open group of pictures: frames stored after this key frame but shown before it may refer to earlier ones.
            needed = earliest < packet.time
            earliest = math.inf
    return plan


def _decode_nearest(video, plan, targets, size):
    """Decode from here on; convert only the frames nearest to the targets -> ((T, 3, H, W) uint8, times (T,))."""
    images = []
    times = []
    before = None  # (time, frame) of the frame before this one
    reformatter = av.video.reformatter.VideoReformatter()  # one scaler a video: making it costs more than using it

    def keep(t, frame):
        if times and times[-1] == t:  # low frame rates: one frame is nearest to several targets
            images.append(images[-1])
        else:
            quarter_turns = round(frame.rotation / 90) % 4  # anticlockwise, from the container's display matrix
            if quarter_turns % 2:  # the size is chosen for the picture as it is seen, and scaled as it is stored
                stored_width, stored_height = size(frame.width, frame.height)
            else:
                stored_height, stored_width = size(frame.height, frame.width)
            image = reformatter.reformat(frame, stored_width, stored_height, format="rgb24", interpolation="BICUBIC",
                                         threads=1)
            images.append(np.rot90(image.to_ndarray(), quarter_turns).transpose(2, 0, 1))
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


def fit_size(height, width, frames, max_pixels=MAX_PIXELS, min_frame_pixels=MIN_FRAME_PIXELS,
             max_frame_pixels=MAX_FRAME_PIXELS):
    """-> (height, width), multiples of 28 near the aspect ratio, for `frames` frames within the video's budget.

    The budget counts two-frame grids, so a frame may hold 2 * max_pixels / frames pixels, at most `max_frame_pixels`.
    That limit is never below `min_frame_pixels` (by default 16 tokens a grid): beyond 448 frames, 224 s at 2 FPS, a
    long video therefore exceeds `max_pixels` (up to 6,144 tokens at 768 frames) instead of becoming unrecognisable.
    """
    most = max(min(max_frame_pixels, 2 * max_pixels // frames), min_frame_pixels)
    h = max(SIDE, round(height / SIDE) * SIDE)
    w = max(SIDE, round(width / SIDE) * SIDE)
    if h * w < min_frame_pixels:
        scale = math.sqrt(min_frame_pixels / (height * width))
        h, w = (math.ceil(side * scale / SIDE) * SIDE for side in (height, width))
    if h * w > most:
        scale = math.sqrt(most / (height * width))
        h, w = (max(SIDE, math.floor(side * scale / SIDE) * SIDE) for side in (height, width))
    return h, w


@functools.cache
def video_duration(path):
    """Seconds from a container's header; None where it states none or cannot be opened."""
    try:
        with av.open(path) as container:
            return container.duration / av.time_base if container.duration else None
    except (av.error.FFmpegError, OSError):
        return None
