"""Break the CUDA kernels on purpose and see that the tests of the emulated device notice.

Each mutation is a fault that someone could make. It is written into a copy of the sources, the
emulated backend is built from it, and some of the tests must fail, crash or hang. Exit 1 if a
mutation survives: then the tests are too weak, or the code does not matter.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["CMakeLists.txt", "pyproject.toml", "cmake", "csrc", "tests/emulator"]
TARGET = "medusa_cuda_emulated"
PYTEST = ["-m", "pytest", "-xq", "-p", "no:cacheprovider", "--device", "cuda-emulated"]
TIMEOUT = 300  # seconds after which tests are taken to hang

# Name, file in csrc/backend/cuda, what is wrong; "-" what is replaced, once in the file; "+" by
# what; ">" the tests that must notice, as file: pytest's -k.
TABLE = """
# linear-wait linear.cu: a stage is multiplied before its copies have come
- cp_async_wait<kAhead - 1>();
+ cp_async_wait<kAhead>();
> op_linear: many_rows and bf16
# linear-rows linear.cu: the order over K follows from the number of rows
- product.num_splits = num_splits(N, K);
+ product.num_splits = R > 8 ? 1 : num_splits(N, K);
> op_linear: other_rows and 1-576-bf16
# linear-gather linear.cu: the block that comes last adds the splits in an order of its own
- add_stored_sums<Tile>(parts, product.num_splits, total);
+ for (int i = product.num_splits - 2; i >= 0; i -= 2)
+   add_stored_sums<Tile>(parts + i * kUnitQuads, 2, total);
> op_linear: other_rows and 20-1100-bf16
# linear-ticket linear.cu: a second product finds the tickets of the first
- if (thread_index() == 0) product.tickets[tile] = 0;
+
> op_linear: other_rows and 20-1100-bf16
# linear-edge linear_tile.h: one output too many is stored
- if (row < product.num_rows && output < N) function
+ if (row < product.num_rows && output <= N) function
> op_linear: many_rows and bf16
# linear-fragment linear_tile.h: two matrices of the rows change places
- mma_16816<T>(sums[m][c + 1], a[m], b[2], b[3]);
+ mma_16816<T>(sums[m][c + 1], a[m], b[3], b[2]);
> op_linear: many_rows and bf16
# weight-piece weight.cu: the second piece of a weight is taken to begin with a row
- done % num_inputs, num_inputs,
+ 0, num_inputs,
> op_embed: pieces
# norm-rest row_ops.cu: columns beyond those in registers overlap them
- const int64_t rest = first + kKeptQuads * stride;
+ const int64_t rest = first + (kKeptQuads - 1) * stride;
> op_rms_norm: test_rms_norm and 9001-f32
# rope-part rope.cu: columns that do not turn are turned
- if (turns && column < 2 * half) {
+ if (turns) {
> op_rope_write: test_rope_write and 8-1-80-32-bf16
# compact-order cache.cu: the last rows move first, onto what is still to be read
- for (int first = 0; first < n; first += kGroup) {
+ for (int first = (n - 1) / kGroup * kGroup; first >= 0; first -= kGroup) {
> op_compact_kv: every_border and bf16
# plan-tail tree_attention_plan.h: where a tail begins follows from the root, not from the row
- int page = position / kPageTokens - 1;
+ int page = prefix_len / kPageTokens - 1;
> op_tree_attention: on_chunks and emulated-0-bf16
# prefix-barrier tree_attention_kernel.h: values are read before the copies of others have come
-       cp_async_wait<Layout::kValueSlots == 2 ? 2 : 0>();
-       __syncthreads();
+       cp_async_wait<Layout::kValueSlots == 2 ? 2 : 0>();
> op_tree_attention: long_context and bf16-0
# prefix-window tree_attention_kernel.h: the window hides one key too many
- 2 * (lane() % 4) + e % 2 < row_first[h]) {
+ 2 * (lane() % 4) + e % 2 <= row_first[h]) {
> op_tree_attention: test_window and 100-bf16
# prefix-foreign tree_attention_kernel.h: a row takes a block that belongs to its tail
- const bool on[2] = {page < row_end[0] && slot
+ const bool on[2] = {slot
> op_tree_attention: on_chunks and emulated-0-bf16
# prefix-splits tree_attention_kernel.h: many rows are not cut into splits, as few rows are
- if (kWalk && starts_split(page + 1) && page + 1 < end_page) {
+ if (kWalk && page + 1 > end_page) {
> op_tree_attention: size_of_the_step and bf16
# tail-fragment tree_attention_tail.h: row and key of a score change places
- = s[n][2 * h + e] * args.scale_log2;
+ = s[n][2 * e + h] * args.scale_log2;
> op_tree_attention: test_window and 100-bf16
# ancestor-bit tree_attention_rows.h: ancestors of the next word land one slot too low
- ancestors[word + 1] << (64 - bit);
+ ancestors[word + 1] << (63 - bit);
> op_tree_attention: permuted_siblings and bf16
# ancestor-word tree_attention_f32.cu: the first ancestor of a word is sought in the word before
- if (n >= count) {
+ if (n > count) {
> op_tree_attention: permuted_siblings and f32
# choose-tie choose.cu: of equal scores the highest id is chosen
- if (!(scores[quad][i] > thread_top.value)) continue;
+ if (!(scores[quad][i] >= thread_top.value)) continue;
> sampling: greedy_ties
# choose-penalty choose.cu: the node's own token is not penalised
- if (token / 32 == word) bits |=
+ if (token / 32 == word && v != node) bits |=
> sampling: repetition_penalty_counts
# noise-row choose.cuh: noise follows from the node's number, not from its position
- args.states[line].position + static_cast<uint32_t>(depth_of(args, batch, node))
+ args.states[line].position + static_cast<uint32_t>(node)
> sampling: does_not_depend_on_the_tree
# noise-bound choose.cuh: ids that could still win are skipped
- static_cast<float>(1 + __clz(
+ static_cast<float>(__clz(
> sampling: walk_against
# filter-tie filter.cu: the last id that is kept is left out
- id + static_cast<uint32_t>(i) <= last_id);
+ id + static_cast<uint32_t>(i) < last_id);
> sampling: last_of_thousands
# top-k-bound top_k.cu: what is as good as the bound is left out
- if (own[i] <= bound &&
+ if (own[i] < bound &&
> op_top_k: test_top_k and emulated-33-1
# typical-total typical.cu: probabilities by the total of a chunk
- 1.0 / in_order(args.totals + first_part, num_parts)
+ 1.0 / args.totals[first_part + blockIdx.x]
> typical_acceptance: wide_rows
# walk-end verify.cu: the last of the tokens that end a text does not
- for (int i = 0; i < params.num_eos; ++i) {
+ for (int i = 0; i + 1 < params.num_eos; ++i) {
> sampling: an_end_inside
# step-position step_state.cu: nodes turn by their slot, not by their position
- lives ? len + tree.node_depth[node] : 0;
+ lives ? len + node : 0;
> exact_device: host_steps_emit and f32-heads
# step-hidden step_state.cu: the heads read the root's hidden row
- state.last_row[b] = b * state.tree.num_nodes + result.last_node;
+ state.last_row[b] = b * state.tree.num_nodes;
> exact_device: typical_acceptance and f32
# step-publish step_state.cu: the last token is not published
- } else if (at < result.num_tokens) {
+ } else if (at + 1 < result.num_tokens) {
> exact_device: host_steps_emit and f32-plain
# step-order resident.cpp: rows are moved after the length has advanced
-   compact_kv(view_of(cache), state.moves(batch), stream);
-   advance(state, batch, stream);
+   advance(state, batch, stream);
+   DeviceMoves late = state.moves(batch);
+   late.len = state.len;
+   compact_kv(view_of(cache), late, stream);
> exact_device: host_steps_emit and f32-heads
# step-graph resident.cpp: a graph that was recorded for other options is replayed
- recorded_[{batch, needs}]
+ recorded_[{batch, 0 * needs}]
> exact_device: host_steps_emit and f32-heads
"""

Mutation = namedtuple("Mutation", "name file why old new tests")


def read_table() -> Iterator[Mutation]:
    """The table's mutations."""
    for entry in TABLE.split("\n# ")[1:]:
        about, *lines = entry.splitlines()
        name, file, why = re.split(r":? ", about, maxsplit=2)
        old, new, tests = ("\n".join(x[2:] for x in lines if x[0] == sign) for sign in "-+>")
        yield Mutation(name, file, why, old, new, tests)


def copy_sources(to: Path) -> None:
    """Bring the copy up to date; files that are the same keep their time."""
    for top in (ROOT / name for name in SOURCES):
        for path in filter(Path.is_file, [top, *top.rglob("*")]):
            target = to / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_bytes() != path.read_bytes():
                shutil.copyfile(path, target)


def run(*command: str | Path) -> None:
    """A command that must succeed; its output only where it does not."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{shlex.join(map(str, command))}: exit {done.returncode}")


def first_failure(tests: str) -> str | None:
    """What fails of these tests; None: nothing."""
    file, expression = tests.split(": ")
    command = [sys.executable, *PYTEST, f"tests/test_{file}.py", "-k", expression]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=TIMEOUT, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT} s"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    if done.returncode != (1 if failed else 0):
        sys.exit(f"{done.stdout}{done.stderr}\n{shlex.join(command)}: exit {done.returncode}")
    return failed[1] if failed else None


def main() -> int:
    """Run all mutations, or those that are named."""
    parser = argparse.ArgumentParser(description="Mutations of the CUDA kernels.")
    parser.add_argument("--build", type=Path, required=True, help="folder for the copy and builds")
    parser.add_argument("names", nargs="*", help="only these mutations")
    args = parser.parse_args()
    mutations = [m for m in read_table() if not args.names or m.name in args.names]

    source, build = args.build.resolve() / "source", args.build.resolve() / "build"
    kernels, package = source / "csrc/backend/cuda", build / "python/medusa_ext"
    copy_sources(source)
    for m in mutations:
        if (count := (kernels / m.file).read_text().count(m.old)) != 1:
            sys.exit(f"{m.name}: {m.file} holds what it replaces {count} times")
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True)
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.strip()}"]
    options += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}", "-DPYBIND11_FINDPYTHON=ON"]
    options += ["-DMEDUSA_CUDA=OFF", "-DMEDUSA_CUDA_EMULATED=ON", "-DMEDUSA_BUILD_PYTHON=ON"]
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *options)
    run("cmake", "--build", build, "--target", "_core", TARGET)
    shutil.copytree(ROOT / "python/medusa_ext", package, dirs_exist_ok=True)
    os.environ["PYTHONPATH"] = str(package.parent)
    for tests in dict.fromkeys(m.tests for m in mutations):
        if where := first_failure(tests):
            sys.exit(f"fails without a mutation: {where}")

    survivors = 0
    for m in mutations:
        path, start = kernels / m.file, time.monotonic()
        original = path.read_text()
        try:
            path.write_text(original.replace(m.old, m.new))
            run("cmake", "--build", build, "--target", TARGET)
            where = first_failure(m.tests)
        finally:
            path.write_text(original)
        survivors += where is None
        outcome = f"caught: {where}" if where else f"SURVIVED: {m.why}"
        print(f"{m.name:16} {time.monotonic() - start:4.0f} s  {outcome}", flush=True)
    print(f"{len(mutations)} mutations, {survivors} survived")
    return 0 if mutations and not survivors else 1


if __name__ == "__main__":
    sys.exit(main())
