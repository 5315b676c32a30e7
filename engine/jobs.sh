# shellcheck shell=bash
# Sourced by the scripts: no process outlives its script. A signal ends the running programs, each of which saves first.
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

run() {  # COMMAND...: in the background, since bash sees a signal at once only while it waits
    "$@" &
    wait $!
}
