#!/usr/bin/env bash
# GPU tests and benchmarks in one command, within 8 minutes; results go to benchmarks/results/.
# Needs a GPU and Python with torch, triton, numba, timm, pytest and pytest-benchmark, no network;
# without a GPU it does nothing. Each part has a time limit and files of its own, written as it goes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for python in "${PYTHON:-}" python python3 python3.12; do
    [ -n "$python" ] && "$python" -c 'import torch' 2>/dev/null && break
    python=
done
[ -n "$python" ] || { echo "No Python with torch is found: set PYTHON."; exit 1; }
out=${OUT:-benchmarks/results}

name=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') ||
    exit 1
if [ -z "$name" ]; then
    echo "There is no GPU that torch can use: nothing is done."
    exit 0
fi
mkdir -p "$out"
stem="$out/$(tr ' /' '__' <<<"$name")"
status=0
begun=$SECONDS
part() { # SECONDS NAME COMMAND...
    local limit=$1 what=$2
    shift 2
    printf '\n== %s (at %ss)\n' "$what" $((SECONDS - begun))
    timeout -k 5 "$limit" "$@" || { echo "$what: exit code $?"; status=1; }
}

# The package from this folder, where it is not installed: what `pip install` would put together.
if ! "$python" -c 'import fastplastic.kernels' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-deps --no-build-isolation --target "$site" . 2>/dev/null || {
        cp -r fastplastic "$site/" && cp -r kernels cli "$site/fastplastic/"
    }
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -c 'import fastplastic.kernels as k; print(k.__file__)' || exit 1

part 40 "the smallest case" "$python" benchmarks/small_case.py
# Several processes at once: most of the time goes into compiling.
tests=(tests/test_triton_gpu.py tests/test_triton_stats.py tests/test_triton_many.py
    tests/test_triton_parameters.py tests/test_triton_select.py
    tests/test_late_reads.py tests/test_select.py tests/test_resample.py)
if "$python" -c 'import xdist' 2>/dev/null; then
    part 150 "tests, compiled on $name" "$python" -m pytest -q -n 6 "${tests[@]}"
else
    part 150 "tests, compiled on $name" bash -c \
        'printf "%s\0" "$@" | xargs -0 -P 6 -n 1 "$0" -m pytest -q -p no:cacheprovider' \
        "$python" "${tests[@]}"
fi
export FASTPLASTIC_BENCH_SECONDS=${FASTPLASTIC_BENCH_SECONDS:-1}
bench() { # SECONDS STEM ARGUMENTS...
    local limit=$1 kind=$2
    shift 2
    part "$limit" "$kind" "$python" -m pytest -q --benchmark-disable-gc \
        --benchmark-json "$stem.$kind.json" "$@"
    [ ! -s "$stem.$kind.json" ] || "$python" benchmarks/table.py "$stem.$kind.json" | tee "$stem.$kind.md"
}
bench 45 step-resnet50-b32 "benchmarks/bench_overhead.py::test_step[resnet50-32]"
bench 60 step-resnet50-b256 "benchmarks/bench_overhead.py::test_step[resnet50-256]"
part 70 bandwidth "$python" benchmarks/gpu_bandwidth.py -o "$stem.bandwidth.jsonl"
bench 45 select "benchmarks/bench_kernels.py::test_select_and_resample[resnet50]"
for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
        part 30 "compute-sanitizer, $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" benchmarks/small_case.py
    else
        printf '\n== compute-sanitizer is not installed: %s left out\n' "$tool"
    fi
done
printf '\n== done (at %ss)\n' $((SECONDS - begun))
exit $status
