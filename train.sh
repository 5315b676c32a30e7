#!/usr/bin/env bash
# The runs of the README. On toy videos and a tiny model, on a laptop without a GPU:
#   bash train.sh demo [SEED]           GRPO with inversion and without
#   bash train.sh ablations [SEED ...]  the paper's tables and figures
#   bash train.sh few [SEED ...]        GRPO with inversion and without, on sixty annotations
# The paper's setting on Charades-STA, 8 GPUs; GPUS=1 for one of 80 GB:
#   bash train.sh charades-3b           or charades-7b
# Other papers' systems, on the toy or where WHERE is charades-3b or charades-7b:
#   bash train.sh time-r1 [SEED | WHERE]
#   bash train.sh tar-tvg [SEED | WHERE]
#   bash train.sh tvg-r1 [SEED | WHERE]
# Options after demo SEED and charades go to the GRPO runs, not to evaluations. What is interrupted goes on when
# called again.
# tvg-r1 elsewhere needs COLD_START=FILE.jsonl: problem, gt_frame, solution with reasoning and <time>[a, b]</time>.
set -euo pipefail
set -m  # a process group for each background job, so that it can be stopped with its children
cd "$(dirname "$0")"

pids=() logs=()
# Ctrl-C, not the default TERM: training saves, and its workers leave it to do so.
trap 'for job in $(jobs -p); do kill -INT -- "-$job" 2>/dev/null || true; done; wait' EXIT
trap 'exit 130' INT TERM

fail() { echo "train.sh: $1" >&2; exit 1; }

# Nothing that calls these may stand in a condition or left of "||": set -e is off there, and a failed run would count.

spawn() {  # NAME COMMAND...: in the background, one of two at a time, with its output in $out/NAME.log; on GPUs, here
    local log=$out/$1.log
    shift
    if [ "$at_once" = 1 ]; then "$@"; return; fi
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do sleep 1; done
    "$@" > "$log" 2>&1 &
    pids+=($!) logs+=("$log")
}

settle() {  # wait for all that was spawned
    local i
    for ((i = 0; i < ${#pids[@]}; i++)); do
        wait "${pids[i]}" || { tail -n 5 "${logs[i]}" >&2; fail "stopped, see ${logs[i]}"; }
    done
    pids=() logs=()
}

started() {  # FOLDER OPTIONS...: note how a folder is made, and stop rather than go on with something else
    local folder=$1 note=$1.options
    shift
    if [ -e "$folder" ] && [ "$(cat "$note" 2>/dev/null)" != "$*" ]; then
        fail "$folder was made with other options (in $note); remove the folder, or move it away, to make it anew."
    fi
    mkdir -p "$(dirname "$note")"
    echo "$*" > "$note"
}

stage() {  # NAME OPTIONS...: a run of invert4tvg.py in $out/NAME; skipped when complete, resumed when interrupted
    local name=$1 resume=--no-resume
    shift
    started "$out/$name" "$@"
    if [ -e "$out/$name/complete" ]; then return; fi
    if compgen -G "$out/$name/checkpoint-*[0-9]" > /dev/null; then resume=--resume; fi
    "${train[@]}" "$@" --output "$out/$name" "$resume"
    touch "$out/$name/complete"
}

measure() {  # MODEL FOLDER OPTIONS...: evaluate MODEL into $out/FOLDER, unless that is done
    local model=$1 folder=$2
    shift 2
    local metrics=$out/$folder/metrics.json
    if [ -e "$metrics" ] && [ "$model/complete" -nt "$metrics" ]; then rm -rf "${out:?}/$folder"; fi  # trained anew
    started "$out/$folder" "$model" "$@"
    if [ -e "$metrics" ]; then return; fi
    "${evaluate[@]}" --model "$model" --annotations "$test" "$@" --output "$out/$folder"
}

# ---------------------------------------------------------------------------------------------- the toy

toy() {  # SEED: the settings of the toy's runs
    case $1 in '' | *[!0-9]* | ??????????*) fail "$1 is no seed; give a number, or see bash train.sh" ;; esac
    seed=$1 out=runs/demo-$1
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # one core a process; runs go two at a time
    # 56 x 56 videos are read at 28 x 28: one visual token a second.
    local clips=(--videos "$out/videos" --min-frame-pixels 784 --max-frame-pixels 784 --max-new-tokens 24 --workers 1)
    train=(python invert4tvg.py "${clips[@]}" --seed "$seed" --micro-batch 16 --no-gradient-checkpointing)
    evaluate=(python evaluate.py "${clips[@]}" --micro-batch 128)
    rows=$out/train.txt test=$out/test.txt base=$out/warm cold_start=$out/cold-start.jsonl at_once=2
    anchor_start=$out/anchors.jsonl list_start=$out/lists.jsonl anchors=(--tvg-reward anchors --max-new-tokens 48)
    grpo=(--annotations "$rows" --iterations 350 --lr 4e-4)
    long=(--iterations 700) half=(--iterations 250) short=(--iterations 60) sft=(--iterations 400 --lr 1e-3) rows_kept=1000
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
        [ "$round" != 4 ] || fail "seed $seed: after four rounds of warm-up the model still guesses actions; take another seed."
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
    for run in warm grpo tvg-only; do measure "$out/$run" "$run-test"; done
    settle
    measure "$out/supervised" supervised-test

    echo "--- 4/4 the table"
    python demo/table.py "$out"
}

sweep() {  # NAME RUNS SEED...: a line of RUNS is a run and its options; their table for all seeds
    local sweep=$1 runs=$2 name options
    shift 2
    for seed; do toy "$seed"; done  # a mistake in the last is said before the first runs
    for seed; do
        toy "$seed"
        echo "--- seed $seed"
        warm_start
        measure "$out/warm" warm-test
        while read -r name options; do
            spawn "$name" ablation "$name" $options
        done <<< "$runs"
        settle
    done
    python demo/ablations.py "runs/$sweep.csv" "$@"
}

ablation() {  # NAME OPTIONS...: train and evaluate one
    local name=$1
    shift
    case $name in few*)
        sed -n 61,120p "$rows" > "$out/$name.txt"
        set -- --annotations "$out/$name.txt" "$@" ;;
    esac
    if [ "$name" = invert-sft-grpo ]; then  # Figure 6
        base=$out/invert-sft
        python stages.py invert-sft --annotations "$rows" --output "$base.jsonl"
        stage invert-sft --model "$out/warm" --demonstrations "$base.jsonl" --inversion-format answer \
            --iterations 100 --lr 1e-4
        measure "$out/invert-sft" invert-sft-test
    fi
    stage "$name" --model "$base" "${grpo[@]}" "$@"
    measure "$out/$name" "$name-test"
    case $name in  # Figure 4: videos of another kind, annotations of another format
        grpo | tvg-only) measure "$out/$name" "$name-transfer" --annotations "$out/transfer.json" ;;
    esac
}

