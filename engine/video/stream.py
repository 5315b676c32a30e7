"""One video file, opened: which stream, in which order its pictures come, how to seek and decode in it."""

import functools

import av
import torch


class Stream:
    """A file's video stream, seen in seconds from the player's zero."""

    def __init__(self, path):
        self.path = str(path)
        self.index = None  # of the stream among the container's
        self.begun_at = None  # the stamp of the key frame that is to be the next picture, where decoding began anew
        self.begins_whole = True  # see `_checked`
        self.needs_key = True  # nothing before the first key frame can be decoded
        self.order = None  # stamps of the pictures as they are shown, where packets do not tell (packets.py)
        self._open()

    def _open(self):
        self.container = open_container(self.path)
        self.is_at_start = True
        try:
            if self.index is None:
                self.index = self._choose_stream()
            if not self.is_at_start:
                self.seek(0.0)
                return
            self.stream = self.container.streams[self.index]
            self.unit = float(self.stream.time_base)  # seconds
            self.origin = (self.container.start_time or 0) / av.time_base  # seconds
            self.stated_duration = (self.container.duration or 0) / av.time_base  # seconds; 0 where there is none
            self.decoder = self.stream.codec_context
            # AVI and ASF have no presentation times; of these codecs a packet alone does not tell its picture's place.
            self.hides_order = (self.container.format.name in ("avi", "asf") and self.decoder.has_b_frames
                                and self.decoder.name in ("h264", "hevc", "vvc"))
            # Workers, where torch has one thread, are the parallelism; in a process alone, more pay on large frames.
            pixels = self.decoder.width * self.decoder.height
            self.decoder.thread_count = min(16, torch.get_num_threads(), 1 + pixels // 2**17)
            self.decoder.thread_type = "FRAME"
            self.decoder.copy_opaque = True  # what is noted in a packet is found in its frame
            self.decoder.open()  # before anything is skipped: dav1d (AV1) keeps to what it is opened with
        except BaseException:
            self.close()
            raise

    def _choose_stream(self):
        """The index of the stream with the most packets, covers aside: files carry one-picture thumbnails."""
        streams = [s for s in self.container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError("it holds no video stream")
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            raise ValueError("its codec is unknown")
        if len(streams) == 1:
            return streams[0].index
        packets = dict.fromkeys([s.index for s in streams], 0)
        self.is_at_start = False
        for packet in self.container.demux(streams):
            packets[packet.stream_index] += packet.size > 0
        return max(packets, key=packets.get)

    def close(self):
        self.container.close()

    def seconds(self, stamp):
        return stamp * self.unit - self.origin

    def time_of(self, packet_or_frame):
        """Presentation time; some containers state only the decoding time."""
        stamp = packet_or_frame.pts
        if stamp is None:
            stamp = packet_or_frame.dts
        return None if stamp is None else self.seconds(stamp)

    def seek(self, t):
        """Go to a key frame before t, or to the beginning: by opening the file, as seeking to 0 passes pictures."""
        if t > 0:
            self.is_at_start = False
            try:
                self.container.seek(int((t + self.origin) / self.unit), stream=self.stream, backward=True)
                return
            except av.error.FFmpegError:  # a container that cannot seek, or not there
                pass
        if not self.is_at_start:
            self.close()
            self._open()

    def packets(self):
        """Demultiplex from here on; an empty packet is last."""
        self.is_at_start = False
        begun = not self.needs_key
        for packet in self.container.demux(self.stream):
            begun = begun or packet.is_keyframe
            if begun:
                yield packet

    def frames(self, plan):
        """Decode from here on, as `plan` (see `skip_plan`) says where it says anything, in order of presentation."""
        if self.order is None:
            yield from self._planned_frames(plan)
            return
        for stamp, frame in zip(self.order, self._planned_frames({})):
            frame.pts = stamp
            yield frame

    def _planned_frames(self, plan):
        wanted = sum(skip == "DEFAULT" for skip in plan.values())
        starts_anew = True
        self.begins_whole = True
        for packet in self.packets():
            skip = plan.get(packet.pts)
            if skip == "ALL":
                starts_anew = True
                continue
            if starts_anew:  # at a key frame: go on as after a seek
                yield from self._checked(self.decoder.decode(None))
                self.decoder.flush_buffers()
                self.begun_at = None if packet.is_discard else packet.pts
                starts_anew = False
            self.decoder.skip_frame = skip or "DEFAULT"
            yield from self._checked(packet.decode())
            wanted -= skip == "DEFAULT"
            if plan and not wanted:
                yield from self._checked(self.decoder.decode(None))
                break

    def _checked(self, frames):
        """`frames`, noting in `begins_whole` whether the key frame where decoding began is the first one to come.

        Where it is not (H.264 with intra refresh), the pictures after it come late, or only nearly right.
        """
        for frame in frames:
            if None not in (self.begun_at, frame.pts) and frame.pts > self.begun_at:
                self.begins_whole = False
            self.begun_at = None
            yield frame


def open_container(path):
    """Open a video file as FFmpeg sees it; a playlist in it reaches no network, and a colon in its name is a colon."""
    return av.open(f"file:{path}", options={"protocol_whitelist": "file"},
                   metadata_errors="ignore")  # telephones write titles that are not UTF-8


@functools.cache
def video_duration(path):
    """Seconds from a container's header; None where it states none or cannot be opened."""
    try:
        with open_container(path) as container:
            return container.duration / av.time_base if container.duration else None
    except (av.error.FFmpegError, OSError):
        return None
