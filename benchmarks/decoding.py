"""What reading videos costs: read_video beside decord and torchcodec, and a training loop's wait for clips.

    python -m benchmarks.decoding [--video FILE] [--cores 1]  # alternating in one run: medians, ratios, do frames agree
    python -m benchmarks.decoding --wait [0.25 0.5 1]         # steps of so many seconds, fed by 4 workers on all cores

Without a file it makes one of a minute: 480p at 30 frames a second, H.264 as x264 writes it by default (B-frames, a
key frame every 250 frames), a moving picture with noise. All readers deliver the same: the frames nearest to the same
times, (T, 3, h, w) uint8 of the size that read_video chooses, opening the file included. decord and torchcodec are told
for free which times these are. They get as many threads as there are cores. CPU time is still measured well on a core
that other programs use, too.

decord 0.6.0 and torchcodec (0.13.0 runs with torch 2.13 on the CPU; it needs FFmpeg's shared libraries, Debian's
`ffmpeg`) are no requirements: `pip install --no-deps decord torchcodec==0.13.0`.
"""

import os
import shutil
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from data import TaskSampler
from engine.program.settings import command_line
from engine.video.clips import Clips, read_ahead
from engine.video.frames import read_video
from engine.video.stream import video_duration
from engine.words.samples import Sample

SEGMENTS = (2.5, 5, 10, 20, 40)  # seconds

# ------------------------------------------------------------------------------------------------ videos


def write_video(path, seconds, size=(480, 854), fps=30, seed=0):
    """An H.264 mp4: a window that moves over smooth shapes with a fine texture, and grain."""
    rng = np.random.default_rng(seed)
    h, w = size
    field = torch.from_numpy(rng.random((1, 3, 24, 40), dtype=np.float32))
    scene = torch.nn.functional.interpolate(field, (2 * h, 2 * w), mode="bicubic")[0].permute(1, 2, 0).numpy()
    scene = 200 * scene + 30 * rng.random((2 * h, 2 * w, 1))
    grain = rng.normal(0, 4, (2 * h, 2 * w, 1))
    packets = []
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.width = w
        stream.height = h
        stream.pix_fmt = "yuv420p"
        for i in range(seconds * fps):
            y = int(h / 2 * (1 + np.sin(i / fps * 0.3)))
            x = int(w / 2 * (1 + np.sin(i / fps * 0.4)))
            dy = rng.integers(h)
            dx = rng.integers(w)
            image = scene[y:y + h, x:x + w] + grain[dy:dy + h, dx:dx + w]
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts = i
            frame.time_base = Fraction(1, fps)
            packets += stream.encode(frame)
        packets += stream.encode()
        file.mux(packets)
    return path


def repeat_video(source, path, times):
    """Write a video's packets `times` times over: the same pictures again and again, with no encoding."""
    with av.open(path, "w") as file:
        for k in range(times):
            with av.open(source) as part:
                stream = file.streams[0] if k else file.add_stream_from_template(part.streams.video[0])
                length = part.streams.video[0].duration
                for packet in part.demux(video=0):
                    if packet.size:
                        packet.pts += k * length
                        packet.dts += k * length
                        packet.stream = stream
                        file.mux(packet)


# ------------------------------------------------------------------------------------------------ readers


def ours(path, start, end, times, size):
    """-> frames (T, 3, h, w) uint8; the others fetch the frames at `times` in `size` = (h, w)."""
    return read_video(path, start=start, end=end).frames


def readers(threads):
    """-> {name: function like `ours`} of what is installed."""
    found = {"ours": ours}
    try:
        import decord

        def with_decord(path, start, end, times, size):
            video = decord.VideoReader(path, num_threads=threads, height=size[0], width=size[1])
            known = video.get_frame_timestamp(range(len(video)))[:, 0]
            frames = video.get_batch([abs(known - t).argmin() for t in times]).asnumpy()
            return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()

        found["decord"] = with_decord
    except (ImportError, OSError, RuntimeError) as error:
        print(f"decord is left out, for it cannot be imported: {str(error).splitlines()[0]}")
    try:
        import torchcodec
        import torchcodec.transforms

        def with_torchcodec(path, start, end, times, size, seek_mode="exact"):
            video = torchcodec.decoders.VideoDecoder(path, num_ffmpeg_threads=threads, seek_mode=seek_mode,
                                                     transforms=[torchcodec.transforms.Resize(size)])
            return video.get_frames_played_at([t + 1e-3 for t in times]).data

        found["torchcodec"] = with_torchcodec
        found["approximate"] = lambda *clip: with_torchcodec(*clip, seek_mode="approximate")  # believes the header
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec is left out, for it cannot be imported: {str(error).splitlines()[0]}")
    return found


def measure(found, path, start, end, rounds):
    """-> {name: (median seconds, median CPU seconds, mean difference from our pixels)}; the readers take turns."""
    clip = read_video(path, start=start, end=end)
    seconds = {name: [] for name in found}
    cpu_seconds = {name: [] for name in found}
    difference = {}
    for _ in range(rounds):
        for name, read in found.items():
            began = time.perf_counter()
            cpu_began = time.process_time()
            frames = read(path, start, end, clip.times.tolist(), tuple(clip.frames.shape[2:]))
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu_began)
            difference[name] = (frames.float() - clip.frames.float()).abs().mean().item()
    return {name: (statistics.median(seconds[name]), statistics.median(cpu_seconds[name]), difference[name])
            for name in found}


