#!/usr/bin/env bash
# The runs of the README:
#   bash train.sh demo [SEED]     toy videos and a tiny model, on a laptop without a GPU
#   bash train.sh charades-3b     the paper's setting on Charades-STA, 8 GPUs; GPUS=1 for one of 80 GB
#   bash train.sh charades-7b     the same with the 7B model
# Options after the name go to invert4tvg.py (after the seed, for the demo's two GRPO runs).
set -euo pipefail
cd "$(dirname "$0")"

demo() {
    local seed=${1:-0}
    shift || true
    local out=runs/demo-$seed
    if [ -e "$out" ]; then
        echo "train.sh: $out exists; remove it, or name another seed: bash train.sh demo 1" >&2
        exit 1
    fi
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # one core a process; the runs below go two at a time
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    trap 'exit 130' INT TERM
    finished() { wait "$1" || { tail -n 5 "$2" >&2; exit 1; }; }
    # 56 x 56 videos are read at 28 x 28: one visual token a second.
    local clips=(--videos "$out/videos" --min-frame-pixels 784 --max-frame-pixels 784 --max-new-tokens 24 --workers 1)
    local train=(python invert4tvg.py "${clips[@]}" --seed "$seed" --micro-batch 16 --no-gradient-checkpointing)

    echo "--- 1/5 videos, annotations, a random model"
    python demo/make_demo.py "$out" --seed "$seed"

    echo "--- 2/5 warm start: supervised, stopped early, four of the ten verbs rare"
    # Rounds of 600 iterations until the model has begun to recognise actions: the vision tower gets there in the
    # first round with one seed, in a later one with another, and what follows needs it.
    local from=$out/model
    for round in 1 2 3 4; do
        "${train[@]}" --model "$from" --demonstrations "$out/warmup-1.jsonl" --train-vision \
            --lr 2e-3 --iterations 600 --output "$out/warm-1.$round"
        from=$out/warm-1.$round
        if python demo/table.py "$out" sees "warm-1.$round"; then break; fi
    done
    "${train[@]}" --model "$from" --demonstrations "$out/warmup-2.jsonl" \
        --lr 1e-3 --lr-schedule constant --iterations 1800 --output "$out/warm"

    echo "--- 3/5 GRPO, with inversion (shown) and on grounding alone ($out/tvg-only.log)"
    local grpo=("${train[@]}" --model "$out/warm" --annotations "$out/train.txt" --iterations 350 --lr 4e-4 "$@")
    "${grpo[@]}" --p 1 --output "$out/tvg-only" > "$out/tvg-only.log" 2>&1 &
    "${grpo[@]}" --p 0.8 --output "$out/grpo"
    finished $! "$out/tvg-only.log"

    echo "--- 4/5 as much time of supervised training ($out/supervised.log), and evaluation on held-out videos"
    "${train[@]}" --model "$out/warm" --demonstrations "$out/warmup-2.jsonl" --lr 1e-3 \
        --iterations "$(python demo/table.py "$out" iterations)" --output "$out/supervised" > "$out/supervised.log" 2>&1 &
    local more=$! run
    for run in warm grpo tvg-only supervised; do
        if [ $run = supervised ]; then finished $more "$out/supervised.log"; fi
        python evaluate.py --model "$out/$run" --annotations "$out/test.txt" "${clips[@]}" --micro-batch 32 \
            --output "$out/$run-test"
    done

    echo "--- 5/5 the table"
    python demo/table.py "$out"
}

charades() {
    local size=$1
    shift
    local gpus=${GPUS:-8}
    local out=runs/charades-$size
    # Eight prompts an iteration on any number of GPUs. Ctrl-C saves first, which 30 seconds are too short for.
    torchrun --nproc_per_node "$gpus" --shutdown-timeout 1800 invert4tvg.py --accumulation $((8 / gpus)) --model "Qwen/Qwen2.5-VL-${size^^}-Instruct" \
        --annotations data/charades_sta_train.txt --videos data/videos --output "$out" \
        --eval-every 500 --eval-annotations data/charades_sta_test.txt "$@"
    torchrun --nproc_per_node "$gpus" evaluate.py --model "$out" --annotations data/charades_sta_test.txt \
        --videos data/videos --output "$out/test"
}

case "${1:-}" in
    demo) shift; demo "$@" ;;
    charades-3b | charades-7b) name=$1; shift; charades "${name#charades-}" "$@" ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
