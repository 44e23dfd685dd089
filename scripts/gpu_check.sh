#!/usr/bin/env bash
# Proof and figures of the CUDA backend on a machine with a GPU: builds, tests, checks with
# compute-sanitizer, benchmarks. Every stage runs by itself under its own time limit, so that one
# failure hides nothing. Needs a GPU, nvcc, CMake and a Python with pybind11 3, NumPy, pytest and
# hypothesis; torch and transformers for the comparison. No network. See benchmarks/README.md.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/gpu_check.sh OUT [options]
  OUT               folder for summary.md, logs/ and *.json; made if it is absent
  --models LIST     of tiny, 1b, 7b, 8b; default 7b,8b,1b
  --quick           fewer shapes and samples
  --device NAME     cuda (default), cuda:N, or cuda-emulated to try this script without a GPU
  --python FILE     interpreter; default python3
  --build FOLDER    keep the build here; default a temporary folder
  --commit NAME     what the results are called by, where git cannot tell
  --seconds N       limit of everything together; default 530
TEXT
}

out='' models=7b,8b,1b quick='' device=cuda python=python3 build='' commit='' seconds=530
while (($# > 0)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --quick) quick=--quick ;;
    --models | --device | --python | --build | --commit | --seconds)
      (($# > 1)) || { echo "gpu_check: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift ;;
    -*) echo "gpu_check: unknown option $1" >&2; usage >&2; exit 2 ;;
    *)
      [[ -z $out ]] || { echo "gpu_check: more than one folder: $out, $1" >&2; exit 2; }
      out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || { usage >&2; exit 2; }
[[ $device =~ ^(cuda|cuda:[0-9]+|cuda-emulated)$ ]] \
  || { echo "gpu_check: --device is $device" >&2; exit 2; }
[[ $seconds =~ ^[0-9]+$ ]] || { echo "gpu_check: --seconds is $seconds" >&2; exit 2; }
declare -A shape_of=([tiny]=tiny [1b]=llama-1b [7b]=llama-2-7b [8b]=llama-3-8b)
shapes=''
for model in ${models//,/ }; do
  [[ -n ${shape_of[$model]:-} ]] || { echo "gpu_check: unknown model $model" >&2; exit 2; }
  shapes+=${shapes:+,}${shape_of[$model]}
done

mkdir -p "$out/logs" || exit 2
out=$(cd "$out" && pwd)
rm -f "$out"/logs/*.{log,state} "$out"/{linear,tree_attention,typical_acceptance,compact_kv}.json \
  "$out"/{decode,peer}_*.json
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
python=$(command -v "$python") || { echo "gpu_check: no $python" >&2; exit 2; }
PATH=$(dirname "$python"):$PATH
if [[ -z $build ]]; then
  build=$(mktemp -d)
  remove_build=yes
fi
mkdir -p "$build" || exit 2
build=$(cd "$build" && pwd)
site=$build/site
emulated=''
[[ $device != cuda-emulated ]] || emulated=yes
export out shapes quick device python build commit root site emulated
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HYPOTHESIS_STORAGE_DIRECTORY=$build/hypothesis
export HF_HUB_OFFLINE=1

# --- stages: functions that run in a shell of their own; 77 means skipped, the last line says why.

skip() { echo "$1"; exit 77; }
bench() { "$build/benchmarks/$1" --device "$device" "${@:2}"; }
have_module() { "$python" -c "import $1" 2> /dev/null; }
# The GPU in question is torch's first.
on_device() {
  if [[ $device == cuda:* ]]; then CUDA_VISIBLE_DEVICES=${device#cuda:} "$@"; else "$@"; fi
}

environment() {
  local missing=''
  uname -srm
  nproc
  [[ -n $emulated ]] || nvidia-smi || missing+=' nvidia-smi'
  nvcc --version || missing+=' nvcc'
  cmake --version || missing+=' cmake'
  c++ --version || missing+=' c++'
  "$python" --version
  local name
  for name in pybind11 numpy pytest hypothesis xdist scipy torch transformers; do
    "$python" -c "import $name; print('$name', getattr($name, '__version__', ''))" 2> /dev/null \
      || missing+=" $name"
  done
  for name in ninja compute-sanitizer ncu; do
    command -v "$name" || missing+=" $name"
  done
  [[ -z $missing ]] || echo "missing:$missing"
  command -v cmake > /dev/null && command -v c++ > /dev/null \
    && { [[ -n $emulated ]] || command -v nvcc > /dev/null; }
}

build_all() {
  local flags=(-DCMAKE_BUILD_TYPE=Release -DMEDUSA_BUILD_BENCHMARKS=ON)
  command -v ninja > /dev/null && flags+=(-G Ninja)
  [[ -z $commit ]] || flags+=("-DMEDUSA_COMMIT=$commit")
  if [[ -n $emulated ]]; then
    flags+=(-DMEDUSA_CUDA=OFF -DMEDUSA_CUDA_EMULATED=ON)
  else
    flags+=(-DMEDUSA_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native -DMEDUSA_BUILD_TESTS=ON)
  fi
  if "$python" -c 'import pybind11; assert pybind11.version_info[0] >= 3' 2> /dev/null; then
    flags+=(-DMEDUSA_BUILD_PYTHON=ON -DPYBIND11_FINDPYTHON=ON "-DPython_EXECUTABLE=$python"
            "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)")
  else
    echo "no pybind11 3: the Python module is not built"
  fi
  cmake -S "$root" -B "$build" "${flags[@]}" && cmake --build "$build" --parallel "$(nproc)" || return
  # The package as Python finds it: its sources beside the module, which finds the library by its
  # real path.
  rm -rf "$site"
  mkdir -p "$site"
  cp -r "$root/python/medusa_ext" "$site/"
  local module
  for module in "$build"/_core*.so; do
    [[ ! -e $module ]] || ln -sf "$module" "$site/medusa_ext/"
  done
}

# Whether the device can be used at all; without it tests would only be skipped.
use_device() { bench bench_compact_kv --shape tiny --samples 1; }

ptx_wrappers() {
  [[ -z $emulated ]] || skip "nothing to compare without a GPU"
  local program
  program=$(find "$build" -name ptx_wrappers -type f -perm -u+x | head -n 1)
  [[ -n $program ]] || skip "this tree has no program ptx_wrappers"
  "$program"
}

run_tests() {
  PYTHONPATH=$site "$python" -m pytest -q -p no:cacheprovider --device "${device%%:*}" "$@"
}

tests() {
  compgen -G "$build/_core*.so" > /dev/null || { echo "the Python module was not built"; return 1; }
  local module
  for module in numpy pytest hypothesis; do
    have_module "$module" || { echo "no $module"; return 1; }
  done
  local files=(tests/test_op_*.py tests/test_sampling.py tests/test_typical_acceptance.py
               tests/test_exact_*.py)
  [[ -z $quick ]] || files=(tests/test_op_*.py)
  [[ -z $emulated ]] || files=(tests/test_op_gather_rows.py)
  have_module xdist && files+=(-n "$(($(nproc) > 12 ? 12 : $(nproc)))")
  run_tests "${files[@]}"
}

# sanitize TOOL: over every op of the benchmarks, and over the tests of ops as far as time allows.
sanitize() {
  [[ -z $emulated ]] || skip "no GPU"
  command -v compute-sanitizer > /dev/null || skip "no compute-sanitizer"
  local check=(compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all) name
  for name in linear tree_attention typical_acceptance compact_kv; do
    "${check[@]}" "$build/benchmarks/bench_$name" --device "$device" --shape tiny --quick \
      --samples 1 --dtype bf16,f16,f32 || return
  done
  "${check[@]}" "$build/benchmarks/bench_decode" --device "$device" --shape tiny --quick \
    --rounds 1 --heads 4 || return
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

peer_ops() {
  [[ -z $emulated ]] || skip "no GPU"
  have_module torch || skip "no torch"
  local names=${shapes//tiny/llama-1b}
  on_device "$python" benchmarks/peer_ops.py --shape "$names" \
    > "$out/peer_ops.json"
}

# Ceilings that torch measured, as options.
ceilings() {
  [[ ! -s $out/peer_ops.json ]] || "$python" - "$out/peer_ops.json" <<'PY'
import json, sys
found = json.load(open(sys.argv[1]))
print("--copy-gbs", found["copy_gbs"], "--matrix-tflops", found["matrix_tflops"])
PY
}

# op_bench NAME OPTION...: the table goes to the log, the figures to a file.
op_bench() {
  local options
  read -ra options <<< "$(ceilings)"
  bench "bench_$1" --json $quick "${options[@]}" "${@:2}" > "$out/$1.json"
}

linear() {
  local options=(--shape "$shapes")
  [[ -n $quick || $shapes == tiny ]] || options+=(--rows 1,16,64,512)
  [[ ! -s $out/peer_ops.json ]] || options+=(--baseline "$out/peer_ops.json")
  op_bench linear "${options[@]}"
}
tree_attention() {
  local options=(--shape "$shapes")
  [[ -n $quick || $shapes == tiny ]] || options+=(--contexts 1024,8192,16384 --nodes 1,64)
  op_bench tree_attention "${options[@]}"
}
typical_acceptance() {
  local options=()
  [[ $shapes != tiny ]] || options+=(--shape tiny)
  op_bench typical_acceptance "${options[@]}"
}
compact_kv() { op_bench compact_kv --shape "$shapes"; }

decode() {
  local status=0
  op_bench decode --shape "$1" --heads 4 --max-tokens 16384 || status=$?
  mv "$out/decode.json" "$out/decode_$1.json"
  return $status
}
decode_tiny() { decode tiny; }
decode_1b() { decode llama-1b; }
decode_7b() { decode llama-2-7b; }
decode_8b() { decode llama-3-8b; }

# Time of each kernel alone, which the host's own time hides in the tables above.
kernel_times() {
  [[ -z $emulated ]] || skip "no GPU"
  command -v ncu > /dev/null || skip "no ncu"
  local vocab=128256 program words
  [[ $shapes != tiny ]] || vocab=1000
  for program in "typical_acceptance --vocab $vocab" "compact_kv --shape ${shapes%%,*}"; do
    read -ra words <<< "$program"
    ncu --clock-control none --metrics gpu__time_duration.sum --csv --launch-count 600 \
      "$build/benchmarks/bench_${words[0]}" --device "$device" --samples 2 "${words[@]:1}" \
      > "$build/ncu.csv" || { tail -n 20 "$build/ncu.csv"; return 1; }
    "$python" scripts/kernel_times.py "$build/ncu.csv"
  done
}

peer() {
  [[ -z $emulated ]] || skip "no GPU"
  have_module transformers && have_module torch || skip "no torch or no transformers"
  on_device "$python" benchmarks/peer_transformers.py \
    --shape "$1" --contexts 1024 --modes "$2" > "$out/peer_$1_$2.json"
}
peer_tiny() { peer tiny eager,graph; }
peer_1b() { peer llama-1b eager,graph; }
peer_7b() { peer llama-2-7b eager,graph; }
peer_8b() { peer llama-3-8b eager,graph; }

# What a compiler of somebody else cannot do, or not in time, is no failure of ours.
peer_compile() {
  timeout 90 bash -uo pipefail -c "peer ${shapes%%,*} compile"
  case $? in
    0) ;;
    77) exit 77 ;;
    *) echo "- torch.compile did not work here, or not in 90 s" ;;
  esac
}

export -f skip bench have_module on_device environment build_all use_device ptx_wrappers \
  run_tests tests sanitize memcheck racecheck peer_ops ceilings op_bench linear tree_attention \
  typical_acceptance compact_kv decode decode_tiny decode_1b decode_7b decode_8b kernel_times peer \
  peer_tiny peer_1b peer_7b peer_8b peer_compile

# --- running them

names=()

# stage NAME LIMIT: the function NAME for at most LIMIT seconds; its state goes to a file.
stage() {
  local name=$1 limit=$2 left=$((seconds - SECONDS)) start=$SECONDS status log=$out/logs/$1.log
  if ((left < 5)); then
    echo "no time was left" > "$log"
    status=124
  else
    timeout --kill-after=5 "$((limit < left ? limit : left))" \
      bash -uo pipefail -c "$name" > "$log" 2>&1
    status=$?
  fi
  local state
  case $status in
    0) state=passed ;;
    77) state="skipped: $(tail -n 1 "$log")" ;;
    124 | 137) state="out of time" ;;
    *) state="FAILED ($status)" ;;
  esac
  printf '%s|%d\n' "$state" $((SECONDS - start)) > "$out/logs/$name.state"
  printf '%-20s %4d s  %s\n' "$name" $((SECONDS - start)) "$state"
}

run() { names+=("$1"); stage "$@"; }
state_of() { cut -d '|' -f 1 "$out/logs/$1.state" 2> /dev/null || echo "not run"; }

summary() {
  local name state all=0
  {
    printf '# gpu_check\n\n- command: `scripts/gpu_check.sh %s`\n- %s, %d s in all\n' \
      "$arguments" "$(date -u +%Y-%m-%d)" "$SECONDS"
    printf -- '- %s\n' "$(grep -h '^missing:' "$out/logs/environment.log" || echo 'nothing is missing')"
    printf '\n| stage | seconds | result |\n|---|---|---|\n'
    for name in "${names[@]}"; do
      state=$(state_of "$name")
      [[ $state == passed || $state == skipped* ]] || all=1
      printf '| %s | %s | %s |\n' "$name" "$(cut -d '|' -f 2 "$out/logs/$name.state" 2> /dev/null)" \
        "$state"
    done
    for name in "${names[@]}"; do
      state=$(state_of "$name")
      [[ $state == passed || $state == skipped* ]] && continue
      printf '\n## %s: %s\n\nThe end of its log:\n\n```\n' "$name" "$state"
      tail -n 25 "$out/logs/$name.log" 2> /dev/null | cut -c 1-300
      printf '```\n'
    done
    for name in "${names[@]}"; do
      case $name in
        linear | tree_attention | typical_acceptance | compact_kv | decode_* | peer_[1ct78]* | kernel_times)
          [[ $(state_of "$name") == skipped* ]] && continue
          printf '\n## %s\n\n' "$name"
          grep -h -E '^(\||- |#|Prefill|$)|did not work' "$out/logs/$name.log" | sed 's/^# /### /' ;;
      esac
    done
  } > "$out/summary.md"
  return $all
}

arguments="$out --device $device --models $models${quick:+ $quick}"
finish() {
  local status=0
  [[ -z ${interrupted:-} ]] || status=1
  summary || status=1
  rm -f "$out"/logs/*.state
  [[ -z ${remove_build:-} ]] || rm -rf "$build"
  printf '\n%s: %s\n' "$out/summary.md" "$([[ $status == 0 ]] && echo passed || echo FAILED)"
  exit $status
}
trap finish EXIT
trap 'interrupted=yes; exit 1' INT TERM

run environment 30
run build_all 240
[[ $(state_of build_all) != passed ]] || run use_device 60
if [[ $(state_of use_device) == passed ]]; then
  # None of these is timed, so they share the machine.
  names+=(ptx_wrappers tests memcheck racecheck)
  for pair in "ptx_wrappers 60" "tests 150" "memcheck 140" "racecheck 140"; do
    read -r name limit <<< "$pair"
    stage "$name" "$limit" &
  done
  wait
  run peer_ops 60
  run linear 60
  run tree_attention 60
  run typical_acceptance 30
  run compact_kv 30
  for model in ${models//,/ }; do run "decode_$model" 75; done
  for model in ${models//,/ }; do run "peer_$model" 60; done
  run kernel_times 60
  [[ -n $quick ]] || ((seconds - SECONDS < 100)) || run peer_compile 100
else
  names+=("everything else")
fi
