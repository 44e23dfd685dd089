#!/usr/bin/env bash
# Proof and figures of the CUDA backend on a machine with a GPU: builds, tests, checks with
# compute-sanitizer, benchmarks. Every stage runs by itself under its own time limit, so that one
# failure hides nothing. Needs a GPU, nvcc, CMake and a Python with pybind11 3, NumPy, pytest and
# hypothesis; torch and transformers for the comparison. No network. See benchmarks/README.md.
#
# All of it is more than one visit of 9 minutes to a machine holds; these three are enough:
#   scripts/gpu_check.sh OUT --pack --stages ptx_wrappers,tests,memcheck,racecheck,decode_short
#   scripts/gpu_check.sh OUT --pack --stages kernel_times,decode_7b,tree_attention,linear,decode_8b
#   scripts/gpu_check.sh OUT --pack --stages tests,peer_ops,peer_7b,peer_8b,decode_1b,decode_long
# In the last one "tests" stands for whatever was repaired since.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/gpu_check.sh OUT [options]
  OUT               folder for summary.md, logs/ and *.json; made if it is absent
  --pack            leave two files in OUT, summary.md and all.tgz
  --stages LIST     run these, in this order, after the build; default all that --models asks for:
                    ptx_wrappers, tests, memcheck, racecheck (these three at once), peer_ops,
                    kernel_times, decode_MODEL, tree_attention, linear, typical_acceptance,
                    compact_kv, peer_MODEL, peer_compile; further decode_short, decode_long
  --models LIST     of tiny, 1b, 7b, 8b; default 7b,8b,1b
  --quick           fewer shapes and samples
  --device NAME     cuda (default), cuda:N, or cuda-emulated to try this script without a GPU
  --python FILE     interpreter; default python3
  --build FOLDER    keep the build here; default a temporary folder
  --shared FOLDER   the published test cases; default ../shared, beside the repository
  --commit NAME     what the results are called by, where git cannot tell
  --seconds N       limit of everything together; default 505
TEXT
}

given=("$@")
die() { echo "gpu_check: $1" >&2; exit 2; }

out='' models=7b,8b,1b quick='' device=cuda python=python3 build='' shared='' commit='' seconds=505
pack='' stages=''
while (($# > 0)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --quick) quick=--quick ;;
    --pack) pack=--pack ;;
    --models | --device | --python | --build | --shared | --commit | --seconds | --stages)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift ;;
    -*) usage >&2; die "unknown option $1" ;;
    *)
      [[ -z $out ]] || die "more than one folder: $out, $1"
      out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || { usage >&2; exit 2; }
