#!/usr/bin/env bash
# A toy to train on, and a model to start from:  bash demo/warm_start.sh [SEED]
# fills runs/demo-SEED with videos, annotations, demonstrations, and the checkpoints of sees/ and warm/.
set -euo pipefail
cd "$(dirname "$0")/.."
source engine/jobs.sh
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # one core a process
seed=${1:-0}
out=runs/demo-$seed
train=(python invert4tvg.py @demo/toy.args --videos "$out/videos" --seed "$seed")

echo "--- 1 of 6: videos, annotations, a random model; about 8 minutes left"
run python -m demo.make_demo "$out" --seed "$seed"

echo "--- 2 of 6: the model learns to see; about 7 minutes left"
run "${train[@]}" --model "$out/model" --demonstrations "$out/warmup-1.jsonl" --train-vision \
    --lr 1e-3 --iterations 400 --output "$out/sees"

echo "--- 3 of 6: supervised training, stopped early on purpose, with four of the ten verbs rare; about 6 minutes left"
run "${train[@]}" --model "$out/sees" --demonstrations "$out/warmup-2.jsonl" \
    --lr 1e-3 --lr-schedule constant --iterations 800 --output "$out/warm"