# Table 2; Figure 5 (with tvg-only and grpo); Table 3; Figure 1, right; Figure 6.
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
grpo-no-kl --p 0.8 --kl-coef 0
invert-sft-grpo --p 0.8'

# So few annotations that grounding alone learns them by heart; the last, with as many grounding iterations as the first.
FEW='few --train-vision --kl-coef 0 --p 0.8
few-tvg-only --train-vision --kl-coef 0 --p 1
few-tvg-only-280 --train-vision --kl-coef 0 --p 1 --iterations 280'

# ---------------------------------------------------------------------------------------------- Charades-STA

charades() {  # 3b or 7b: the settings of the runs on GPUs
    local gpus=${GPUS:-8}
    case $gpus in 1 | 2 | 4 | 8) ;; *) fail "GPUS=$gpus; give 1, 2, 4 or 8, so that an iteration has eight prompts." ;; esac
    local launch=(torchrun --nproc_per_node "$gpus" --shutdown-timeout 1800)  # Ctrl-C saves: 30 seconds are too few
    out=runs/charades-$1 rows=data/charades_sta_train.txt test=data/charades_sta_test.txt at_once=1
    base=Qwen/Qwen2.5-VL-${1^^}-Instruct cold_start=${COLD_START:-data/tvg_cold_start.jsonl}
    anchor_start= list_start= anchors=(--tvg-reward anchors)
    # Eight prompts an iteration on any number of GPUs.
    train=("${launch[@]}" invert4tvg.py --videos data/videos --accumulation $((8 / gpus)))
    evaluate=("${launch[@]}" evaluate.py --videos data/videos)
    grpo=(--annotations "$rows")
    long=(--epochs 5) half=(--epochs 2) short=(--epochs 1) sft=(--epochs 1) rows_kept=2500
}

invert4tvg() {
    stage invert4tvg --model "$base" "${grpo[@]}" --eval-every 500 --eval-annotations "$test" "$@"
    measure "$out/invert4tvg" invert4tvg-test
}

# ---------------------------------------------------------------------------------------------- other papers

somewhere() {  # [SEED], or charades-3b, or charades-7b
    [ $# -le 1 ] || fail "$* is more than a seed or a place; these systems take no options."
    case ${1:-0} in
        charades-3b | charades-7b) charades "${1#charades-}" ;;
        *) toy "${1:-0}"; warm_start ;;
    esac
}

time_r1() {  # a first choice around an IoU of 0.3, then before each epoch only what is neither hopeless nor solved
    somewhere "$@"
    choose() {  # NAME ANNOTATIONS OPTIONS...: choose rows for $out/time-r1-NAME.json by $model's answers
        local name=$1 from=$2
        shift 2
        measure "$model" "time-r1-$name-rows" --annotations "$from" --tasks tvg
        python stages.py difficulty --annotations "$from" --predictions "$out/time-r1-$name-rows" \
            --keep "$rows_kept" --output "$out/time-r1-$name.json" "$@"
    }
    local model=$base epoch
    choose 0 "$rows" --difficulty 0 1 --choose gaussian
    for epoch in 1 2 3 4 5; do
        choose "$epoch" "$out/time-r1-0.json" --difficulty 0 0.7
        stage "time-r1-$epoch" --model "$model" "${grpo[@]}" "${short[@]}" --annotations "$out/time-r1-$epoch.json" \
            --tvg-reward timestamp_iou --p 1
        model=$out/time-r1-$epoch
    done
    measure "$base" time-r1-base-test --tasks tvg
    measure "$model" time-r1-test --tasks tvg
    python demo/table.py "$out" rows "base=time-r1-base-test" \
        "Time-R1, five epochs=time-r1-test:time-r1-1,time-r1-2,time-r1-3,time-r1-4,time-r1-5"
}

