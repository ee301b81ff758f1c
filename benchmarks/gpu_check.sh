#!/usr/bin/env bash
# Everything that needs a GPU, in one command, in at most 9 minutes and without a network: builds for
# the card's architecture alone, compares every operation with the CPU, runs pytest, the benchmark,
# the C++ tests and compute-sanitizer, and reads the kernels' machine code.
#
#   benchmarks/gpu_check.sh [--dry-run] [OUT]    OUT: where results go, default benchmarks/results
#
# Needs an NVIDIA driver, nvcc (12.8 or newer), a C++20 compiler, CMake, Ninja, and a Python with pip,
# torch (for CUDA), pytest, pybind11 and scikit-build-core. Used where they are, else skipped with the
# reason: compute-sanitizer, GoogleTest, cuobjdump with nvdisasm; bitsandbytes, PEFT, transformers.
#
#   PYTHON                    the Python to use, default python3
#   QLORA_PEERS               a folder for PYTHONPATH with packages to compare with, default .peers
#   QLORA_GTEST_ROOT          a folder that Debian's libgtest-dev was unpacked into, default
#                             .peers/gtest; a GoogleTest of the system is found without
#   QLORA_GPU_CHECK_SECONDS   less time than the 540 s; all stages then get less
#   QLORA_GPU_CHECK_BUILD     the folder to build in, default build/gpu_check
#   CUDA_HOME                 a toolkit whose tools are used where PATH lacks them, default
#                             /usr/local/cuda
#   CUDA_VISIBLE_DEVICES      which GPU: the first that torch sees is checked
#
# A stage that fails, or does not end in time, does not stop the others; what was skipped is named at
# the end. The exit status is 0 if no stage failed, 1 if one did, 2 if there is nothing to check (no
# GPU, or a tool is missing). The card's settings are left as they are.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
caller=$PWD # what a relative OUT is relative to
cd "$(dirname "$self")/.."
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

# Stages: name, the seconds that are kept for it, what it does. A stage may also use what those before
# it left over.
planned_seconds=540
total_seconds=${QLORA_GPU_CHECK_SECONDS:-$planned_seconds}
reserved_seconds=$((15 * total_seconds / planned_seconds)) # for ending what does not end by itself, and for the summary
stages=(
  "machine|40|says what there is: driver, GPU, toolkit, Python, torch"
  "extension|110|pip install, without a network, for the card's architecture alone"
  "small-cases|15|every operation on small odd shapes, against the CPU"
  "pytest|150|pytest -m 'cuda and not slow'"
  "bench|65|benchmarks/bench_cuda.py"
  "cpp-tests|35|CMake builds qlora_cuda_tests beside the extension, if there is a GoogleTest"
  "googletest|10|its tests: the device, and the codec against golden files"
  "memcheck|30|compute-sanitizer on the small cases: accesses outside of memory"
  "racecheck|30|the same: races in shared memory"
  "initcheck|30|the same: reads of memory that nobody wrote"
  "resources|10|registers, memory and instructions of every kernel, by cuobjdump"
)

python=${PYTHON:-python3}
peers=$(readlink -m "${QLORA_PEERS:-.peers}")
gtest_root=$(readlink -m "${QLORA_GTEST_ROOT:-.peers/gtest}")
build=$(readlink -m "${QLORA_GPU_CHECK_BUILD:-build/gpu_check}")
site=$build/site
cpp_tests=$build/extension/tests/cpp/cuda/qlora_cuda_tests
skipped_status=77
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$site:$peers${PYTHONPATH:+:$PYTHONPATH}"
export QLORA_REQUIRE_GPU=1 # a test that finds no GPU here fails instead of being skipped
small_cases=tests/python/cuda_small_cases.py

# A script that runs in the background ignores interrupts, and so would its stages. (coreutils 8.31.)
interruptible=(env --default-signal=INT)
"${interruptible[@]}" true 2>/dev/null || interruptible=(env)

skip() {
  printf '%s\n' "$*" >"$build/reason"
  exit "$skipped_status"
}

die() {
  printf '%s\n' "$*" | tee "$build/reason" >&2
  exit 1
}

# What the stage "machine" found out of torch's first GPU, the one that all stages use.
card() { sed -n "s/^$1: //p" "$build/card"; }

