#!/usr/bin/env bash
# Builds, tests and measures everything on a GPU: one script, results as JSON, a short table last.
#
#   benchmarks/gpu/run.sh                     all steps
#   benchmarks/gpu/run.sh --part 1|2|3        a third of them, each below ten minutes on an H100
#   benchmarks/gpu/run.sh --resume            only the steps that haven't succeeded yet
#   benchmarks/gpu/run.sh --dry-run           the same list in tiny sizes on the CPU
#   More: --only STEP,STEP  --minutes N (9 with --part, else 27)  --trace FILE  --layers N  --list
#
# Writes seven JSON files and run.log: as many as some places carry back.
#
# Environment: PYTHON (python3), OUT (results, build/gpu), WORK (for the model of 60 GB; if unset, the
# roomiest of the usual folders). The parts share the model, as long as the machine stays the same.
#
# On a machine without network, carry what its python lacks as wheels, and the routes, in .whl/ (which
# git is to ignore). For CPython 3.12 that has torch, transformers, accelerate, typer, pybind11 ...:
#   mkdir -p .whl; python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
#     --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#     --platform manylinux2014_x86_64 -d .whl lmdb==3.0.0 zstandard==0.25.0 setuptools==84.2.1
#   cp qwen.route.csv .whl/     # routes of Qwen3-30B-A3B, of Helldez/BigMoeOnEdge

# Name, part, limit in seconds, and what it should take on an H100: 6, 6 and 7 minutes by part.
STEPS="
build      0 240  75
tests      1 180  90
memcheck   1 120  45
racecheck  1 120  45
kernels    1  90  30
transfers  1 150  75
model      2 300 150
memory     2 150  70
small      2 150  80
prefill    2 200  90
decode     3 530 400
"

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/build/gpu}
PATH=$PATH:/usr/local/cuda/bin
part="" only="" minutes="" trace="" layers="" resume=no dry=no

fail_usage() { echo "$1; the comment at the top of benchmarks/gpu/run.sh has the options" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --part | --only | --minutes | --trace | --layers)
      [ $# -ge 2 ] || fail_usage "$1 needs a value"
      declare "${1#--}=$2"; shift ;;
    --resume) resume=yes ;;
    --dry-run) dry=yes ;;
    --list) echo "$STEPS" | awk 'NF {printf "%-10s part %s, at most %3d s, about %3d s\n", $1, $2, $3, $4}'; exit ;;
    *) fail_usage "unknown option $1" ;;
  esac
  shift