def compare(jobs, cores, rounds):
    """Print two rows for each of `jobs` = [(title, path, start, end)]."""
    found = readers(cores)
    print(f"{cores} core(s), {rounds} rounds; milliseconds and CPU milliseconds (x ours), mean difference from our "
          "pixels (0 to 255).\ntorchcodec resizes in its decoder (bilinear), decord in its own (bicubic); "
          "`approximate` is torchcodec's seek_mode.\n")
    print(f"{'':34}" + "".join(f"{name:>16}" for name in found) + "    differences")
    for title, path, start, end in jobs:
        result = measure(found, path, start, end, rounds)
        differences = ", ".join(f"{d:.1f}" for _, _, d in list(result.values())[1:])
        for i, name in enumerate((title, "    CPU time")):
            base, *others = (r[i] for r in result.values())
            cells = [f"{base * 1e3:.0f}"] + [f"{t * 1e3:.0f} (x{t / base:.2f})" for t in others]
            print(f"{name:34}" + "".join(f"{c:>16}" for c in cells) + f"    {'' if i else differences}", flush=True)


def comparison_jobs(video, folder):
    jobs = []
    if not video:
        part = f"{folder}/half-minute.mp4"
        video = f"{folder}/minute.mp4"
        long = f"{folder}/five-minutes.mp4"
        write_video(part, 30)
        repeat_video(part, video, 2)
        repeat_video(part, long, 10)
        jobs = [(f"5 s out of {name}", path, 10.0, 15.0) for name, path in (("30 s", part), ("5 minutes", long))]
    duration = video_duration(video)
    name = f"{Path(video).name}, {duration:.0f} s"
    segments = [(f"{length:g} s of {name}", video, duration / 8, duration / 8 + length)
                for length in SEGMENTS if length < 0.8 * duration]
    return [(f"{name}, whole", video, None, None)] + segments + jobs


# ------------------------------------------------------------------------------------------------ the loop's wait


def wait(durations, video, folder, workers, iterations):
    """Feed a loop as invert4tvg.train does, its step a sleep, and print how long it waited for its clips."""
    if not video:
        video = write_video(f"{folder}/0.mp4", 30)
    paths = [shutil.copy(video, f"{folder}/{k}-copy.mp4") for k in range(16)]
    seconds = video_duration(video)
    samples = [Sample(path, "q", k * seconds / 32, k * seconds / 32 + seconds / 4) for k, path in enumerate(paths)]
    suits = {"vd": [True] * len(samples)}
    cores = len(os.sched_getaffinity(0))
    print(f"{workers} workers on {cores} cores, {iterations} iterations of one prompt: 80% whole videos of "
          f"{seconds:.0f} s, 20% segments of {seconds / 4:.1f} s")
    print(f"{'step':>8}{'clips/s':>10}{'first wait':>12}{'then mean':>12}{'median':>10}{'max':>8}   seconds")
    for duration in (0.0, *durations):
        sampler = TaskSampler(len(samples), suits, prompts=1, iterations=iterations)
        wanted = [[sampler.candidates(k, slot) for slot in sampler.slots] for k in range(iterations)]
        arriving = read_ahead(Clips(samples, {}), wanted, workers, 600)
        waits = []
        started = time.perf_counter()
        for _ in range(iterations):
            began = time.perf_counter()
            next(arriving)
            waits.append(time.perf_counter() - began)
            time.sleep(duration)
        rate = iterations / (time.perf_counter() - started)
        rest = waits[1:]
        print(f"{duration:8.2f}{rate:10.2f}{waits[0]:12.3f}{statistics.mean(rest):12.3f}{statistics.median(rest):10.3f}"
              f"{max(rest):8.3f}", flush=True)
        if not duration:
            print(f"{'':8}the most there is: {rate / min(workers, cores):.2f} clips/s a worker's core")


def main():
    parser = command_line("benchmarks.decoding", __doc__)
    parser.add_argument("--video", help="a file to measure on, instead of made ones")
    parser.add_argument("--cores", type=int, default=1, help="cores, and threads of each reader")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wait", type=float, nargs="*", metavar="SECONDS", help="lengths of a step [0.1 0.25 0.5 1 2]")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    if args.video and not video_duration(args.video):
        parser.error(f"--video {args.video}: cannot be opened as a video, or states no duration.")
    with tempfile.TemporaryDirectory() as folder:
        if args.wait is not None:
            return wait(args.wait or (0.1, 0.25, 0.5, 1, 2), args.video, folder, args.workers, args.iterations)
        jobs = comparison_jobs(args.video, folder)  # made with all cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.cores:])
        torch.set_num_threads(args.cores)
        compare(jobs, args.cores, args.rounds)


if __name__ == "__main__":
    main()
