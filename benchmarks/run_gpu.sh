#!/usr/bin/env bash
# GPU tests, memory checks and benchmarks in one command; results go to benchmarks/results/.
# Needs the packages of pyproject.toml ([test]) and a GPU; without one it does nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
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
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step "tests, compiled on $name"
timeout 180 "$python" -m pytest -q tests/test_triton_gpu.py tests/test_triton_stats.py \
    tests/test_triton_select.py tests/test_select.py tests/test_resample.py || status=1

for tool in memcheck racecheck; do
    step "compute-sanitizer, $tool"
    if command -v compute-sanitizer >/dev/null; then
        timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" benchmarks/small_case.py || status=1
    else
        echo "compute-sanitizer is not installed: left out"
    fi
done

step "benchmarks"
FASTPLASTIC_BENCH_SECONDS=${FASTPLASTIC_BENCH_SECONDS:-0.5} timeout 220 "$python" -m pytest -q \
    benchmarks/bench_kernels.py benchmarks/bench_overhead.py --benchmark-disable-gc \
    --benchmark-json "$stem.json" || status=1
[ ! -s "$stem.json" ] || "$python" benchmarks/table.py "$stem.json" | tee "$stem.md"
step "done"
exit $status
