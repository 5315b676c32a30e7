#!/usr/bin/env bash
# Does thinking help grounding? On the toy, with and without the think block of grounding, from the same videos:
#   bash demo/thinking.sh [SEED]
# The same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
source engine/jobs.sh
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # one core a process
seed=${1:-0}
out=runs/demo-$seed

run bash demo/warm_start.sh "$seed"
train=(python invert4tvg.py @demo/toy.args --videos "$out/videos" --seed "$seed")
answer=("${train[@]}" --tvg-format answer)
run "${answer[@]}" --model "$out/model" --demonstrations "$out/answer-1.jsonl" --train-vision \
    --lr 1e-3 --iterations 400 --output "$out/sees-answer"
run "${answer[@]}" --model "$out/sees-answer" --demonstrations "$out/answer-2.jsonl" \
    --lr 1e-3 --lr-schedule constant --iterations 800 --output "$out/warm-answer"

run "${train[@]}" @demo/grpo.args --annotations "$out/train.txt" --model "$out/warm" --output "$out/grpo"
run "${answer[@]}" @demo/grpo.args --annotations "$out/train.txt" --model "$out/warm-answer" \
    --output "$out/grpo-answer"
for name in warm warm-answer grpo grpo-answer; do
    run python evaluate.py --videos "$out/videos" --annotations "$out/test.txt" --workers 1 --micro-batch 256 \
        --model "$out/$name" --output "$out/$name-test"
done
python -m demo.table "$out" rows "warm start, thinks=warm-test:sees,warm" \
    "warm start, answers=warm-answer-test:sees-answer,warm-answer" \
    "+ GRPO, thinks=grpo-test:grpo" "+ GRPO, answers=grpo-answer-test:grpo-answer"
