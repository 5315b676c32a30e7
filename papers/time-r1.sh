#!/usr/bin/env bash
# Time-R1:  bash papers/time-r1.sh [SEED of the toy | charades-3b | charades-7b]
# A first choice of rows around an IoU of 0.3, then before each epoch only rows that are neither hopeless nor solved.
set -euo pipefail
cd "$(dirname "$0")/.."
source papers/where.sh

choose() {  # NAME MODEL ANNOTATIONS OPTIONS...: choose rows for $out/time-r1-NAME.json by the model's answers
    local name=$1 model=$2 from=$3
    shift 3
    "${evaluate[@]}" --model "$model" --annotations "$from" --tasks tvg --output "$out/time-r1-$name-rows"
    python -m papers.stages difficulty --annotations "$from" --predictions "$out/time-r1-$name-rows" \
        --keep "$rows_kept" --output "$out/time-r1-$name.json" "$@"
}

choose 0 "$base" "$rows" --difficulty 0 1 --choose gaussian
model=$base
for epoch in 1 2 3 4 5; do
    choose "$epoch" "$model" "$out/time-r1-0.json" --difficulty 0 0.7
    "${train[@]}" "${short[@]}" --model "$model" --annotations "$out/time-r1-$epoch.json" \
        --tvg-reward papers.rewards.timestamp_iou --p 1 --output "$out/time-r1-$epoch"
    model=$out/time-r1-$epoch
done

"${evaluate[@]}" --model "$base" --annotations "$test" --tasks tvg --output "$out/time-r1-base-test"
"${evaluate[@]}" --model "$model" --annotations "$test" --tasks tvg --output "$out/time-r1-test"
python -m demo.table "$out" rows "base=time-r1-base-test" \
    "Time-R1, five epochs=time-r1-test:time-r1-1,time-r1-2,time-r1-3,time-r1-4,time-r1-5"
