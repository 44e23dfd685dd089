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

# cpp_tests SANITIZER FOLDER: the C++ tests under a sanitizer.
cpp_tests() {
  cmake -S . -B "$2" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMEDUSA_BUILD_TESTS=ON \
    -DMEDUSA_SANITIZE="$1" > "$2.log" || { cat "$2.log"; return 1; }
  cmake --build "$2"
  ctest --test-dir "$2" --output-on-failure
}
