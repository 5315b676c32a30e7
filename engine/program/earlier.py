"""The options that an earlier call noted, in today's words, and what has changed since."""

import dataclasses
import json

from engine.program.settings import option

GONE = {  # options of earlier versions, with their defaults then
    "adam_eps": 1e-8, "betas": [0.9, 0.999], "lora_alpha": 32.0, "max_grad_norm": 1.0, "reward_weights": [],
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
GONE_AND_FREE = ("clip_timeout", "save_minutes")  # these might change when a run went on


def as_today(options):
    """The options that an earlier call noted -> the same in today's words.

    One that is gone and had its default is left out, and a reward without a place was one of papers/rewards.py.
    """
    options = {name: value for name, value in options.items()
               if name not in GONE_AND_FREE and (name not in GONE or value != GONE[name])}
    reward = options.get("tvg_reward", "iou")
    if reward != "iou" and "." not in reward:
        options["tvg_reward"] = f"papers.rewards.{reward}"
    return options


def changed_options(before, settings):
    """The options, free ones left out, in which `settings` differ from what a JSON file of an earlier call holds.

    An option that the file lacks counts as its default: it is newer than that call.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    defaults, now = (json.loads(json.dumps(x)) for x in (defaults, dataclasses.asdict(settings)))  # tuples become lists
    free = {f.name for f in dataclasses.fields(settings) if f.metadata["free"]}
    before = defaults | as_today(before)
    changed = [option(name) for name in now if name not in free and before[name] != now[name]]
    return changed + [f"{option(name)}, which is no longer an option" for name in before if name not in now]
