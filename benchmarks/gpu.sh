#!/usr/bin/env bash
# Runs everything that needs an NVIDIA GPU, in less than ten minutes and without a network:
#
#   bash benchmarks/gpu.sh [FOLDER]
#
# builds flatops for the GPU present, runs the tests, measures operators and training steps, and runs NVIDIA's memory
# checker and profiler. FOLDER (default: benchmarks/results/gpu-DATE) gets summary.txt, log.txt, tests.xml and JSON, of
# which the JSON is worth committing. A stage that fails does not stop the others, but the exit status is then not 0.
#
# With FLATOPS_GPU_REHEARSAL=1 it runs in small sizes what can run on a CPU, and builds nothing.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/benchmarks/results/gpu-$(date -u +%Y%m%d-%H%M%S)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 1

python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
log=$out/log.txt summary=$out/summary.txt
: >"$log"
: >"$summary"
stage_log=$(mktemp)
trap 'rm -f "$stage_log"' EXIT
failed=0
saved=0

# stage NAME SECONDS COMMAND...: later stages may use the seconds that a stage leaves over.
stage() {
  local name=$1 budget=$(($2 + saved)) start=$SECONDS status verdict
  shift 2
  printf '\n===== %s, %s s\n' "$name" "$budget" >>"$log"
  timeout --signal=INT --kill-after=5 "$((budget > 1 ? budget : 1))" "$@" >"$stage_log" 2>&1
  status=$?
  saved=$((budget - (SECONDS - start)))
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="failed ($status)" ;;
  esac
  tail -c 1000000 "$stage_log" >>"$log"
  printf '%-28s %-14s %4d s\n' "$name" "$verdict" "$((SECONDS - start))" | tee -a "$summary"
  if ((status)); then
    failed=1
    tail -n 25 "$stage_log" | cut -c1-200
  fi
}

skip() {
  printf '%-28s %s\n' "$1" "skipped: $2" | tee -a "$summary" "$log"
}

# run NAME SECONDS CODE ARGUMENT...: a stage in Python.
run() {
  local name=$1 seconds=$2
  shift 2
  stage "$name" "$seconds" "$python" -c "$@"
}

if [[ ${FLATOPS_GPU_REHEARSAL:-} ]]; then
  device=cpu backend=cpp models=(cnn) rounds=1 train=(cnn 2 16 1)
  export OMP_NUM_THREADS=1 KINETO_LOG_LEVEL=99 # the profiler would report at length that there is no GPU
  unset TRITON_INTERPRET                       # would take minutes
  tests=(tests/test_noise.py -k philox)
else
  device=cuda backend=cuda models=(resnet50 vit_base_patch16_224) rounds=15 train=(resnet50 256 224 15)
  tests=()
  for file in tests/test_{ops,noise,cuda,triton,mask}.py tests/test_optim_*.py; do
    [[ -e $file ]] && tests+=("$file")
  done
  tests+=(tests/test_fsdp.py::test_one_shard_on_each_device)
  tests+=(tests/test_integrations_pytorch.py::test_the_snippets_of_the_documentation_run)
  # A few workers share the GPU: some keep it busy while others build their cases on the CPU.
  "$python" -c "import xdist" 2>/dev/null && tests+=(-n 6)
fi

# shellcheck disable=SC2317 # a stage calls it in its own shell
machine() {
  local command
  for command in "uname -a" "nproc" "nvidia-smi" "nvcc --version" "compute-sanitizer --version" "ncu --version"; do
    echo "+ $command"
    $command || true
  done
  "$python" -c '
import importlib.metadata, sys, torch
print(sys.version)
for name in ("torch", "triton", "timm", "pytest", "setuptools", "pybind11", "ninja"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is missing")
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_properties(0))
' "$device"
}
export -f machine
export python device
stage machine 40 bash -c machine

if [[ $device == cuda ]]; then
  MAX_JOBS=$(nproc)
  TORCH_CUDA_ARCH_LIST=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
  export MAX_JOBS TORCH_CUDA_ARCH_LIST
  stage build 95 "$python" -m pip install --no-index --no-build-isolation --no-deps --root-user-action=ignore -v -e .
else
  skip build "a rehearsal uses the installed flatops"
fi

run info 10 '
import json, sys
from pathlib import Path
from flatops import info
report = json.dumps(info.report(), indent=2)
Path(sys.argv[1]).write_text(report + "\n")
print(report)
' "$out/info.json"

stage tests 125 env OMP_NUM_THREADS=2 "$python" -m pytest "${tests[@]}" --tb=short --maxfail=100 --durations=15 \
  -o faulthandler_timeout=60 --junitxml="$out/tests.xml"

for model in "${models[@]}"; do
  run "bench $model" 42 '
import sys
from pathlib import Path
from flatops.benchmarks import bench, bench_gpu
device, model, rounds, path = sys.argv[1:]
sys.exit(bench_gpu.main(bench.Config(device=device, model=model, rounds=int(rounds), json=Path(path))))
' "$device" "$model" "$rounds" "$out/bench_$model.json"
done

run train_step 80 '
import sys
from pathlib import Path
from flatops.benchmarks import train_step
device, path, model, batch, image, rounds = sys.argv[1:]
sys.exit(train_step.main(train_step.Config(
    device=device, model=model, batch=int(batch), image=int(image), rounds=int(rounds), json=Path(path))))
' "$device" "$out/train_step.json" "${train[@]}"

# sanitize TOOL BACKEND SECONDS. Failed API calls are not reported: torch probes for features.
sanitize() {
  if [[ $device == cpu ]]; then
    stage "$1 $2" "$3" "$python" -m flatops.benchmarks.sanitize "$2" cpu
  elif command -v compute-sanitizer >/dev/null; then
    stage "$1 $2" "$3" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
      --report-api-errors no --print-limit 20 "$python" -m flatops.benchmarks.sanitize "$2" cuda
  else
    skip "$1 $2" "compute-sanitizer is not installed"
  fi
}
sanitize memcheck "$backend" 35
if [[ $device == cuda ]]; then
  sanitize racecheck cuda 30
  sanitize memcheck triton 30
else
  skip racecheck "needs a GPU"
fi

once='
import sys
from flatops.benchmarks import bench_gpu
bench_gpu.once(*sys.argv[1:])'
if [[ $device == cpu ]]; then
  run "ncu, without ncu" 30 "$once" "${models[0]}" cpu "$backend"
elif command -v ncu >/dev/null; then
  stage ncu 30 ncu --profile-from-start off --clock-control none --launch-count 48 --section SpeedOfLight \
    --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy \
    "$python" -c "$once" "${models[0]}" cuda cuda
else
  skip ncu "ncu is not installed"
fi

printf '%-28s %-14s %4d s\n' all "$( ((failed)) && echo failed || echo passed)" "$SECONDS" | tee -a "$summary"
exit "$failed"
