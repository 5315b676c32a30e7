"""README.md of a checkpoint, which the Hugging Face hub shows."""

import json
from pathlib import Path

from engine.program.files import iteration_of
from engine.run.predictions import percentages


def model_card(config, progress) -> str:
    """-> its text: what the model is, how it was trained, how to use it.

    `progress` is what `checkpoints.save_checkpoint` gets. The numbers are those of the run's last measurement.
    """
    stage = "supervised" if config.demonstrations else "GRPO"
    how = [("stage", f"{stage}, iteration {progress['iteration']} of {progress['iterations']}"),
           ("start", progress.get("start", config.model)), ("prompts an iteration", progress["prompts"]),
           ("learning rate", config.peak_lr()), ("seed", config.seed)]
    if config.demonstrations:
        how.append(("demonstrations", config.demonstrations))
    else:
        how += [("annotations", config.annotations), ("group size", config.group_size), ("p", config.p),
                ("inversion tasks", ", ".join(config.inversion_tasks)), ("KL coefficient", config.kl_coef)]
    files = {iteration_of(path.parent): path for path in Path(config.output).glob("eval-*/metrics.json")}
    # A folder of another name is not the run's own; one of a later iteration is left over from an interrupted run.
    iterations = [k for k in files if k is not None and k <= progress["iteration"]]
    numbers = "Nothing was measured while it was trained."
    if iterations:
        metrics = json.loads(files[max(iterations)].read_text(encoding="utf-8"))
        numbers = (f"Measured at iteration {max(iterations)} on {Path(config.eval_annotations).name}, percent:\n\n"
                   + table(percentages(metrics).items(), "{:.1f}"))
    return f"""---
library_name: transformers
pipeline_tag: video-text-to-text
tags:
- temporal-video-grounding
- grpo
---
# {Path(config.output).resolve().name}

A Qwen2.5-VL for temporal video grounding, trained by Invert4TVG's reference implementation.

{table(how)}

{numbers}

`python evaluate.py --model CHECKPOINT` measures it, with the sampling of videos and the format that run.json notes.
"""


def table(rows, form="{}") -> str:
    """Pairs -> a table in Markdown."""
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {form.format(value)} |" for name, value in rows)
