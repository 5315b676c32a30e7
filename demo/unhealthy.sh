#!/usr/bin/env bash
# What goes wrong, on purpose: bash demo/unhealthy.sh [SEED], after `bash train.sh demo SEED`. docs/reading.md shows it.
set -euo pipefail
cd "$(dirname "$0")/.."
source engine/jobs.sh
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # one core a process
out=runs/demo-${1:-0}
train=(run python invert4tvg.py @demo/toy.args --videos "$out/videos" --seed "${1:-0}")
grpo=("${train[@]}" --micro-batch 8 --annotations "$out/train.txt" --iterations 80)

# The KL is measured and hardly punished, and the steps are too long: the policy runs away from its reference.
"${grpo[@]}" --model "$out/warm" --p 1 --lr 8e-3 --kl-coef 1e-6 --output "$out/runaway"
# One task with few right answers, no KL: entropy and spread go, and then there is nothing to learn from.
"${grpo[@]}" --model "$out/warm" --p 0 --inversion-tasks ar --lr 2e-3 --kl-coef 1e-6 --output "$out/collapse"
# Eight completions that are nearly the same one: from the start four groups in ten have no spread.
"${grpo[@]}" --model "$out/warm" --p 0.8 --lr 6e-4 --temperature 0.3 --output "$out/no-spread"
# A model that lists verbs now and then: Eq. 7 asks for the right verb among those named, so lists win.
python -m demo.verb_lists "$out"
"${train[@]}" --model "$out/warm" --demonstrations "$out/verb-lists.jsonl" --lr 1e-3 --iterations 60 --output "$out/lister"
"${grpo[@]}" --model "$out/lister" --p 0 --inversion-tasks vd --lr 6e-4 --max-new-tokens 32 --output "$out/hacked"
