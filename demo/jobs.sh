# shellcheck shell=bash
# Sourced by the scripts on the toy. One core a process, and no process that outlives its script: a signal ends the
# running programs, each of which saves first.
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

run() {  # COMMAND...: in the background, since bash sees a signal at once only while it waits
    "$@" &
    wait $!
}
