"""What a video's packets tell before decoding: when its pictures are shown, when they end, which ones to decode.

Times are seconds from the player's zero; stamps are times in the stream's own units. `video` is a
stream.Stream.
"""

import math
from typing import NamedTuple

import numpy as np


class Packet(NamedTuple):
    """What demultiplexing alone tells of a frame."""

    time: float  # of presentation, seconds
    stamp: int | None  # the same in the stream's units, where the container states it
    is_key: bool = False
    is_shown: bool = True  # or else, before an mp4's edit list begins, only referred to
    duration: float = 0.0  # seconds; 0 where the container states none


def scan_packets(video, start, end):
    """Packets from the key frame before `start` to `end`, by demultiplexing alone where that tells the order shown.

    Headers lie about duration and rate often enough that only packets are believed. Returns (packets in decoding order,
    whether the file ended, the time to seek to).
    """
    for back in (0, 4, 16, math.inf, math.inf):
        seek_to = max(0.0, start - back)
        video.seek(seek_to)
        packets, at_end = _packets_until(video, end)
        if packets and (video.hides_order or None in [packet.stamp for packet in packets]):
            video.order = _order_shown(video)
            return [Packet(video.seconds(stamp), None) for stamp in video.order], True, 0.0
        # Then from further back: MPEG-TS seeks past the key frame, and one frame alone does not tell how long it lasts.
        is_complete = packets and packets[0].time <= start and (len(packets) > 1 or not at_end)
        if is_complete or packets and not seek_to:
            break
        video.needs_key = bool(packets or seek_to)  # no key frame in the whole file: then do without
    if not any(packet.is_shown for packet in packets):
        raise ValueError("it holds no frame")
    return packets, at_end, seek_to


def _packets_until(video, end):
    """-> (packets from here to the first one shown after `end`, in decoding order; whether the file ended)."""
    packets = []
    dts_before = -math.inf  # seconds
    after_end = math.inf  # the first time past `end`, seconds
    for packet in video.packets():
        t = video.time_of(packet)
        if packet.size:
            t = 0.0 if t is None else t
            duration = (packet.duration or 0) * video.unit
            packets.append(Packet(t, packet.pts, packet.is_keyframe, not packet.is_discard, duration))
            if t > end:
                after_end = min(after_end, t)
        if packet.dts is None:
            continue
        dts = video.seconds(packet.dts)
        if dts < dts_before - 1:
            raise ValueError(f"it is joined of parts: its times go back from {dts_before:g} to {dts:g} s")
        dts_before = dts
        if dts >= after_end:  # packets come in decoding order: no later one is shown before its dts
            return packets, False
    return packets, True


def _order_shown(video):
    """Decode everything -> the stamps of the pictures in the order in which they are shown.

    AVI and ASF state only the packets' places: the k-th picture is shown at the k-th place. Elsewhere pictures between
    two that have stamps are spaced evenly.
    """
    video.seek(0.0)
    stated = []  # by the packets
    own = []  # by the packet that each picture comes from
    for packet in video.packets():
        packet.opaque = packet.dts if video.hides_order else packet.pts
        if packet.size:
            stated.append(packet.opaque)
        own += [frame.opaque for frame in packet.decode()]
    if None not in stated and len(stated) == len(own):
        return sorted(stated)
    ranks = [k for k, stamp in enumerate(own) if stamp is not None]
    if not ranks:
        raise ValueError("its frames have no times")
    known = sorted(stamp for stamp in own if stamp is not None)
    step = (known[-1] - known[0]) / max(1, ranks[-1] - ranks[0])
    ranks.append(len(own))
    known.append(known[-1] + step * (len(own) - ranks[-2]))
    return np.interp(range(len(own)), ranks, known).round().astype(int).tolist()


def end_of_pictures(packets, stated_duration, default):
    """When the last picture ends, seconds: as its packet states, if that is plausible.

    It is not where it is shorter than every other picture (a nominal rate's) or ends after the container's stated
    duration (0: none). Then the picture lasts as long as the mean of the others, or `default` if it is the only one.
    """
    shown = sorted((packet for packet in packets if packet.is_shown), key=lambda packet: packet.time)
    last = shown[-1]
    gaps = np.diff([packet.time for packet in shown])
    mean = (last.time - shown[0].time) / max(1, len(gaps)) or default
    is_nominal = len(gaps) and last.duration < 0.9 * gaps.min()
    is_too_long = stated_duration and last.time + last.duration > stated_duration + mean
    return last.time + (mean if not last.duration or is_nominal or is_too_long else last.duration)


def skip_plan(packets, nearest):
    """How to decode the packets, by their time stamps, so that the frames at the `nearest` times come out.

    "DEFAULT": wanted. "NONREF": needed only if other frames may refer to it. "ALL": left out, as nothing wanted
    follows before the next key frame. Empty, which is to decode everything, when stamps do not tell packets apart.
    """
    stamps = [packet.stamp for packet in packets]
    if None in stamps or len(set(stamps)) < len(stamps):
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
