#!/usr/bin/env bash
# TAR-TVG:  bash papers/tar-tvg.sh [SEED of the toy | charades-3b | charades-7b]
# GRPO with anchors collects completions, a fresh base imitates the best of them, GRPO goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
source papers/where.sh

if [ -e "$out/anchors.jsonl" ]; then  # the toy's base must learn the prompt; a fifth of these answers have anchors
    "${train[@]}" "${sft[@]}" --model "$base" --demonstrations "$out/anchors.jsonl" "${anchors[@]}" \
        --iterations 800 --output "$out/tar-base"
    base=$out/tar-base
fi
grpo=("${train[@]}" --annotations "$rows" --p 1)
"${grpo[@]}" "${half[@]}" --model "$base" "${anchors[@]}" --save-rollouts 1 --output "$out/tar-1"
python -m papers.stages anchors --rollouts "$out/tar-1" --keep 30000 --output "$out/tar-2.jsonl"
"${train[@]}" "${sft[@]}" --model "$base" --demonstrations "$out/tar-2.jsonl" "${anchors[@]}" --output "$out/tar-2"
"${grpo[@]}" "${half[@]}" --model "$out/tar-2" "${anchors[@]}" --output "$out/tar-3"
# From the same base, for about as long: plain GRPO, and GRPO with the anchors' prompt but no reward for them.
"${grpo[@]}" "${long[@]}" --model "$base" --tvg-reward iou --output "$out/tar-plain"
"${grpo[@]}" "${long[@]}" --model "$base" "${anchors[@]}" \
    --tvg-reward papers.rewards.anchors_unrewarded --output "$out/tar-none"

"${evaluate[@]}" --model "$base" --annotations "$test" --tasks tvg "${anchors[@]}" --output "$out/tar-base-test"
for run in tar-1 tar-2 tar-3 tar-plain tar-none; do
    "${evaluate[@]}" --model "$out/$run" --annotations "$test" --tasks tvg --output "$out/$run-test"
done
python -m demo.table "$out" rows "base=tar-base-test" "stage 1: GRPO with anchors=tar-1-test:tar-1" \
    "stage 2: fresh base, supervised on its best=tar-2-test:tar-1,tar-2" \
    "stage 3: GRPO from there=tar-3-test:tar-1,tar-2,tar-3" "plain GRPO=tar-plain-test:tar-plain" \
    "anchors asked for, not rewarded=tar-none-test:tar-none"
