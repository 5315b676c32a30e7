#!/usr/bin/env bash
# Invert4TVG on Charades-STA, in the paper's setting, on 8 GPUs:
#   bash train.sh charades-3b [options of invert4tvg.py]      or charades-7b; GPUS=1, 2 or 4 for fewer
# On toy videos, on a laptop without a GPU:
#   bash train.sh demo [SEED]
# The same command goes on where it was interrupted. papers/ has scripts for other papers' systems.
set -euo pipefail
cd "$(dirname "$0")"
name=${1:-}
case $name in
    demo) exec bash demo/demo.sh "${@:2}" ;;
    charades-3b) model=Qwen/Qwen2.5-VL-3B-Instruct ;;
    charades-7b) model=Qwen/Qwen2.5-VL-7B-Instruct ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
shift
videos=(--videos data/videos)  # where the evaluation finds them too
before=
for word in "$@"; do
    case ${word%%=*} in --output)
        echo "train.sh: the output is runs/$name; call invert4tvg.py itself for another one." >&2
        exit 2 ;;
    esac
    case $word in --videos=*) videos=("$word") ;; esac
    case $before in --videos) videos=(--videos "$word") ;; esac
    before=$word
done
gpus=${GPUS:-8}
case $gpus in 1 | 2 | 4 | 8) ;; *) echo "train.sh: GPUS=$gpus; give 1, 2, 4 or 8." >&2; exit 2 ;; esac

source engine/jobs.sh  # run: a signal ends what runs, after it has saved, for which torchrun's 30 seconds are too few

# Shapes change from iteration to iteration; without this, memory that is free lies in pieces that are too small.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}

# Eight prompts an iteration on any number of GPUs. Every 500 iterations 200 rows of the test file are measured for the
# curve (Figure 1, right); choose no setting and no checkpoint by them.
run torchrun --nproc_per_node "$gpus" --shutdown-timeout 1800 invert4tvg.py --model "$model" \
    --accumulation $((8 / gpus)) --eval-every 500 --output "runs/$name" "$@"
run torchrun --nproc_per_node "$gpus" evaluate.py --model "runs/$name" --micro-batch 16 \
    --output "runs/$name-test" "${videos[@]}"