[[ $device =~ ^(cuda|cuda:[0-9]+|cuda-emulated)$ ]] || die "--device is $device"
[[ $seconds =~ ^[0-9]+$ ]] || die "--seconds is $seconds"
declare -A shape_of=([tiny]=tiny [1b]=llama-1b [7b]=llama-2-7b [8b]=llama-3-8b)
shapes=''
for model in ${models//,/ }; do
  [[ -n ${shape_of[$model]:-} ]] || die "unknown model $model"
  shapes+=${shapes:+,}${shape_of[$model]}
done
# Seconds that each stage may take.
declare -A limit_of=([ptx_wrappers]=60 [tests]=170 [memcheck]=160 [racecheck]=160 [peer_ops]=60
  [kernel_times]=130 [tree_attention]=70 [linear]=70 [typical_acceptance]=30 [compact_kv]=30
  [decode_short]=100 [decode_long]=200 [peer_compile]=100)
for model in "${!shape_of[@]}"; do limit_of[decode_$model]=130 limit_of[peer_$model]=60; done
if [[ -z $stages ]]; then
  stages=ptx_wrappers,tests,memcheck,racecheck,peer_ops,kernel_times
  for model in ${models//,/ }; do stages+=,decode_$model; done
  stages+=,tree_attention,linear,typical_acceptance,compact_kv
  for model in ${models//,/ }; do stages+=,peer_$model; done
  [[ -n $quick ]] || stages+=,peer_compile
fi
for name in ${stages//,/ }; do [[ -n ${limit_of[$name]:-} ]] || die "unknown stage $name"; done
command=scripts/gpu_check.sh
for word in "${given[@]}"; do
  [[ $word == "$out" ]] && command+=' OUT' || command+=" $word"
done

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
shared=$(realpath -m "${shared:-$root/../shared}")
python=$(command -v "$python") || die "no $python"
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
PATH=$(dirname "$python"):$PATH
if [[ -z $build ]]; then
  build=$(mktemp -d)
  remove_build=yes
fi
mkdir -p "$build" || exit 2
build=$(cd "$build" && pwd)
cd "$root" || exit 2
# Logs and figures lie in $results.
results=$out
if [[ -n $pack ]]; then
  results=$build/results
  rm -rf "$results"
fi
mkdir -p "$results/logs" || exit 2
rm -f "$results"/logs/* "$results"/{linear,tree_attention,typical_acceptance,compact_kv}.json \
  "$results"/{decode,peer,kernel}_*.json "$out/all.tgz"

emulated='' plugin=medusa_cuda
[[ $device != cuda-emulated ]] || emulated=yes plugin=medusa_cuda_emulated
# One device of several is shown to everybody as the only one.
if [[ $device == cuda:* ]]; then
  IFS=, read -ra shown <<< "${CUDA_VISIBLE_DEVICES:-}"
  index=${device#cuda:}
  export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=${shown[$index]:-$index}
  device=cuda
fi
# Tools that their installers leave off the PATH.
for folder in /usr/local/cuda/bin /usr/local/cuda-*/bin /opt/cuda/bin /opt/nvidia/nsight-compute/*; do
  [[ ! -d $folder ]] || PATH=$PATH:$folder
done
if command -v nvcc > /dev/null; then export CUDACXX=${CUDACXX:-$(command -v nvcc)}; fi
[[ -n $commit ]] || commit=$(git describe --always --dirty --abbrev=10 2> /dev/null || echo unknown)
site=$build/site
export results shapes quick device python build shared commit root site emulated plugin PATH
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HYPOTHESIS_STORAGE_DIRECTORY=$build/hypothesis
export HF_HUB_OFFLINE=1

# --- stages: functions that run in a shell of their own; 77 means skipped, the last line says why.

skip() { echo "$1"; exit 77; }
need() { [[ -e $1 ]] || { echo "${1#"$build"/} was not built"; exit 1; }; }
bench() {
  need "$build/lib$plugin.so"
  need "$build/benchmarks/$1"
  "$build/benchmarks/$1" --device "$device" "${@:2}"
}
have_module() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

# gpu FIELDS: what nvidia-smi says of the GPU that is used.
gpu() {
  nvidia-smi -i "${CUDA_VISIBLE_DEVICES:-0}" --query-gpu="$1" --format=csv,noheader | head -n 1
}

environment() {
  local missing='' name
  uname -srm
  nproc
  [[ -n $emulated ]] || nvidia-smi || missing+=' nvidia-smi'
  nvcc --version || missing+=' nvcc'
  cmake --version || missing+=' cmake'
  c++ --version || missing+=' c++'
  "$python" --version
  for name in ninja compute-sanitizer ncu; do
    command -v "$name" || missing+=" $name"
  done
  missing+=$("$python" - <<'PY'
import sys
from importlib.metadata import version
from importlib.util import find_spec

PACKAGES = {"xdist": "pytest-xdist", "pytest_timeout": "pytest-timeout"}
for name in ["pybind11", "numpy", "pytest", "hypothesis", "xdist", "pytest_timeout", "scipy",
             "torch", "transformers", "safetensors", "jinja2"]:
    if find_spec(name) is None:
        print("", name, end="")
    else:
        print(name, version(PACKAGES.get(name, name)), file=sys.stderr)
PY
  )
  [[ -z $missing ]] || echo "missing:$missing"
  command -v cmake > /dev/null && command -v c++ > /dev/null \
    && { [[ -n $emulated ]] || command -v nvcc > /dev/null; }
}

build_all() {
  local flags=(-DCMAKE_BUILD_TYPE=Release -DMEDUSA_BUILD_BENCHMARKS=ON "-DMEDUSA_COMMIT=$commit")
  local targets=("$plugin" bench_{linear,tree_attention,typical_acceptance,compact_kv,decode})
  local keep_going=-k status=0
  if command -v ninja > /dev/null; then
    flags+=(-G Ninja)
    keep_going='-k 0'
  fi
  if [[ -n $emulated ]]; then
    flags+=(-DMEDUSA_CUDA=OFF -DMEDUSA_CUDA_EMULATED=ON)
  else
    local capability
    capability=$(gpu compute_cap | tr -d .)
    [[ $capability =~ ^[0-9]+$ ]] && capability+=-real || capability=native
    flags+=(-DMEDUSA_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$capability" -DMEDUSA_BUILD_TESTS=ON)
    targets+=(ptx_wrappers)
  fi
  if cmake -S "$root" -B "$build" "${flags[@]}" -DMEDUSA_BUILD_PYTHON=ON -DPYBIND11_FINDPYTHON=ON \
    "-DPython_EXECUTABLE=$python" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)"; then
    targets+=(_core)
  else
    status=1
    echo "gpu_check: once more without the Python module"
    rm -f "$build/CMakeCache.txt"
    cmake -S "$root" -B "$build" "${flags[@]}" -DMEDUSA_BUILD_PYTHON=OFF || return
  fi
  # One error leaves the other programs alone.
  # shellcheck disable=SC2086
  cmake --build "$build" --parallel "$(nproc)" --target "${targets[@]}" -- $keep_going || status=1
  return $status
}

# The package as Python finds it: its sources beside the module, which finds the library by its
# real path.
make_site() {
  local module
  rm -rf "$site"
  mkdir -p "$site"
  cp -r "$root/python/medusa_ext" "$site/"
  for module in "$build"/_core*.so; do
    [[ ! -e $module ]] || ln -sf "$module" "$site/medusa_ext/"
  done
}

ptx_wrappers() {
  [[ -z $emulated ]] || skip "nothing to compare without a GPU"
  local program
  program=$(find "$build" -name ptx_wrappers -type f -perm -u+x | head -n 1)
  [[ -n $program ]] || { echo "ptx_wrappers was not built"; return 1; }
  "$program"
}

# on_tests COMMAND...: the command, which ends in pytest's arguments, finds the package.
on_tests() { PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} "$@"; }

# pytest_options FAILURES: what all runs of pytest take.
pytest_options() {
  printf '%s\n' -q -rfE --tb=short -W default -p no:cacheprovider --device "$device" \
    --shared "$shared" --failures "$1"
  if have_module pytest_timeout; then printf '%s\n' --timeout 90 --timeout-method thread; fi
}

# workers N: the options for up to N processes.
workers() {
  have_module xdist || return 0
  printf '%s\n' -n "$(($(nproc) > $1 ? $1 : $(nproc)))" --dist worksteal --max-worker-restart 1000
}

# The module and the device work: else all tests would be skipped, and that looks like success.
need_tests() {
  compgen -G "$build/_core*.so" > /dev/null || { echo "the Python module was not built"; exit 1; }
  need "$build/lib$plugin.so"
  local module
  for module in numpy pytest hypothesis; do
    have_module "$module" || { echo "no $module"; exit 1; }
  done
  on_tests "$python" - "$device" <<'PY' || exit 1
import sys

from medusa_ext import _core

backend = _core.Backend(sys.argv[1])
assert sys.argv[1] in _core.available_devices(), _core.available_devices()
print(backend.name, backend.detail)
PY
}

tests() {
  need_tests
  local files=(tests/test_op_*.py tests/test_sampling.py tests/test_typical_acceptance.py
               tests/test_exact_*.py tests/test_device*.py) options more
  [[ -z $quick ]] || files=(tests/test_op_*.py)
  [[ -z $emulated ]] || files=(tests/test_op_gather_rows.py tests/test_exact_device.py)
  mapfile -t options < <(pytest_options "$results/logs/failures.txt")
  mapfile -t more < <(workers 12)
  on_tests "$python" -m pytest "${options[@]}" "${more[@]}" "${files[@]}"
}

# Failed tests of exactness and of devices, four more times: as they are, without overlapped
# launches, without graphs, without both. Tells races from arithmetic.
diagnose() {
  local ids id options more name row all='plain overlap graphs both'
  mapfile -t ids < <(failed_ids | head -n 12)
  for name in $all; do
    mapfile -t options < <(pytest_options "$results/logs/again_$name.txt")
    mapfile -t more < <(workers 3)
    : > "$results/logs/again_$name.txt"
    (
      [[ ! $name =~ overlap|both ]] || export MEDUSA_CUDA_OVERLAP=0
      [[ ! $name =~ graphs|both ]] || export MEDUSA_CUDA_GRAPHS=0
      on_tests timeout --kill-after=5 80 "$python" -m pytest "${options[@]}" "${more[@]}" "${ids[@]}"
      echo $? > "$build/again_$name.status"
    ) > "$results/logs/again_$name.log" 2>&1 &
  done
  wait
  printf '| test | again | MEDUSA_CUDA_OVERLAP=0 | MEDUSA_CUDA_GRAPHS=0 | both |\n|---|---|---|---|---|\n'
  for id in "${ids[@]}"; do
    row="| $id |"
    for name in $all; do
      if grep -Fxq "FAILED $id" "$results/logs/again_$name.txt"; then
        row+=' FAILED |'
      elif [[ $(cat "$build/again_$name.status") =~ ^[01]$ ]]; then
        row+=' passed |'
      else
        row+=' ? |'
      fi
    done
    echo "$row"
  done
  echo "- what passes now and then, or with a switch off, is a race; what always fails is arithmetic"
}
failed_ids() {
  sed -n 's/^FAILED \(tests\/test_\(exact\|device\).*\)$/\1/p' "$results/logs/failures.txt" \
    2> /dev/null | awk '!seen[$0]++'
}

# sanitize TOOL OPTION...: over every op of the benchmarks, whole steps, and, with memcheck, tests
# of ops, as far as time allows.
sanitize() {
  [[ -z $emulated ]] || skip "no GPU"
  command -v compute-sanitizer > /dev/null || skip "no compute-sanitizer"
  need "$build/lib$plugin.so"
  local check=(compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 30
               --target-processes all "${@:2}")
  local status=0 name log=$build/sanitize_$1.log
  local found='^========= (Invalid|Error|Warning: Race|Program hit|Uninit|Leaked|Out)'
  one() {
    local begin=$SECONDS result
    "${@:2}" > "$log" 2>&1
    result=$?
    cat "$log"
    ! grep -qi 'device not supported' "$log" || skip "compute-sanitizer: Device not supported"
    if ((result == 124 || result == 137)) && ! grep -qE "$found" "$log"; then
      echo "- $1: out of time after $((SECONDS - begin)) s, nothing found until then"
    elif ((result != 0)); then
      echo "- $1: FAILED ($result): $(grep -m 1 -E "$found" "$log")"
      status=1
    else
      echo "- $1: nothing found, $((SECONDS - begin)) s"
    fi
  }
  local limit=(timeout --kill-after=5)
  for name in linear tree_attention typical_acceptance compact_kv; do
    one "bench_$name" "${limit[@]}" 50 "${check[@]}" "$build/benchmarks/bench_$name" \
      --device "$device" --shape tiny --quick --samples 1 --dtype bf16,f16,f32
  done
  one bench_decode "${limit[@]}" 60 "${check[@]}" "$build/benchmarks/bench_decode" \
    --device "$device" --shape tiny --quick --rounds 1 --heads 4
  if [[ $1 == memcheck ]] && compgen -G "$build/_core*.so" > /dev/null; then
    local options
    mapfile -t options < <(pytest_options "$results/logs/failures_memcheck.txt")
    for name in compact_kv copy_page rope_write gather_rows top_k; do
      ((SECONDS < 125)) || { echo "- tests from $name on: no time was left"; break; }
      one "test_op_$name" on_tests "${limit[@]}" 30 "${check[@]}" "$python" -m pytest \
        "${options[@]}" "tests/test_op_$name.py"
    done
  fi
  return $status
}
memcheck() { sanitize memcheck --report-api-errors no; }
racecheck() { sanitize racecheck; }

peer_ops() {
  [[ -z $emulated ]] || skip "no GPU"
  have_module torch || skip "no torch"
  "$python" benchmarks/peer_ops.py --shape "${shapes//tiny/llama-1b}" > "$results/peer_ops.json"
}

# Ceilings that torch measured, as options.
ceilings() {
  [[ ! -s $results/peer_ops.json ]] || "$python" - "$results/peer_ops.json" <<'PY'
import json, sys
found = json.load(open(sys.argv[1]))
print("--copy-gbs", found["copy_gbs"], "--matrix-tflops", found["matrix_tflops"])
PY
}

# op_bench NAME FILE OPTION...: the table goes to the log, the figures to a file, whatever failed.
op_bench() {
  local options status=0 file=$results/$2.json
  read -ra options <<< "$(ceilings)"
  bench "bench_$1" --json $quick "${options[@]}" "${@:3}" > "$file" || status=$?
  [[ -s $file ]] || rm -f "$file"
  return $status
}

linear() {
  local options=(--shape "$shapes")
  [[ -n $quick || $shapes == tiny ]] || options+=(--rows 1,16,64,512)
  [[ ! -s $results/peer_ops.json ]] || options+=(--baseline "$results/peer_ops.json")
  op_bench linear linear "${options[@]}"
}
tree_attention() {
  local options=(--shape "$shapes")
  [[ -n $quick || $shapes == tiny ]] || options+=(--contexts 1024,8192,16384 --nodes 1,64)
  op_bench tree_attention tree_attention "${options[@]}"
}
typical_acceptance() {
  local options=()
  [[ $shapes != tiny ]] || options+=(--shape tiny)
  op_bench typical_acceptance typical_acceptance "${options[@]}"
}
compact_kv() { op_bench compact_kv compact_kv --shape "$shapes"; }

# decode NAME SHAPE OPTION...: where trees change the text, the times come with that verdict.
decode() { op_bench decode "decode_$1" --shape "$2" --heads 4 --even-if-wrong "${@:3}"; }
decode_tiny() { decode tiny tiny; }
decode_1b() { decode 1b llama-1b; }
decode_7b() { decode 7b llama-2-7b; }
decode_8b() { decode 8b llama-3-8b; }
decode_short() {
  decode short "${shapes%%,*}" --contexts 1024 --batches 1 --nodes 0,16,64 --samples 50
}
decode_long() {
  decode long "${shapes%%,*}" --contexts 16384 --batches 8 --nodes 0,64 --samples 30 \
    --max-tokens 131072
}

# Times of the kernels alone, which the host's own time hides in the tables above: those that the
# targets in benchmarks/README.md speak of first.
kernel_times() {
  [[ -z $emulated ]] || skip "no GPU"
  command -v ncu > /dev/null || skip "no ncu"
  local status=0 number=0 copy shape name
  copy=$(bench bench_compact_kv --shape tiny --samples 1 --json 2> "$build/copy.log" \
    | "$python" -c 'import json, sys; print(json.load(sys.stdin)["copy_gbs"])')
  echo "| op | shape | calls | us a call | p25-p75 | % copy peak | kernels, us |"
  echo "|---|---|---|---|---|---|---|"
  # one KERNELS PROGRAM OPTION...
  one() {
    local base=$results/logs/kernel_$((++number)) result
    timeout --kill-after=5 40 ncu --clock-control none --cache-control none --csv \
      --metrics gpu__time_duration.sum --kernel-name "regex:$1" --launch-count 300 \
      --log-file "$base.csv" "$build/benchmarks/$2" --device "$device" --samples 4 --json "${@:3}" \
      > "$base.json" 2> "$base.log"
    result=$?
    ! grep -q 'Failed to initialize the profiler' "$base.csv" "$base.log" \
      || skip "ncu: Failed to initialize the profiler"
    "$python" scripts/kernel_times.py "$base.csv" "$base.json" --copy-gbs "${copy:-0}" \
      || { status=1; echo "- $2 ${*:3}: status $result"; tail -n 8 "$base.csv" "$base.log"; }
  }
  need "$build/benchmarks/bench_typical_acceptance"
  for name in greedy temperature top-k top-p typical; do
    one 'choose|filter|typical|walk' bench_typical_acceptance --vocab 128256 --mode "$name"
  done
  for shape in ${shapes//,/ }; do
    [[ $shape != *-1b ]] || continue
    one compact bench_compact_kv --shape "$shape" --batches 1
    for name in 1 64; do
      one 'tree_attention|merge_parts' bench_tree_attention --shape "$shape" --contexts 8192 \
        --batches 1 --nodes "$name"
    done
  done
  for name in qkv o gate_up down lm_head; do
    one linear bench_linear --shape "${shapes%%,*}" --product "$name" --rows 1
    one linear bench_linear --shape "${shapes%%,*}" --product "$name" --rows 64
  done
  return $status
}

# peer SHAPE NAME MODES
peer() {
  [[ -z $emulated ]] || skip "no GPU"
  have_module transformers && have_module torch || skip "no torch or no transformers"
  "$python" benchmarks/peer_transformers.py --shape "$1" --contexts 1024 --modes "$3" \
    > "$results/peer_$2.json"
}
peer_tiny() { peer tiny tiny eager,graph; }
peer_1b() { peer llama-1b 1b eager,graph; }
peer_7b() { peer llama-2-7b 7b eager,graph; }
peer_8b() { peer llama-3-8b 8b eager,graph; }

# What a compiler of somebody else cannot do, or not in time, is no failure of ours.
peer_compile() {
  timeout 90 bash -uo pipefail -c "peer ${shapes%%,*} compile compile"
  case $? in
    0) ;;
    77) exit 77 ;;
    *) echo "- torch.compile did not work here, or not in 90 s" ;;
  esac
}

export -f skip need bench have_module gpu environment build_all ptx_wrappers on_tests pytest_options \
  workers need_tests tests diagnose failed_ids sanitize memcheck racecheck peer_ops ceilings \
  op_bench linear tree_attention typical_acceptance compact_kv decode decode_tiny decode_1b \
  decode_7b decode_8b decode_short decode_long kernel_times peer peer_tiny peer_1b peer_7b peer_8b \
  peer_compile

# --- running them

names=()

# stage NAME LIMIT: the function NAME for at most LIMIT seconds; its state goes to a file. What it
# runs may still write down what it has: it is asked to end before it is killed.
stage() {
  local name=$1 limit=$2 left=$((seconds - SECONDS)) start=$SECONDS status state
  local log=$results/logs/$1.log
  if ((left < 5)); then
    echo "no time was left" > "$log"
    status=124
  else
    timeout --kill-after=12 "$((limit < left ? limit : left))" \
      bash -uo pipefail -c "trap 'exit 124' TERM; $name" > "$log" 2>&1 < /dev/null
    status=$?
  fi
  case $status in
    0) state=passed ;;
    77) state="skipped: $(tail -n 1 "$log")" ;;
    124 | 137) state="out of time" ;;
    *) state="FAILED ($status)" ;;
  esac
  printf '%s|%d\n' "$state" $((SECONDS - start)) > "$results/logs/$name.state"
  printf '%-20s %4d s  %s\n' "$name" $((SECONDS - start)) "$state"
}

# run NAME LIMIT; what is known is written down after every stage, should nobody come back.
run() {
  names+=("$1")
  stage "$@"
  deliver
}
state_of() { cut -d '|' -f 1 "$results/logs/$1.state" 2> /dev/null || echo "not run"; }
failed() { [[ $(state_of "$1") != passed && $(state_of "$1") != skipped* ]]; }

summary() {
  local name logs=$results/logs
  printf '# gpu_check\n\n- commit %s, %s, %d s in all\n- command: `%s`\n' "$commit" \
    "$(date -u +%Y-%m-%d)" "$SECONDS" "$command"
  [[ -n $emulated ]] || printf -- '- %s\n' "$(gpu name,driver_version,memory.total 2>&1)"
  printf -- '- %s\n' "$(grep -h '^missing:' "$logs/environment.log" || echo 'nothing is missing')"
  printf '\n| stage | seconds | result |\n|---|---|---|\n'
  for name in "${names[@]}"; do
    printf '| %s | %s | %s |\n' "$name" "$(cut -d '|' -f 2 "$logs/$name.state" 2> /dev/null)" \
      "$(state_of "$name")"
  done
  for name in "${names[@]}"; do
    failed "$name" || continue
    printf '\n## %s: %s\n\n```\n' "$name" "$(state_of "$name")"
    case $name in
      build_all)
        grep -E '^FAILED|[^_]error|CMake Error' "$logs/$name.log" | head -n 40 | cut -c 1-300 ;;
      tests) grep -E '^(FAILED|E  )' "$logs/failures.txt" 2> /dev/null | head -n 80 | cut -c 1-300 ;;
    esac
    printf '(the end of its log)\n'
    tail -n 25 "$logs/$name.log" 2> /dev/null | cut -c 1-300
    printf '```\n'
  done
  for name in "${names[@]}"; do
    case $name in
      linear | tree_attention | typical_acceptance | compact_kv | decode_* | peer_[1ct78]* \
        | kernel_times | diagnose | memcheck | racecheck)
        [[ $(state_of "$name") == skipped* ]] && continue
        printf '\n## %s\n\n' "$name"
        grep -h -E '^(\||- |#|Prefill|$)|did not work' "$logs/$name.log" 2> /dev/null \
          | sed 's/^# /### /' | cat -s ;;
    esac
  done
}

# Writes summary.md and, packed, everything.
deliver() {
  local log
  summary > "$results/summary.md"
  [[ -n $pack ]] || return 0
  cp "$results/summary.md" "$out/summary.md"
  while IFS= read -r log; do  # nobody reads the middle of such a log
    { head -c 1000000 "$log"; printf '\n...\n'; tail -c 1000000 "$log"; } > "$build/cut"
    mv "$build/cut" "$log"
  done < <(find "$results/logs" -size +4M)
  tar -C "$results" --exclude '*.state' -czf "$build/all.tgz" . && cp "$build/all.tgz" "$out/all.tgz"
}

finish() {
  local status=0 name
  trap - EXIT
  for name in "${names[@]}"; do ! failed "$name" || status=1; done
  [[ -z ${interrupted:-} ]] || status=1
  deliver
  rm -f "$results"/logs/*.state
  [[ -z ${remove_build:-} ]] || rm -rf "$build"
  printf '\n%s: %s\n' "$out/summary.md" "$([[ $status == 0 ]] && echo passed || echo FAILED)"
  exit $status
}
trap finish EXIT
trap 'interrupted=yes; exit 1' INT TERM

run environment 30
run build_all 260
make_site
together=" tests memcheck racecheck "
for name in ${stages//,/ }; do
  if [[ $together != *" $name "* ]]; then
    run "$name" "${limit_of[$name]}"
    continue
  fi
  # None of these is timed, so they share the machine, at the place of the first.
  [[ -z ${shared_run:-} ]] || continue
  shared_run=yes
  for one in ${stages//,/ }; do
    [[ $together == *" $one "* ]] || continue
    names+=("$one")
    stage "$one" "${limit_of[$one]}" &
  done
  wait
  deliver
  [[ -z $(failed_ids) ]] || run diagnose 100
done
