# What run and full share; sourced.

report=()

# stage NAME COMMAND...: run it, print its time, stop everything where it fails.
stage() {
  local name=$1 start=$SECONDS
  shift
  printf '\n=== %s\n' "$name"
  "$@"
  report+=("$(printf '%-34s %4d s' "$name" $((SECONDS - start)))")
  printf -- '--- %s: ok, %d s\n' "$name" $((SECONDS - start))
}

summary() {
  printf '\n=== summary: all passed\n'
  printf '%s\n' "${report[@]}"
  printf '%-34s %4d s\n' total "$SECONDS"
}

# build_emulated SANITIZER FOLDER: the CUDA backend compiled for this machine over the emulator in tests/emulator, and
# the Python module, by the current interpreter. A folder that was configured before keeps its interpreter.
build_emulated() {
  local build=$2
  # The headers of CUDA are those of a toolkit, else these packages'.
  [[ -e /usr/local/cuda/include/cuda_runtime_api.h ]] \
    || pip install --quiet nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl
  mkdir -p "$build"
  [[ -e $build/build.ninja ]] \
    || cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMEDUSA_CUDA=OFF \
      -DMEDUSA_CUDA_EMULATED=ON -DMEDUSA_BUILD_TESTS=ON -DMEDUSA_BUILD_PYTHON=ON -DMEDUSA_SANITIZE="$1" \
      -DPYBIND11_FINDPYTHON=ON -DPython_EXECUTABLE="$(command -v python)" \
      -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/python/medusa_ext" \
      > "$build.log" || { cat "$build.log"; return 1; }
  cmake --build "$build"
}

# emulated SANITIZER FOLDER ARGUMENTS...: build_emulated, the emulator's own test, and pytest with these arguments on
# that device.
emulated() {
  local sanitizer=$1 build=$2 package=$2/python/medusa_ext
  shift 2
  build_emulated "$sanitizer" "$build"
  ctest --test-dir "$build" --output-on-failure -R '^emulator_'
  cp -r python/medusa_ext/. "$package"

  # The interpreter is not instrumented, so its sanitizer comes first, and what throws before it is used.
  local preload= stdcpp=$(g++ -print-file-name=libstdc++.so)
  case $sanitizer in
    address) preload="$(g++ -print-file-name=libasan.so) $stdcpp" ;;
    thread) preload="$(g++ -print-file-name=libtsan.so) $stdcpp" ;;
    undefined) preload="$(g++ -print-file-name=libubsan.so) $stdcpp" ;;
  esac
  env PYTHONPATH="$build/python" LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 \
    TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
    python -m pytest -q -p no:cacheprovider --device cuda-emulated "$@"
}

# cuda FOLDER ARCHITECTURES: the CUDA backend as nvcc makes it, warnings are errors, and what ptxas says of each kernel.
cuda() {
  if ! command -v nvcc > /dev/null && [[ ! -x /usr/local/cuda/bin/nvcc ]]; then
    echo "skipped: this machine has no nvcc"
    return
  fi
  cmake -S . -B "$1" -G Ninja -DMEDUSA_CUDA=ON -DMEDUSA_WERROR=ON -DCMAKE_CUDA_ARCHITECTURES="$2" \
    -DCMAKE_CUDA_FLAGS=-Xptxas=-v > "$1.log" || { cat "$1.log"; return 1; }
  cmake --build "$1" --target medusa_cuda > "$1.build.log" || { tail -n 100 "$1.build.log"; return 1; }
  python3 scripts/check_kernels.py "$1.build.log"
}

# cpp_tests SANITIZER FOLDER: the C++ tests under a sanitizer.
cpp_tests() {
  cmake -S . -B "$2" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMEDUSA_CUDA=OFF -DMEDUSA_BUILD_TESTS=ON \
    -DMEDUSA_SANITIZE="$1" > "$2.log" || { cat "$2.log"; return 1; }
  cmake --build "$2"
  ctest --test-dir "$2" --output-on-failure
}
