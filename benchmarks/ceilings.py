"""How near sampling and the policy pass come to what the machine can do, both measured in the same run.

    python -m benchmarks.ceilings                                          # the 5M model on one CPU thread
    python -m benchmarks.ceilings --device cuda --size 3b --checkpointing  # the published shape in bfloat16

Floors are those of engine/roofline.py: bytes read over the measured bandwidth for decoding, useful operations over the
measured rate of a large matrix product for the policy pass. They are the forward pass and twice that for the backward
pass, without what checkpointing computes again.

Weights are random. The first round compiles and is not counted; numbers are medians of --repeats. On CUDA the peak of
allocated memory is printed, to be held against `python -m benchmarks.memory`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import grpo
from benchmarks import step
from engine.attention import visual_features
from engine.checkpoints import load_model, recompute_activations
from engine.roofline import bandwidth, decoding_floor, forward_operations, matmul_rate, seconds


class Speed(NamedTuple):
    """What was measured, in seconds; bandwidth in bytes a second, `matmul` in operations a second."""

    bandwidth: float
    matmul: float
    prefill: float
    decoding: float  # of the tokens after the first
    floor: float  # of decoding, at that bandwidth
    policy: float
    operations: float  # of the policy pass

    @property
    def decoding_share(self):
        """Of the bandwidth."""
        return self.floor / self.decoding

    @property
    def policy_share(self):
        """Of the arithmetic."""
        return self.operations / self.policy / self.matmul


def measure(model, processor, prompts, G, tokens, repeats):
    """Sampling and the policy pass, a prompt at a time as with --micro-batch 1 -> Speed."""
    device = model.device
    lengths = [len(prompt.ids) for prompt in prompts]
    with torch.no_grad():
        features = [feature for prompt in prompts for feature in visual_features(model, [prompt])]

    def sample(count):
        return grpo.sample_group(model, prompts, G, count, processor.eos[:0], processor.banned, features=features)

    rollout = sample(tokens)

    def policy():
        for b in range(len(prompts)):
            own = slice(b * G, (b + 1) * G)
            logps, _ = grpo.group_logps(model, prompts[b:b + 1], rollout.ids[own], rollout.mask[own], processor.banned,
                                        features=features[b:b + 1])
            logps.sum().backward()

    rate = bandwidth(device, 20)
    matmul = matmul_rate(device, model.dtype, 20)
    whole = seconds(lambda: sample(tokens), device, repeats)
    prefill = seconds(lambda: sample(1), device, repeats)
    model.train()
    passed = seconds(policy, device, repeats)
    return Speed(rate, matmul, prefill, whole - prefill, decoding_floor(model, lengths, G, tokens, rate), passed,
                 3 * forward_operations(model, lengths, G, tokens))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=step.SIZES, default="5m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=3500, help="of each, some 3,400 of them visual")
    parser.add_argument("--tokens", type=int, default=200, help="of each completion; none ends early")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    if min(args.prompts, args.repeats) < 1 or min(args.tokens, args.group_size) < 2 or args.prompt_tokens < 128:
        parser.error("give at least one prompt of 128 tokens, two completions of two tokens, one repeat.")
    return args


def main():
    args = parse_arguments()
    step.quieten()
    device = torch.device(args.device)
    G = args.group_size
    T = args.tokens
    if device.type == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        step.make_checkpoint(Path(folder), args.size, device)
        model, processor = load_model(folder, device)
    model.model.visual.requires_grad_(False)
    if args.checkpointing:
        recompute_activations(model)
    prompt = step.make_prompt(model, processor, *step.make_video(processor.tokenizer, args.prompt_tokens))
    prompts = [prompt] * args.prompts
    speed = measure(model, processor, prompts, G, T, args.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    print(f"{name}, {args.size}, {model.dtype}: "
          f"{args.prompts} prompts of {len(prompt.ids):,} tokens, G = {G}, {T} tokens each")
    print(f"ceilings: {speed.bandwidth / 1e9:,.0f} GB/s read, {speed.matmul / 1e12:,.2f} TFLOP/s")
    print(f"sampling: {speed.prefill + speed.decoding:.3f} s, prefill {speed.prefill:.3f} of it; decoding "
          f"{1e3 * speed.decoding / (T - 1):.2f} ms a step, floor {1e3 * speed.floor / (T - 1):.2f}: "
          f"{speed.decoding_share:.0%} of the bandwidth")
    print(f"policy pass: {speed.policy:.3f} s, {speed.operations / 1e12:.1f} TFLOP: "
          f"{speed.policy_share:.0%} of the arithmetic")
    if device.type == "cuda":
        print(f"peak of allocated memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB (weights, gradients; no "
              "reference, no optimiser)")


if __name__ == "__main__":
    main()