done
[[ $part =~ ^[123]?$ ]] || fail_usage "--part is 1, 2 or 3, not $part"
[[ $minutes =~ ^[0-9]*$ ]] || fail_usage "--minutes is a whole number, not $minutes"
for name in ${only//,/ }; do
  grep -q "^$name " <<<"$STEPS" || fail_usage "there is no step $name"
done

minutes=${minutes:-$([ -n "$part" ] && echo 9 || echo 27)}
deadline=$((SECONDS + 60 * minutes))
mkdir -p "$OUT"
log=$OUT/run.log
marks=${WORK:-${TMPDIR:-/tmp}}/tiered-mem-benchmarks-done
bench=(${WORK:+--dir "$WORK"})
[ $dry = yes ] && bench+=(--smoke) marks=$OUT/done
[ -n "$trace" ] || trace=$(ls .whl/*.route.csv 2>/dev/null | head -1)
routes=(${trace:+--trace "$trace"})
[ $dry = yes ] && routes=()
big=(${layers:+--layers "$layers"})
mkdir -p "$marks"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error

step_build() {
  if [ $dry = yes ]; then "$PYTHON" -c 'import tiered_mem._core'; return; fi
  nvcc --version | tail -2
  nvidia-smi
  local site=${TMPDIR:-/tmp}/tiered-mem-site jobs
  jobs=$(nproc)
  if ls .whl/*.whl >/dev/null 2>&1; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target "$site" \
      .whl/*.whl || return
  fi
  # In place: every process that starts in this folder, or has it on its path, finds the build.
  NPY_NUM_BUILD_JOBS=$jobs "$PYTHON" setup.py -q build_ext --inplace egg_info || return
  [ -e tiered_mem/policies ] || ln -s ../policies tiered_mem/policies
  "$PYTHON" -c 'import tiered_mem._core as core; print(core.__file__)' || return
  # Without a GPU its tests would be skipped, and look as if they had passed.
  "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())'
}

gpu_tests() { "$@" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --timeout 100 "${tests[@]}"; }
step_tests() { tests=(tests); only_said || gpu_tests; }
step_memcheck() { sanitize --tool memcheck --leak-check no; }
step_racecheck() { sanitize --tool racecheck; }
sanitize() {
  tests=(tests/test_*kernel*.py)
  only_said || gpu_tests compute-sanitizer "$@" --error-exitcode 9
}
only_said() {
  ls -d "${tests[@]}" || exit
  [ $dry = yes ] && echo "needs a GPU: not run here"
}

step_kernels() { run_bench bench_kernels; }
step_transfers() { run_bench bench_transfers; }
step_model() { run_bench big_model --make-seconds 200 "${big[@]}"; }
step_memory() { run_bench bench_gpu_memory "${big[@]}"; }
step_small() { run_bench bench_gpu_small "${big[@]}"; }
step_prefill() { with_routes && run_bench bench_gpu_prefill "${big[@]}" "${routes[@]}"; }
step_decode() { with_routes && run_bench bench_gpu_decode "${big[@]}" "${routes[@]}"; }
with_routes() {
  [ $dry = yes ] || [ -n "$trace" ] || { echo "needs routes: --trace FILE, or .whl/*.route.csv"; false; }
}
run_bench() {
  local script=$1; shift
  "$PYTHON" "benchmarks/gpu/$script.py" --json "$OUT/$name.json" "${bench[@]}" "$@"
}

# A step has a process group of its own, so that its limit ends all that it started.
run_limited() {
  local limit=$1 pid watchdog status
  set -m
  (step_"$name") >>"$log" 2>&1 </dev/null &
  pid=$!
  (sleep "$limit"; kill -TERM -- -$pid; sleep 5; kill -KILL -- -$pid) 2>/dev/null &
  watchdog=$!
  set +m
  trap 'kill -- -$pid -$watchdog; exit 130' INT TERM
  wait $pid; status=$?
  trap - INT TERM
  kill -- -$watchdog 2>/dev/null
  wait $watchdog 2>/dev/null
  return $status
}

[ -d "${TMPDIR:-/tmp}/tiered-mem-site" ] || mkdir -p "${TMPDIR:-/tmp}/tiered-mem-site"
[ $dry = yes ] || export PYTHONPATH=$PWD:${TMPDIR:-/tmp}/tiered-mem-site${PYTHONPATH:+:$PYTHONPATH}
failed=0 table=""
while read -r name of limit about; do
  [ -n "$name" ] || continue
  if [ -n "$only" ]; then
    [[ ",$only,build," == *",$name,"* ]] || continue
  elif [ "$of" != 0 ] && [ -n "$part" ] && [ "$of" != "$part" ]; then
    continue
  elif [ $resume = yes ] && [ "$name" != build ] && [ -e "$marks/$name" ]; then
    continue
  fi
  left=$((deadline - SECONDS))
  if [ $left -lt $((about / 2)) ]; then
    failed=1 table+="$name|not run: $left s left of $minutes minutes|"$'\n'
    continue
  fi
  echo "== $name" | tee -a "$log"
  started=$SECONDS before=$(wc -l <"$log")
  run_limited $((limit < left ? limit : left))
  status=$? took=$((SECONDS - started))
  if [ $status = 0 ]; then
    touch "$marks/$name"
    verdict=ok
  else
    failed=1
    verdict="FAILED ($status)"
    [ $took -ge "$limit" ] && verdict="FAILED: ended after $limit s"
    tail -n +$((before + 1)) "$log" | tail -25
    [ "$name" = build ] && { table+="$name|$verdict|$took s"$'\n'; break; }
  fi
  table+="$name|$verdict|$took s"$'\n'
done <<<"$STEPS"

"$PYTHON" benchmarks/gpu/bars.py "$OUT"
echo
printf '%s' "$table" | awk -F'|' '{printf "%-10s %-32s %s\n", $1, $2, $3}'
echo "results in $OUT, all output in $log"
exit $failed