stage_machine() {
  local tool module missing=() reason
  for tool in nvcc cmake ninja "$python"; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    for module in pip pytest pybind11 scikit_build_core; do
      "$python" -c "import $module" >/dev/null 2>&1 || missing+=("Python's $module")
    done
  fi
  if [ ${#missing[@]} -gt 0 ]; then
    die "missing: $(IFS=,; echo "${missing[*]}")"
  fi
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --format=csv,noheader --query-gpu=name,driver_version,memory.total || true
  fi
  nvcc --version | tail -n 2
  # QLORA_CUDA_ARCHS calls compute capability 9.0 90a-real, 8.6 86-real.
  if ! "$python" - >"$build/card" 2>"$build/reason" <<'END'; then
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
major, minor = torch.cuda.get_device_capability(0)
print(f"name: {torch.cuda.get_device_name(0)}")
print(f"architecture: {major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__} for CUDA {torch.version.cuda}")
END
    reason=$(tail -n 1 "$build/reason")
    die "${reason:-torch sees no GPU}"
  fi
  rm -f "$build/reason" # a warning of torch's, maybe
  cat "$build/card"
}

stage_extension() {
  "$python" -m pip install --no-build-isolation --no-deps --upgrade --target "$site" \
    -C build-dir="$build/extension" -C cmake.define.QLORA_CUDA=ON \
    -C cmake.define.QLORA_CUDA_ARCHS="$(card architecture)" -C cmake.define.QLORA_BUILD_TESTS=OFF .
  if ! "$python" - "$site" <<'END'; then
import sys, qlora_native
print(qlora_native.__file__, qlora_native.build_info())
sys.exit(not qlora_native.__file__.startswith(sys.argv[1]))
END
    rm -rf "$site" # nothing that follows may take the other one for it
    die "another qlora_native hides the one that was built (an editable install?): uninstall it"
  fi
}

# In the extension's build folder, where the library is compiled already: the tests alone are new.
stage_cpp_tests() {
  require_extension
  local log=$build/configure.log
  if ! cmake -S . -B "$build/extension" -DQLORA_BUILD_TESTS=ON -DQLORA_FETCH_GTEST=OFF \
    -DGTest_ROOT="$gtest_root/usr" >"$log" 2>&1; then
    if grep -q "GoogleTest is not available" "$log"; then
      skip "there is no GoogleTest: neither of the system nor in $gtest_root"
    fi
    cat "$log"
    return 1
  fi
  cmake --build "$build/extension" --target qlora_cuda_tests
}

require_cpp_tests() { [ -x "$cpp_tests" ] || skip "qlora_cuda_tests was not built"; }
require_extension() { [ -d "$site/qlora_native" ] || skip "the extension was not built"; }

stage_googletest() {
  require_cpp_tests
  "$cpp_tests" --gtest_brief=1
}

stage_small_cases() {
  require_extension
  "$python" "$small_cases"
}

stage_pytest() {
  require_extension
  local files
  # The others need not even be imported: they may want packages that are not here.
  mapfile -t files < <(grep -rlE 'mark\.cuda' tests/python --include='test_*.py' | sort)
  "$python" -m pytest -q -m "cuda and not slow" -p no:cacheprovider --continue-on-collection-errors \
    --durations=15 --tb=short -rfE --junitxml="$OUT/pytest.xml" "${files[@]}"
}

sanitize() {
  require_extension
  local log=$OUT/$1.log options=()
  command -v compute-sanitizer >/dev/null || skip "there is no compute-sanitizer"
  # Else any call that returns an error counts, also where torch asks what a driver can do.
  if [ "$1" = memcheck ]; then options=(--report-api-errors no); fi
  # A tensor is then an allocation of its own, with bounds that memcheck sees.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  if compute-sanitizer --tool "$1" "${options[@]}" --target-processes all --error-exitcode 9 \
    "$python" "$small_cases" >"$log" 2>&1; then
    tail -n 5 "$log"
  elif grep -q "Device not supported" "$log"; then
    skip "compute-sanitizer does not support this device, or this virtual machine"
  else
    head -n 200 "$log"
    return 1
  fi
}

stage_resources() {
  require_extension
  local status=0
  "$python" tests/python/cuda_resources.py >"$OUT/cuda_resources.md" 2>"$build/resources.log" ||
    status=$?
  if [ "$status" = "$skipped_status" ]; then
    rm -f "$OUT/cuda_resources.md"
    skip "$(tail -n 1 "$build/resources.log")"
  fi
  cat "$build/resources.log" "$OUT/cuda_resources.md"
  return "$status"
}

stage_bench() {
  require_extension
  local name status=0
  name=cuda_$(card name | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' _)
  # It begins no row in the last ten seconds, so that it ends by itself and writes what it has.
  "$python" benchmarks/bench_cuda.py --json "$OUT/$name.json" \
    --budget $((STAGE_SECONDS > 20 ? STAGE_SECONDS - 10 : 10)) || status=$?
  if [ -f "$OUT/$name.json" ]; then
    "$python" benchmarks/bench_cuda.py --markdown "$OUT/$name.json" >"$OUT/$name.md"
  fi
  return "$status"
}

do_stage() {
  case $1 in
    machine) stage_machine ;;
    extension) stage_extension ;;
    cpp-tests) stage_cpp_tests ;;
    small-cases) stage_small_cases ;;
    googletest) stage_googletest ;;
    pytest) stage_pytest ;;
    memcheck | racecheck | initcheck) sanitize "$1" ;;
    resources) stage_resources ;;
    bench) stage_bench ;;
    *) die "there is no stage $1" ;;
  esac
}