tar_tvg() {  # GRPO collects traces, supervised training of a fresh base on the best, GRPO from there
    somewhere "$@"
    local name
    if [ -n "$anchor_start" ]; then  # the toy's base must learn the prompt; a fifth of these have anchors
        stage tar-base --model "$base" --demonstrations "$anchor_start" "${anchors[@]}" "${sft[@]}" --iterations 800
        base=$out/tar-base
    fi
    # From the same base, for about as long: plain GRPO, and GRPO with the anchors' prompt but no reward for them.
    spawn tar-plain stage tar-plain --model "$base" "${grpo[@]}" "${long[@]}" --p 1
    spawn tar-none stage tar-none --model "$base" "${grpo[@]}" "${long[@]}" "${anchors[@]}" --anchor-weight 0 --p 1
    stage tar-1 --model "$base" "${grpo[@]}" "${half[@]}" "${anchors[@]}" --p 1 --save-rollouts
    python stages.py anchors --rollouts "$out/tar-1" --keep 30000 --output "$out/tar-2.jsonl"
    stage tar-2 --model "$base" --demonstrations "$out/tar-2.jsonl" "${anchors[@]}" "${sft[@]}"
    stage tar-3 --model "$out/tar-2" "${grpo[@]}" "${half[@]}" "${anchors[@]}" --p 1
    measure "$base" tar-base-test "${anchors[@]}" --tasks tvg
    settle
    for name in tar-1 tar-2 tar-3 tar-none; do measure "$out/$name" "$name-test" "${anchors[@]}" --tasks tvg; done
    measure "$out/tar-plain" tar-plain-test --tasks tvg
    python demo/table.py "$out" rows "base=tar-base-test" "stage 1: GRPO with anchors=tar-1-test:tar-1" \
        "stage 2: fresh base, supervised on its best=tar-2-test:tar-1,tar-2" \
        "stage 3: GRPO from there=tar-3-test:tar-1,tar-2,tar-3" "plain GRPO=tar-plain-test:tar-plain" \
        "anchors asked for, not rewarded=tar-none-test:tar-none"
}

tvg_r1() {  # cold start, rows of middling difficulty for the model at hand, GRPO
    somewhere "$@"
    local r1=(--tvg-reward tvg_r1)
    [ -e "$cold_start" ] || fail "$cold_start is not there; name a cold start's file with COLD_START=/path/to/file.jsonl"
    if [ -n "$list_start" ]; then  # the toy's base must learn the prompt
        stage r1-base --model "$base" --demonstrations "$list_start" "${r1[@]}" "${sft[@]}"
        base=$out/r1-base
    fi
    python stages.py longest --demonstrations "$cold_start" --share 0.5 --output "$out/r1-cold.jsonl"
    stage r1-cold --model "$base" --demonstrations "$out/r1-cold.jsonl" "${r1[@]}" "${sft[@]}"
    spawn r1-only r1_rl r1-only "$base"
    spawn r1-both r1_rl r1-both "$out/r1-cold"
    measure "$base" r1-base-test "${r1[@]}" --tasks tvg
    measure "$out/r1-cold" r1-cold-test "${r1[@]}" --tasks tvg
    settle
    cat "$out/r1-only-rows.txt" "$out/r1-both-rows.txt"
    python demo/table.py "$out" rows "base=r1-base-test" "cold start only=r1-cold-test:r1-cold" \
        "RL only=r1-only-test:r1-only" "both=r1-both-test:r1-cold,r1-both"
}

r1_rl() {  # NAME MODEL: TVG-R1's reinforcement learning from MODEL (no KL, as in its code) and an evaluation
    measure "$2" "$1-rollouts" --annotations "$rows" "${r1[@]}" --tasks tvg --samples 4
    python stages.py difficulty --annotations "$rows" --predictions "$out/$1-rollouts" --difficulty 0.1 0.7 \
        --output "$out/$1.json" | tee "$out/$1-rows.txt"
    stage "$1" --model "$2" "${grpo[@]}" --annotations "$out/$1.json" "${r1[@]}" --p 1 --kl-coef 0 --weight-decay 0.01
    measure "$out/$1" "$1-test" "${r1[@]}" --tasks tvg
}

name=${1:-}
shift || true
case $name in
    demo) demo "$@" ;;
    ablations) [ $# != 0 ] || set -- 0 2 3; sweep ablations "$ABLATIONS" "$@" ;;
    few) [ $# != 0 ] || set -- 0 2 3; sweep few "$FEW" "$@" ;;
    charades-3b | charades-7b) charades "${name#charades-}"; invert4tvg "$@" ;;
    time-r1 | tar-tvg | tvg-r1) "${name//-/_}" "$@" ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
