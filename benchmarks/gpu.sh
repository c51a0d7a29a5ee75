#!/usr/bin/env bash
# A quarter of an hour of a GPU: its tests, where the time of steering and tuning goes, and trainings that go on from the shipped weights.
# For a bare machine with Python, torch and no network; benchmarks/gpu_pack.sh packs what it needs into a folder beforehand.
#
#   bash benchmarks/gpu.sh OUT                                        # nine minutes
#   bash benchmarks/gpu.sh OUT 4 "tests=2 emoji=3"                    # four minutes, two phases, in shares of the time
#
# The phases are tests, speed, profile, fashion, emoji and emoji64. Each gets its share of what is left, is stopped when that is over, and
# may fail by itself; what one leaves over goes to the next ones. The same command goes on where it was stopped (WORK holds what is done)
# and leaves out what is finished. OUT gets log.txt, results.json, runs.tar.gz (figures, logs, cards) and weights: few files, each of at
# most 16 MiB, written after every phase.
#
# PACK: folder of the inputs (.gpu). WORK: folder between starts (.gpu-work). PYTHON: python3. TINY=1: a few rows on the CPU, to try it.
set -u
out=${1:?usage: bash benchmarks/gpu.sh OUT [MINUTES] [SPLIT]} minutes=${2:-9}
split=${3:-tests=2 speed=1 profile=2 fashion=2 emoji=4 emoji64=4}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 1
end=$(($(date +%s) + minutes * 60 - ${SPARE:-15}))
work=${WORK:-.gpu-work} pack=${PACK:-.gpu} python=${PYTHON:-python3} tiny=${TINY:+--tiny}
mkdir -p "$work/done" "$work/runs" && work=$(cd "$work" && pwd) || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site:$PWD:$PWD/rewards:$PWD/zoo" STEERFM_DATA="$work/data"
[ -n "$tiny" ] && export CUDA_VISIBLE_DEVICES= STEERFM_TEST_DEVICE=cpu
logs=("$work/log.txt" "$out/log.txt")
[ -e "${logs[0]}" ] && cp "${logs[@]}"

say() { echo "[$(date +%H:%M:%S), $((end - $(date +%s))) s left] $*" | tee -a "${logs[@]}"; }
collect() { "$python" benchmarks/gpu.py collect "$work/runs" "$out" || say "not collected"; }

# phase NAME SECONDS COMMAND...: what it prints goes to the log as well; what is done is not done again
phase() {
    local name=$1 seconds=$2 begin code
    shift 2
    [ -e "$work/done/$name" ] && say "$name: done before" && return
    [ "$seconds" -lt 5 ] && say "$name: no time" && return
    say "$name: at most $seconds s"
    begin=$(date +%s)
    timeout -s TERM -k 10 "$seconds" "$@" 2>&1 | tee -a "${logs[@]}"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] && touch "$work/done/$name"
    say "$name: code $code after $(($(date +%s) - begin)) s$([ "$code" = 124 ] && echo ", its time was over")"
    echo "{\"code\": $code, \"seconds\": $(($(date +%s) - begin))}" >"$work/runs/phase-$name.json"
    collect
}

setup() {
    local wheels=("$pack"/wheels/*.whl)
    [ -e "${wheels[0]}" ] && { "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site" "${wheels[@]}" || return; }
    "$python" benchmarks/gpu.py metadata "$work/site" && "$python" benchmarks/gpu.py unpack "$pack/data" "$work/data" &&
        "$python" -c "import torch, steerfm.cli; print('torch', torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())"
}

command() {
    case $1 in
    tests) echo "$python" -m pytest -v -m gpu -o filterwarnings=default -p no:cacheprovider $(grep -rl "mark.gpu" tests) ;;
    speed) echo "$python" benchmarks/speed.py --repeats "$([ -n "$tiny" ] && echo 1 --particles 2 --steps 1 || echo 10 --particles 256)" --out "$work/runs/speed.json" ;;
    profile) echo "$python" benchmarks/gpu.py $tiny profile "$work/runs/profile.json" ;;
    fashion | emoji | emoji64) echo "$python" benchmarks/gpu.py $tiny train "$1" "$work/runs" "$2" ;;
    *) return 1 ;;
    esac
}

export -f setup
export work pack python
phase setup $((end - $(date +%s))) bash -c setup
rest=0
for part in $split; do rest=$((rest + ${part#*=})); done
for part in $split; do
    name=${part%%=*} share=${part#*=}
    left=$((end - $(date +%s)))
    seconds=$((left * share / rest)) rest=$((rest - share))
    [ "$rest" = 0 ] && rest=1
    # a training plans to be done before it would be stopped
    if line=$(command "$name" $((seconds - seconds / 10))); then
        # shellcheck disable=SC2086
        phase "$name" "$seconds" $line
    else
        say "no phase $name: tests, speed, profile, fashion, emoji, emoji64"
    fi
done
collect
say "the end"