# The seconds that are kept for a stage, given its entry.
kept_seconds() {
  local limit
  IFS='|' read -r _ limit _ <<<"$1"
  echo $((limit * total_seconds / planned_seconds))
}

# Runs a stage in a process of its own, so that its time can be limited, and notes its verdict. Out of
# time it is interrupted, as by Ctrl-C, upon which pytest says what it has found so far.
run_stage() {
  local name=$1 limit=$2 begin=$SECONDS status=0 verdict reason=""
  rm -f "$build/reason"
  printf '\n==== %s (at most %d s; %d s since the start)\n' "$name" "$limit" "$begin"
  if [ "$limit" -lt 1 ]; then
    verdict=failed reason="no time was left"
  else
    STAGE_SECONDS=$limit OUT=$out timeout --signal=INT --kill-after=10 "$limit" \
      "${interruptible[@]}" bash "$self" --stage "$name" || status=$?
    if [ -f "$build/reason" ]; then reason=$(<"$build/reason"); fi
    case $status in
      0) verdict=passed ;;
      "$skipped_status") verdict=skipped ;;
      124 | 137) verdict=failed reason="it did not end within $limit s" ;;
      *) verdict=failed reason=${reason:-exit status $status} ;;
    esac
  fi
  printf -- '---- %s %s%s\n' "$name" "$verdict" "${reason:+: $reason}"
  printf '%s\t%s\t%d\t%s\n' "$name" "$verdict" $((SECONDS - begin)) "${reason//[$'\t\n']/ }" \
    >>"$build/verdicts"
}

# The verdicts so far as a table, and in OUT/gpu_check.json.
summarise() {
  local name verdict seconds reason
  printf '\n%-12s %-8s %5s  %s\n' stage verdict s reason
  while IFS=$'\t' read -r name verdict seconds reason; do
    printf '%-12s %-8s %5d  %s\n' "$name" "$verdict" "$seconds" "$reason"
  done <"$build/verdicts"
  awk -F '\t' '$2 == "skipped" { print "NOT CHECKED: " $1 " (" $4 ")" }' "$build/verdicts"
  printf '%d s in all; results are in %s\n' "$SECONDS" "$out"
  awk -F '\t' -v total="$SECONDS" '
    function text(s) { gsub(/[\\"]/, "\\\\&", s); return "\"" s "\"" }
    BEGIN { printf "{\"seconds\": %d, \"stages\": [", total }
    { printf "%s\n {\"stage\": %s, \"verdict\": %s, \"seconds\": %d, \"reason\": %s}",
        (NR > 1 ? "," : ""), text($1), text($2), $3, text($4) }
    END { print "\n]}" }' "$build/verdicts" >"$out/gpu_check.json"
}

check_everything() {
  local stage name reserved=0 is_usable=1
  rm -f "$build/verdicts" "$cpp_tests" # what an earlier version built must not be taken for this one's
  rm -rf "$site"
  for stage in "${stages[@]}"; do
    reserved=$((reserved + $(kept_seconds "$stage")))
  done
  for stage in "${stages[@]}"; do
    name=${stage%%|*}
    reserved=$((reserved - $(kept_seconds "$stage"))) # for the stages after this one
    run_stage "$name" $((total_seconds - reserved_seconds - SECONDS - reserved))
    if [ "$name" = machine ] && ! grep -q $'^machine\tpassed' "$build/verdicts"; then
      is_usable=0
      break
    fi
  done
  summarise
  [ "$is_usable" = 1 ] || return 2
  ! grep -q $'\tfailed\t' "$build/verdicts"
}

if [ "${1:-}" = --stage ]; then
  do_stage "$2"
  exit
fi
is_dry_run=0
if [ "${1:-}" = --dry-run ]; then
  is_dry_run=1
  shift
fi
if [ $# -gt 1 ] || [[ ${1:-} == -* ]]; then
  echo "usage: gpu_check.sh [--dry-run] [OUT]" >&2
  exit 2
fi
out=$(cd "$caller" && readlink -m "${1:-${self%/*}/results}")
if [ "$is_dry_run" = 1 ]; then
  printf 'at most %d s, %d s of them reserved; results go to %s\n' \
    "$total_seconds" "$reserved_seconds" "$out"
  for stage in "${stages[@]}"; do
    printf '%-12s %4d s  %s\n' "${stage%%|*}" "$(kept_seconds "$stage")" "${stage##*|}"
  done
  exit
fi
mkdir -p "$out" "$build"
set +e # the verdicts say what failed; a stage, a process of its own, stops at what fails
check_everything 2>&1 | tee "$out/gpu_check.log"
exit "${PIPESTATUS[0]}"
