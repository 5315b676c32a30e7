"""The toy's videos: one coloured shape performs two or three actions, with pauses. Worker processes render them."""

import math
from fractions import Fraction

import av
import numpy as np

SIDE, FPS = 56, 4
COLOURS = {"red": (230, 60, 60), "green": (60, 200, 80), "blue": (70, 110, 250), "yellow": (240, 220, 60),
           "white": (240, 240, 240)}
SHAPES = ("box", "triangle", "arrow")
VERBS = ("jumping", "shaking", "blinking", "spinning", "rising", "falling", "sliding", "growing", "shrinking", "fading")


def script(rng, actions):
    """-> (colour, shape, [(start, end, verb)] * actions, seconds): different actions on a half-second grid."""
    halves = rng.integers(3, 8, size=actions)  # half seconds: 1.5 to 3.5 seconds each
    total = max(int(rng.integers(16, 25)), int(halves.sum()) + 2)  # 8 to 12 seconds
    gaps = rng.multinomial(total - halves.sum(), [1 / (actions + 1)] * (actions + 1))
    verbs = rng.choice(VERBS, size=actions, replace=False)
    events = []
    at = 0
    for gap, length, verb in zip(gaps, halves, verbs):
        events.append(((at + gap) / 2, (at + gap + length) / 2, str(verb)))
        at += gap + length
    return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), events, total / 2


def pose(verb, done, half):
    """How an action moves its object -> (dx, dy, size, angle, opacity).

    `done` runs from 0 to 1 over the action, `half` counts half seconds since its start.
    """
    dx = dy = angle = 0.0
    size = opacity = 1.0
    beat = math.sin(math.pi * (half + 0.5) / 1.0)  # +1, -1, +1, ... on the half-second grid
    if verb == "jumping":
        dy = -7 * (1 + beat)
    elif verb == "shaking":
        dx = 8 * beat
    elif verb == "blinking":
        opacity = 0.0 if beat > 0 else 1.0
    elif verb == "spinning":
        angle = math.pi / 4 * (half + 1)
    elif verb == "rising":
        dy = 12 - 30 * done
    elif verb == "falling":
        dy = -12 + 30 * done
    elif verb == "sliding":
        dx = -16 + 32 * done
    elif verb == "growing":
        size = 0.7 + 1.3 * done
    elif verb == "shrinking":
        size = 1.4 - 1.1 * done
    elif verb == "fading":
        opacity = 0.8 - 0.7 * done
    return dx, dy, size, angle, opacity


def draw(colour, shape, dx, dy, size, angle, opacity):
    """-> (SIDE, SIDE, 3) uint8: the shape on a dark ground, its edge smoothed over a pixel."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    x, y = x - dx, y - dy
    c, s = math.cos(angle), math.sin(angle)
    x, y = (c * x + s * y) / size, (-s * x + c * y) / size
    if shape == "box":
        inside = np.minimum(11 - abs(x), 6 - abs(y))
    elif shape == "triangle":
        inside = np.minimum(8 - y, y / 2 + 6 - abs(x))
    else:  # arrow
        inside = np.maximum(np.minimum(9 - x, x + 0.5 - abs(y)), np.minimum(np.minimum(x + 11, 1 - x), 3 - abs(y)))
    cover = np.clip(inside * size + 0.5, 0, 1)[..., None] * opacity
    return (30 * (1 - cover) + np.array(COLOURS[colour]) * cover).astype(np.uint8)


def write_video(folder, seed, actions, name):
    """Render and encode one video -> its annotation rows [(name, start, end, sentence, seconds)]."""
    rng = np.random.default_rng([seed, *name.encode()])
    colour, shape, events, seconds = script(rng, actions)
    with av.open(str(folder / f"{name}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "18", "g": "8"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for i in range(round(seconds * FPS)):
            t = i / FPS
            moves = [pose(verb, (t - start) / (end - start), (t - start) * 2)
                     for start, end, verb in events if start <= t < end]
            image = draw(colour, shape, *(moves[0] if moves else (0, 0, 1, 0, 1)))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return [(name, start, end, f"the {colour} {shape} is {verb}.", seconds) for start, end, verb in events]
