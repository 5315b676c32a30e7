# shellcheck shell=bash disable=SC2034
# Sourced by the scripts beside it, with their first argument: a seed of the toy, or charades-3b or charades-7b.
source engine/jobs.sh
[ $# -le 1 ] || { echo "$0: give nothing but a seed of the toy, charades-3b or charades-7b." >&2; exit 2; }
case ${1:-0} in
    charades-3b | charades-7b)
        gpus=${GPUS:-8}  # 1, 2, 4 or 8: an iteration has eight prompts on any number of GPUs
        launch=(run torchrun --nproc_per_node "$gpus" --shutdown-timeout 1800)
        train=("${launch[@]}" invert4tvg.py --videos data/videos --accumulation $((8 / gpus)))
        evaluate=("${launch[@]}" evaluate.py --videos data/videos --micro-batch 8)
        out=runs/$1 rows=data/charades_sta_train.txt test=data/charades_sta_test.txt rows_kept=2500
        case $1 in *-3b) base=Qwen/Qwen2.5-VL-3B-Instruct ;; *) base=Qwen/Qwen2.5-VL-7B-Instruct ;; esac
        long=(--epochs 5) half=(--epochs 2) short=(--epochs 1) sft=(--epochs 1)
        anchors=(--tvg-reward papers.rewards.anchors) ;;
    *[!0-9]*)
        echo "$0: $1 is no seed, and neither charades-3b nor charades-7b." >&2
        exit 2 ;;
    *)
        out=runs/demo-${1:-0} base=$out/warm rows=$out/train.txt test=$out/test.txt rows_kept=1000
        export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
        train=(run python invert4tvg.py @demo/toy.args @demo/grpo.args --videos "$out/videos" --seed "${1:-0}")
        evaluate=(run python evaluate.py --videos "$out/videos" --workers 1 --micro-batch 128)
        long=(--iterations 700) half=(--iterations 250) short=(--iterations 60) sft=(--iterations 400 --lr 1e-3)
        anchors=(--tvg-reward papers.rewards.anchors --max-new-tokens 48)
        run bash demo/warm_start.sh "${1:-0}" ;;
esac
