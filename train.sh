#!/usr/bin/env bash
# The runs of the README. On toy videos and a tiny model, on a laptop without a GPU:
#   bash train.sh demo [SEED]           GRPO with inversion and without
#   bash train.sh ablations [SEED ...]  the paper's tables and figures, about half an hour a seed
# The paper's setting on Charades-STA, 8 GPUs; GPUS=1 for one of 80 GB:
#   bash train.sh charades-3b
#   bash train.sh charades-7b
# Options after the name (and the seed) go to invert4tvg.py's GRPO runs. What is interrupted goes on when called again.
set -euo pipefail
set -m  # a process group for each background job, so that it can be stopped with its children
cd "$(dirname "$0")"

pids=()
# Ctrl-C, not the default TERM: training saves, and its workers leave it to do so.
trap 'for job in $(jobs -p); do kill -INT -- "-$job" 2>/dev/null || true; done; wait' EXIT
trap 'exit 130' INT TERM

spawn() {  # NAME COMMAND...: in the background, as soon as fewer than two run, with its output in $out/NAME.log
    local log=$out/$1.log
    shift
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do sleep 1; done
    { "$@" > "$log" 2>&1 || { echo "train.sh: stopped, see $log" >&2; tail -n 5 "$log" >&2; exit 1; } } &
    pids+=($!)
}

settle() {  # wait for all that was spawned
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || exit 1; done
    pids=()
}

stage() {  # NAME OPTIONS...: a run of invert4tvg.py in $out/NAME; skipped when complete, resumed when interrupted
    local name=$1 resume=--no-resume
    shift
    if [ -e "$out/$name/complete" ]; then return; fi
    if compgen -G "$out/$name/checkpoint-*[0-9]" > /dev/null; then resume=--resume; fi
    "${train[@]}" "$@" --output "$out/$name" "$resume"
    touch "$out/$name/complete"
}

measure() {  # NAME [FOLDER OPTIONS...]: evaluate $out/NAME into $out/FOLDER (default NAME-test) unless that is done
    local name=$1 folder=${2:-$1-test}
    shift $(($# < 2 ? $# : 2))
    if [ -e "$out/$folder/metrics.json" ]; then return; fi
    "${evaluate[@]}" --model "$out/$name" --annotations "$test" "$@" --output "$out/$folder"
}

# ---------------------------------------------------------------------------------------------- the toy

toy() {  # SEED: the settings of the toy's runs
    seed=$1 out=runs/demo-$1
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # one core a process; runs go two at a time
    # 56 x 56 videos are read at 28 x 28: one visual token a second.
    local clips=(--videos "$out/videos" --min-frame-pixels 784 --max-frame-pixels 784 --max-new-tokens 24 --workers 1)
    train=(python invert4tvg.py "${clips[@]}" --seed "$seed" --micro-batch 16 --no-gradient-checkpointing)
    evaluate=(python evaluate.py "${clips[@]}" --micro-batch 128)
    test=$out/test.txt
    grpo=(--annotations "$out/train.txt" --iterations 350 --lr 4e-4)
}

warm_start() {  # supervised, stopped early, four of the ten verbs rare
    if [ ! -e "$out/model/complete" ]; then
        python demo/make_demo.py "$out" --seed "$seed"
        touch "$out/model/complete"
    fi
    # Rounds of 600 iterations until the model has begun to recognise actions: the vision tower gets there in the
    # first round with one seed, in a later one with another, and what follows needs it.
    local from=model round
    for round in 1 2 3 4; do
        stage "warm-1.$round" --model "$out/$from" --demonstrations "$out/warmup-1.jsonl" --train-vision \
            --lr 2e-3 --iterations 600
        from=warm-1.$round
        if python demo/table.py "$out" sees "$from"; then break; fi
    done
    stage warm --model "$out/$from" --demonstrations "$out/warmup-2.jsonl" --lr 1e-3 --lr-schedule constant \
        --iterations 1800
}

demo() {
    toy "${1:-0}"
    shift || true
    echo "--- 1/4 videos, annotations, a random model; warm start"
    warm_start

    echo "--- 2/4 GRPO, with inversion (shown) and on grounding alone ($out/tvg-only.log)"
    spawn tvg-only stage tvg-only --model "$out/warm" "${grpo[@]}" "$@" --p 1
    stage grpo --model "$out/warm" "${grpo[@]}" "$@" --p 0.8
    settle

    echo "--- 3/4 as much time of supervised training ($out/supervised.log), and evaluation on held-out videos"
    spawn supervised stage supervised --model "$out/warm" --demonstrations "$out/warmup-2.jsonl" --lr 1e-3 \
        --iterations "$(python demo/table.py "$out" iterations)"
    for run in warm grpo tvg-only; do measure $run; done
    settle
    measure supervised

    echo "--- 4/4 the table"
    python demo/table.py "$out"
}

ablations() {
    local seeds=${*:-0 1 2} name options
    for seed in $seeds; do
        toy "$seed"
        echo "--- seed $seed"
        warm_start
        measure warm
        while read -r name options; do
            spawn "$name" ablation "$name" $options
        done <<< "$ABLATIONS"
        settle
    done
}

ablation() {  # NAME OPTIONS...: train and evaluate one
    local name=$1
    shift
    stage "$name" --model "$out/warm" "${grpo[@]}" "$@"
    measure "$name"
    case $name in  # Figure 4: videos of another kind, annotations of another format
        grpo | tvg-only) measure "$name" "$name-transfer" --annotations "$out/transfer.json" ;;
    esac
}

# Table 2; Figure 5 (with tvg-only and grpo); Table 3; Figure 1, right.
ABLATIONS='tvg-only --p 1
grpo --p 0.8
vd --inversion-tasks vd
ar --inversion-tasks ar
vc --inversion-tasks vc
ar-vd --inversion-tasks ar vd
vc-ar --inversion-tasks vc ar
vc-vd --inversion-tasks vc vd
p-0.6 --p 0.6
p-0.4 --p 0.4
p-0.2 --p 0.2
p-0.0 --p 0
cosine --inversion-reward cosine
tvg-only-no-kl --p 1 --kl-coef 0
grpo-no-kl --p 0.8 --kl-coef 0'

# ---------------------------------------------------------------------------------------------- Charades-STA

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
    demo | ablations) "$@" ;;
    charades-3b | charades-7b) name=$1; shift; charades "${name#charades-}" "$@" ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
