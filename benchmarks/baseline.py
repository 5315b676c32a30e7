"""What benchmarks/step.py compares with: the prompt repeated for every completion, by hand and by TRL.

Shapes as in grpo.py: G completions of C tokens each, a prompt of P tokens.
"""

import torch
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.models import PIXELS
from engine.model.loading import load_model


class Repeated:
    """The ordinary way: G rows of prompt, video and completion through `generate` and the model's own forward."""

    def __init__(self, folder, cell, device):
        self.cell = cell
        _, self.processor = load_model(folder, device)
        self.model = load_unchanged(folder, device)
        self.reference = load_unchanged(folder, device).requires_grad_(False)
        # generate() fills what a request leaves open from here. No end is named, so completions are all C long.
        self.model.generation_config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=cell.completion, pad_token_id=0, disable_compile=True,
            suppress_tokens=self.processor.banned.tolist())

    def rows(self, prompt):
        """The model's inputs for G rows of the prompt, their positions ours."""
        G = self.cell.group
        return {
            "input_ids": prompt.ids.expand(G, -1),
            "position_ids": prompt.positions.unsqueeze(1).expand(-1, G, -1),
            "pixel_values_videos": prompt.patches.to(self.model.dtype).repeat(G, 1),
            "video_grid_thw": prompt.grid.repeat(G, 1),
        }

    def sample(self, prompt):
        """-> (G, C) ids; the prompt repeated in the batch, as TRL does, and one prefill of G rows."""
        self.model.eval()  # in training mode gradient checkpointing would switch the cache off
        rows = self.rows(prompt)
        ids = self.model.generate(**rows, attention_mask=torch.ones_like(rows["input_ids"]))
        self.model.train()
        return ids[:, len(prompt.ids):]

    def logps(self, model, prompt, ids):
        """-> (G, C) log-probabilities of `ids`, float32"""
        rows = self.rows(prompt)
        C = ids.shape[1]
        follow = rows["position_ids"][..., -1:] + 1 + torch.arange(C, device=ids.device)  # (3, G, C)
        rows["input_ids"] = torch.cat([rows["input_ids"], ids], dim=1)
        rows["position_ids"] = torch.cat([rows["position_ids"], follow], dim=2)
        logits = model(**rows, logits_to_keep=C + 1, use_cache=False).logits[:, :-1]  # (G, C, V)
        logits = logits.float().index_fill(-1, self.processor.banned, torch.finfo(torch.float32).min)
        return logits.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)


def load_unchanged(folder, device):
    """-> the checkpoint's model as transformers has it, without engine/model/attention.py."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device)


def make_trl_trainer(folder, cell, frames, text, meter, turn, args):
    """-> a GRPOTrainer whose train() takes --repeats + 1 steps, each inside `turn()`, its phases measured by `meter`.

    The video's grid steps become eight images of as many visual tokens. Their marks take 14 tokens more, so the text
    is 14 shorter. "sampling" is generate() and the padding around it, "reference" and "policy" are the passes alone.
    What TRL does besides (images to patches, twice for each of the G copies; decoding text) counts in the whole step.
    Raises ImportError where TRL is not installed.
    """
    import trl  # first: what is missing is named after it
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoTokenizer, PrinterCallback, Qwen2_5_VLProcessor, TrainerCallback
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImagesAndText(Qwen2_5_VLProcessor):
        """Qwen2.5-VL's processor without its videos, whose class needs torchvision; attributes come from here."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template)

    class Turns(TrainerCallback):
        """A step of Trainer's loop, from the fetched batch to the cleared gradients, is one turn."""

        def on_step_begin(self, args, state, control, **kwargs):
            self.turn = turn()
            self.turn.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            self.turn.__exit__(None, None, None)

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames[::2]]
    prompt = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": text[14:]}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unlimited = {"shortest_edge": 28**2, "longest_edge": frames[0].numel()}  # images stay as they are
    processor = ImagesAndText(Qwen2VLImageProcessorPil(size=unlimited, **PIXELS), tokenizer, tokenizer.chat_template)
    model = load_unchanged(folder, device)
    model.model.visual.requires_grad_(False)
    rows = Dataset.from_list([{"prompt": prompt, "images": images}])
    trainer = trl.GRPOTrainer(
        model=model, processing_class=processor, train_dataset=rows,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=trl.GRPOConfig(
            output_dir=f"{folder}/trl", use_cpu=not on_gpu, bf16=on_gpu, max_steps=args.repeats + 1, learning_rate=1e-6,
            lr_scheduler_type="constant", optim="sgd" if args.size == "7b" else "adamw_torch",
            gradient_checkpointing=args.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            per_device_train_batch_size=cell.group, num_generations=cell.group, max_completion_length=cell.completion,
            generation_kwargs={"min_new_tokens": cell.completion}, temperature=1.0, loss_type="grpo", beta=0.04,
            epsilon=0.2, report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True),
        callbacks=[Turns()])
    trainer.remove_callback(PrinterCallback)
    measure_phases(trainer, meter)
    check_inputs(trainer, cell, visual_tokens=len(frames) // 2 * (frames[0, 0].numel() // 28**2))
    return trainer


def measure_phases(trainer, meter):
    """Wrap the trainer's methods, so that `meter` sees its phases."""

    def wrap(owner, name, phase, only_with=None):
        method = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if only_with is not None and args[0] is not only_with:
                return method(*args, **kwargs)
            with meter(phase):
                return method(*args, **kwargs)

        setattr(owner, name, wrapped)

    wrap(trainer, "_generate_single_turn", "sampling")
    wrap(trainer, "_get_per_token_logps_and_entropies", "reference", only_with=trainer.ref_model)
    wrap(trainer, "compute_loss", "policy")
    wrap(trainer.accelerator, "backward", "policy")


def check_inputs(trainer, cell, visual_tokens):
    """Make every loss fail unless it is taken on as many tokens of each kind as the other systems'."""
    compute_loss = trainer.compute_loss

    def checked(model, inputs, *args, **kwargs):
        pads = (inputs["prompt_ids"] == model.config.image_token_id).sum(1)
        found = {"prompts": tuple(inputs["prompt_ids"].shape), "completions": tuple(inputs["completion_ids"].shape),
                 "visual tokens": pads.unique().tolist(), "patches": len(inputs["pixel_values"]),
                 "completion tokens": int(inputs["completion_mask"].sum())}
        G = cell.group
        expected = {"prompts": (G, cell.prompt), "completions": (G, cell.completion),
                    "visual tokens": [visual_tokens], "patches": 4 * G * visual_tokens,
                    "completion tokens": G * cell.completion}
        if found != expected:
            raise ValueError(f"TRL trains on {found}, the other systems on {expected}")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = checked
