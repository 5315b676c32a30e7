#!/usr/bin/env bash
# TVG-R1:  bash papers/tvg-r1.sh [SEED of the toy | charades-3b | charades-7b]
# A supervised cold start, rows of middling difficulty for the model at hand, GRPO. On Charades-STA the cold start needs
# COLD_START=FILE.jsonl with problem, gt_frame and a solution of reasoning and <time>[a, b]</time>.
set -euo pipefail
cd "$(dirname "$0")/.."
source papers/where.sh
cold_start=${COLD_START:-$out/cold-start.jsonl}
[ -e "$cold_start" ] || { echo "$0: $cold_start is not there; name a file with COLD_START=FILE.jsonl" >&2; exit 1; }
r1=(--tvg-reward papers.rewards.tvg_r1)

reinforce() {  # NAME MODEL: choose rows by four answers of the model to each, then GRPO without KL, as in TVG-R1's code
    "${evaluate[@]}" --model "$2" --annotations "$rows" "${r1[@]}" --tasks tvg --samples 4 --output "$out/$1-rollouts"
    python -m papers.stages difficulty --annotations "$rows" --predictions "$out/$1-rollouts" \
        --difficulty 0.1 0.7 --output "$out/$1.json"
    "${train[@]}" --model "$2" --annotations "$out/$1.json" "${r1[@]}" --p 1 --kl-coef 0 --weight-decay 0.01 \
        --output "$out/$1"
}

if [ -e "$out/lists.jsonl" ]; then  # the toy's base must learn the prompt
    "${train[@]}" "${sft[@]}" --model "$base" --demonstrations "$out/lists.jsonl" "${r1[@]}" --output "$out/r1-base"
    base=$out/r1-base
fi
python -m papers.stages longest --demonstrations "$cold_start" --share 0.5 --output "$out/r1-cold.jsonl"
"${train[@]}" "${sft[@]}" --model "$base" --demonstrations "$out/r1-cold.jsonl" "${r1[@]}" --output "$out/r1-cold"
reinforce r1-only "$base"
reinforce r1-both "$out/r1-cold"

"${evaluate[@]}" --model "$base" --annotations "$test" "${r1[@]}" --tasks tvg --output "$out/r1-base-test"
for run in r1-cold r1-only r1-both; do
    "${evaluate[@]}" --model "$out/$run" --annotations "$test" --tasks tvg --output "$out/$run-test"
done
python -m demo.table "$out" rows "base=r1-base-test" "cold start only=r1-cold-test:r1-cold" \
    "RL only=r1-only-test:r1-only" "both=r1-both-test:r1-cold,r1-both"
