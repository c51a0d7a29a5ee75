#!/usr/bin/env bash
# What benchmarks/gpu.sh needs on a machine without a network, in one folder: data, packed small, and wheels.
#
#   bash benchmarks/gpu_pack.sh                                   # into .gpu, at most 55 MiB
#   MIB=24 bash benchmarks/gpu_pack.sh --fashion 12000 --no-tones # where less may be carried
#   WHEELS="omegaconf lightning" bash benchmarks/gpu_pack.sh      # packages that machine does not have, with their needs named
#
# PACK: the folder. MIB: its largest size. WHEELS: packages, without what they need in turn: name that too. TARGET: the Python and the
# platforms of that machine, as pip download takes them. PYTHON: of this machine, with the project installed.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=${PACK:-.gpu} mib=${MIB:-55} python=${PYTHON:-.venv/bin/python}
wheels=${WHEELS-omegaconf open-clip-torch ftfy wcwidth}
target=${TARGET:---python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64}
mkdir -p "$pack/wheels"
if [ -n "$wheels" ]; then
    # shellcheck disable=SC2086
    "$python" -m pip download -q --no-deps --only-binary=:all: $target -d "$pack/wheels" $wheels
fi
"$python" benchmarks/gpu.py pack "$pack/data" "$@"
size=$(du -sk "$pack" | cut -f1)
echo "$pack: $((size / 1024)) MiB"
if [ "$size" -gt $((mib * 1024)) ]; then
    echo "more than $mib MiB: give --fashion 12000, or --no-tones, or both" >&2
    exit 1
fi
