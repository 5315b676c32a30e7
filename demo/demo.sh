#!/usr/bin/env bash
# The method on toy videos and a tiny model, on a laptop without a GPU:
#   bash demo/demo.sh [SEED] [options of invert4tvg.py for the two GRPO runs]
# The same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
seed=0
case ${1:-} in [0-9]*) seed=$1; shift ;; esac
out=runs/demo-$seed
source engine/jobs.sh
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # one core a process

for word in "$@"; do
    case ${word%%=*} in --seed | --model | --videos | --annotations | --demonstrations | --output | --p)
        echo "demo.sh: $word is set by the demo itself (its seed stands alone: demo 3); leave it out." >&2
        exit 2 ;;
    esac
done
# A mistyped option must not cost the minutes before it is used.
check='import sys; import invert4tvg as i; sys.argv[0] = "demo.sh"; i.parse_settings(i.Config, "")'
run python -c "$check" @demo/toy.args @demo/grpo.args --annotations "$out/train.txt" "$@"

run bash demo/warm_start.sh "$seed"
train=(python invert4tvg.py @demo/toy.args --videos "$out/videos" --seed "$seed" --model "$out/warm")
grpo=("${train[@]}" @demo/grpo.args --annotations "$out/train.txt"
    --eval-every 50 --eval-limit 60 --eval-annotations "$out/val.txt" "$@")

echo "--- 4 of 6: GRPO, with inversion (shown) and on grounding alone ($out/tvg-only.log); about 5 minutes left"
"${grpo[@]}" --p 1 --output "$out/tvg-only" > "$out/tvg-only.log" 2>&1 &
other=$!
nice -n 19 python -m report "$out/grpo" --against "$out/tvg-only" --watch > "$out/report.log" 2>&1 &  # in spare time
echo "    its curves grow in $out/grpo/report.html"
run "${grpo[@]}" --p 0.8 --output "$out/grpo"
wait "$other"

echo "--- 5 of 6: as much time of supervised training ($out/supervised.log), and evaluation; about 3 minutes left"
iterations=$(python -m demo.table "$out" iterations)
"${train[@]}" --demonstrations "$out/warmup-2.jsonl" --lr 1e-3 --iterations "$iterations" \
    --output "$out/supervised" > "$out/supervised.log" 2>&1 &
other=$!
evaluate() {
    run python evaluate.py --videos "$out/videos" --annotations "$out/test.txt" --workers 1 --micro-batch 256 \
        --model "$out/$1" --output "$out/$1-test"
}
for name in warm grpo tvg-only; do evaluate "$name"; done
wait "$other"
evaluate supervised

echo "--- 6 of 6: the table, and the page"
python -m demo.table "$out"
echo "done: videos, models, logs and evaluations are in $out; README.md goes on with Charades-STA and your own data."
python -m report "$out/grpo" --against "$out/tvg-only" "$out/warm-test" || true  # its packages are optional
