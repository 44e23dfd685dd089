// The kernels between passes: gather_hidden, fill_tree, build_rows, advance, keep_hidden, publish;
// and the host's writes to a line. See step_state.h.
//
// Shapes    B batch rows of N nodes; candidates [depth * B, width], width <= 256
// Traffic   about 60 B N bytes for the rows, 8 B d for the hidden rows, less for the others: all
//           are bound by their launch
// Launch    build_rows: a thread per row. advance: a thread per batch row. fill_tree: a block per
//           (depth, batch row), a thread per candidate. gather_hidden, keep_hidden: a block per
//           batch row. publish: one block
// Order     len and the root are read by fill_tree and build_rows, which copies len for
//           compact_kv, and written by advance alone, each its own launch on one stream: nobody
//           sees them change
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "backend/cuda/gpu.h"
#include "backend/cuda/step_state.h"
#include "medusa/error.h"
#include "medusa/noise.h"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxRanks = 256;

// In the kernels that may be a step's first.
__device__ __forceinline__ void note_beginning(const StepState& state) {
  if (blockIdx.x == 0 && threadIdx.x == 0 && *state.began == 0) *state.began = nanoseconds();
}

__global__ void __launch_bounds__(kThreads)
    build_rows_kernel(const __grid_constant__ StepState state, int batch) {
  begin_overlapped();
  note_beginning(state);
  const DeviceTree& tree = state.tree;
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int b = static_cast<int>(row / tree.num_nodes);
  const int node = static_cast<int>(row % tree.num_nodes);
  if (b >= batch) return;

  // Depth j accepted means j + 1 tokens emitted; parents come first, so a depth is a prefix.
  const int line = state.lines[b], len = state.len[line], remaining = state.states[line].remaining;
  const int depth = state.active[line] != 0 ? min(remaining - 1, tree.depth) : -1;
  const int live = depth < 0 ? 0 : tree.first_node[depth + 1];
  const bool lives = node < live;
  int32_t* tokens = state.tree_tokens + int64_t{b} * tree.num_nodes;

  int32_t token = 0;
  if (lives) token = node == 0 ? state.root[line] : tokens[node];
  state.row_token[row] = token;
  state.row_sequence[row] = lives ? line : -1;
  state.row_position[row] = lives ? len + tree.node_depth[node] : 0;
  state.row_slot[row] = lives ? len + node : 0;
  state.row_prefix_len[row] = lives ? len : 0;
  state.row_prompt_len[row] = lives ? state.prompt_len[line] : 0;
  const auto* from = reinterpret_cast<const uint64_t*>(tree.ancestors + node);
  auto* to = reinterpret_cast<uint64_t*>(state.row_ancestors + row);
#pragma unroll
  for (int word = 0; word < kAncestorWords; ++word) to[word] = lives ? from[word] : 0;
  if (node == 0) {
    tokens[0] = token;
    state.root_len[b] = len;
    state.trees[b] = {b * tree.num_nodes, live};
    state.results[b] = {WalkStatus::idle, 0, -1, -1, 0};
  }
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ StepState state, int batch) {
  begin_overlapped();
  const int b = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (b >= batch) return;
  const int line = state.lines[b];
  const WalkResult result = state.results[b];
  const int n = result.num_tokens;
  state.last_row[b] = -1;
  if (result.status == WalkStatus::idle) return;
  if (result.status != WalkStatus::goes_on) state.active[line] = 0;
  if (n <= 0) return;
  state.last_row[b] = b * state.tree.num_nodes + result.last_node;
  state.len[line] += n;
  state.root[line] = result.next_root;
  state.states[line].position += static_cast<uint32_t>(n);
  state.states[line].remaining -= n;
}

__device__ __forceinline__ void copy_row(const float* from, float* to, int64_t size) {
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < size; i += kThreads) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads)
    gather_hidden_kernel(const __grid_constant__ StepState state) {
  note_beginning(state);
  const int64_t b = blockIdx.x, d = state.hidden_size;
  copy_row(state.hidden + state.lines[b] * d, state.batch_hidden + b * d, d);
}

__global__ void __launch_bounds__(kThreads)
    keep_hidden_kernel(const __grid_constant__ StepState state, const float* hidden) {
  begin_overlapped();
  const int64_t row = state.last_row[blockIdx.x], d = state.hidden_size;
  if (row >= 0) copy_row(hidden + row * d, state.hidden + state.lines[blockIdx.x] * d, d);
}

__global__ void __launch_bounds__(kMaxRanks)
    fill_tree_kernel(const __grid_constant__ StepState state, int batch, int width,
                     const int32_t* ids, const float* values, const int32_t* __restrict__ token_map,
                     int64_t map_size) {
  begin_overlapped();
  __shared__ float scores[kMaxRanks];
  __shared__ int32_t ranked[kMaxRanks];
  const DeviceTree& tree = state.tree;
  const int depth = static_cast<int>(blockIdx.x) + 1, b = static_cast<int>(blockIdx.y);
  const int rank = static_cast<int>(threadIdx.x), line = state.lines[b];
  const LineParams& params = state.params[line];
  const bool couples = params.temperature > 0.0f && params.typical == 0;
  const bool exists = rank < width;
  int32_t token = 0;
  float score = 0.0f;
  if (exists) {
    const int64_t at = (int64_t{depth - 1} * batch + b) * width + rank;
    token = ids[at];
    if (token_map != nullptr) token = token >= 0 && token < map_size ? token_map[token] : 0;
    if (couples) {
      const auto position = static_cast<uint32_t>(state.len[line] + depth);
      score = values[at] / params.temperature +
              gumbel_from_bits(noise_word(params.seed, params.sample_index, position,
                                          static_cast<uint32_t>(token)));
    }
    scores[rank] = score;
  }
  __syncthreads();

  // A candidate's place is the number of those before it; NaN goes last.
  int place = rank;
  if (exists && couples) {
    place = 0;
    for (int i = 0; i < width; ++i) {
      const float other = scores[i];
      const bool other_last = other != other, last = score != score;
      const bool ties = other == score || (other_last && last);
      place += other > score || (last && !other_last) || (ties && i < rank);
    }
  }
  if (exists) ranked[place] = token;
  __syncthreads();

  const int end = tree.first_node[depth + 1];
  for (int node = tree.first_node[depth] + rank; node < end; node += static_cast<int>(blockDim.x)) {
    state.tree_tokens[int64_t{b} * tree.num_nodes + node] = ranked[min(tree.rank[node], width - 1)];
  }
}

// The rows first, then the number: a host that sees the number sees the rows.
__global__ void __launch_bounds__(kThreads)
    publish_kernel(const __grid_constant__ StepState state, int batch,
                   const __grid_constant__ Ring ring) {
  begin_overlapped();
  const uint64_t step = *state.num_steps;
  const auto index = static_cast<int64_t>(step % static_cast<uint64_t>(ring.num_entries));
  char* entry = ring.device_memory + index * ring.entry_bytes();
  auto* rows = reinterpret_cast<int32_t*>(entry + Ring::kRowsAt);
  const int64_t row_ints = ring.row_ints(), N = ring.num_nodes;
  for (int64_t i = threadIdx.x; i < batch * row_ints; i += kThreads) {
    const int64_t b = i / row_ints, field = i % row_ints - Ring::kResultInts, at = field % N;
    const WalkResult& result = state.results[b];
    if (field < 0) {
      rows[i] = reinterpret_cast<const int32_t*>(&result)[field + Ring::kResultInts];
    } else if (at < result.num_tokens) {
      rows[i] = (field < N ? state.path : state.path_tokens)[b * N + at];
    }
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    *state.num_steps = step + 1;
    *reinterpret_cast<StepTimes*>(entry + sizeof(uint64_t)) = {*state.began, nanoseconds()};
    *state.began = 0;
    __threadfence_system();
    *reinterpret_cast<volatile uint64_t*>(entry) = step + 1;
  }
}

struct LineStart {
  int32_t line, len, root, prompt_len;
  LineState state;
  LineParams params;
  int32_t eos_ids[kMaxResidentEos];
};

__global__ void __launch_bounds__(kMaxResidentEos)
    start_line_kernel(const __grid_constant__ StepState state,
                      const __grid_constant__ LineStart start) {
  const int i = static_cast<int>(threadIdx.x), line = start.line;
  state.eos_ids[line * kMaxResidentEos + i] = start.eos_ids[i];
  if (i > 0) return;
  state.active[line] = 1;
  state.len[line] = start.len;
  state.root[line] = start.root;
  state.prompt_len[line] = start.prompt_len;
  state.states[line] = start.state;
  state.params[line] = start.params;
}

int64_t lay_out(StepState& s, void* memory) {
  Divider layout(memory);
  const int64_t L = s.num_lines, N = s.tree.num_nodes;
  for (int32_t** array :
       {&s.active, &s.len, &s.root, &s.prompt_len, &s.lines, &s.root_len, &s.last_row}) {
    layout.place(*array, L);
  }
  layout.place(s.states, L);
  layout.place(s.params, L);
  layout.place(s.trees, L);
  layout.place(s.results, L);
  layout.place(s.history, L * s.history_words);
  layout.place(s.hidden, L * s.hidden_size);
  layout.place(s.batch_hidden, L * s.hidden_size);
  layout.place(s.eos_ids, L * kMaxResidentEos);
  for (int32_t** array :
       {&s.tree_tokens, &s.path, &s.path_tokens, &s.parents, &s.row_token, &s.row_sequence,
        &s.row_position, &s.row_slot, &s.row_prefix_len, &s.row_prompt_len, &s.row_index}) {
    layout.place(*array, L * N);
  }
  layout.place(s.ancestors, L * N);
  layout.place(s.row_ancestors, L * N);
  layout.place(s.num_steps, 1);
  layout.place(s.began, 1);
  layout.place(s.tree.rank, N);
  layout.place(s.tree.node_depth, N);
  layout.place(s.tree.first_node, s.tree.depth + 2);
  layout.place(s.tree.ancestors, N);
  return layout.num_bytes();
}

// What never changes: the tree, once for each batch row too, and the indices.
void upload_constants(const StepState& state, const TreeSpec& spec, Staging& staging,
                      cudaStream_t stream) {
  const auto nodes = static_cast<size_t>(spec.num_nodes()),
             rows = nodes * static_cast<size_t>(state.num_lines);
  std::vector<AncestorBits> ancestors(rows);
  std::vector<int32_t> parents(rows), index(rows), ranks, depths, first;
  std::iota(index.begin(), index.end(), 0);
  for (int node = 0; node < spec.num_nodes(); ++node) {
    AncestorBits& bits = ancestors[static_cast<size_t>(node)];
    if (node > 0) bits = ancestors[static_cast<size_t>(spec.parent(node))];
    bits[static_cast<size_t>(node / 64)] |= uint64_t{1} << (node % 64);
    parents[static_cast<size_t>(node)] = spec.parent(node);
    ranks.push_back(node > 0 ? spec.rank(node) : 0);
    if (depths.empty() || spec.node_depth(node) > depths.back()) first.push_back(node);
    depths.push_back(spec.node_depth(node));
  }
  first.push_back(spec.num_nodes());
  for (size_t row = nodes; row < rows; ++row) {
    ancestors[row] = ancestors[row - nodes];
    parents[row] = parents[row - nodes];
  }
  const auto upload = [&](void* to, const auto& values, size_t count) {
    staging.upload(to, values.data(), static_cast<int64_t>(count * sizeof(values[0])), stream);
  };
  upload(state.tree.rank, ranks, nodes);
  upload(state.tree.node_depth, depths, nodes);
  upload(state.tree.first_node, first, first.size());
  upload(state.tree.ancestors, ancestors, nodes);
  upload(state.ancestors, ancestors, rows);
  upload(state.parents, parents, rows);
  upload(state.row_index, index, rows);
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

void check_batch(const char* what, const StepState& state, int64_t batch) {
  MEDUSA_CHECK_INTERNAL(batch >= 1 && batch <= state.num_lines, what, ": a batch of ", batch,
                        ", state for ", state.num_lines);
}

}  // namespace

Resident::PassRows StepState::pass_rows(int batch) const {
  const int num_rows = batch * tree.num_nodes;
  return {
      {num_rows, row_token, row_sequence, row_position, row_slot, row_prefix_len, row_ancestors},
      {row_prompt_len, DType::i32, num_rows},
      {row_index, DType::i32, num_rows}};
}

VerifyArgs StepState::verify_args(int batch) const {
  VerifyArgs args;
  args.batch = batch;
  args.max_nodes = tree.num_nodes;
  args.lines = lines;
  args.params = params;
  args.states = states;
  args.eos_ids = eos_ids;
  args.history = history;
  args.trees = trees;
  args.token = tree_tokens;
  args.parent = parents;
  args.ancestors = reinterpret_cast<const uint64_t*>(ancestors);
  args.results = results;
  args.path = path;
  args.path_tokens = path_tokens;
  return args;
}

DeviceMoves StepState::moves(int batch) const {
  DeviceMoves moves;
  moves.num_lines = batch;
  moves.max_path = tree.num_nodes;
  moves.sequence = lines;
  moves.len = root_len;
  moves.n = &results->num_tokens;
  moves.n_stride = Ring::kResultInts;
  moves.path = path;
  return moves;
}

OwnedStepState::OwnedStepState(const ResidentShape& shape, Staging& staging, cudaStream_t stream) {
  view_.num_lines = shape.max_lines;
  view_.hidden_size = shape.hidden_size;
  view_.history_words = (int64_t{shape.vocab_size} + 31) / 32;
  view_.tree.num_nodes = shape.tree.num_nodes();
  view_.tree.depth = shape.tree.depth();
  memory_ = std::make_unique<DeviceBuffer>(lay_out(view_, nullptr));
  lay_out(view_, memory_->data());
  upload_constants(view_, shape.tree, staging, stream);
}

void start_line(const StepState& state, const ResidentLine& line, Staging& staging,
                cudaStream_t stream) {
  MEDUSA_CHECK_INTERNAL(line.line >= 0 && line.line < state.num_lines && !line.tokens.empty() &&
                            line.remaining >= 1 && line.eos_ids.size() <= kMaxResidentEos,
                        "resident: line ", line.line, " of ", state.num_lines, " starts with ",
                        line.tokens.size(), " tokens, ", line.remaining, " to come, ",
                        line.eos_ids.size(), " ends");
  const auto num_tokens = static_cast<int32_t>(line.tokens.size());
  LineStart start = {};
  start.line = line.line;
  start.len = num_tokens - 1;
  start.root = line.tokens.back();
  start.prompt_len = line.prompt_len;
  start.state = {static_cast<uint32_t>(num_tokens), line.remaining};
  start.params = line_params(*line.sampling, line.line * kMaxResidentEos,
                             static_cast<int>(line.eos_ids.size()));
  std::copy(line.eos_ids.begin(), line.eos_ids.end(), start.eos_ids);

  std::vector<uint32_t> seen(static_cast<size_t>(state.history_words));
  for (const int32_t token : line.tokens) {
    const auto word = static_cast<size_t>(token) / 32;
    if (token >= 0 && word < seen.size()) seen[word] |= 1u << (token % 32);
  }
  staging.upload(state.history + line.line * state.history_words, seen.data(),
                 state.history_words * 4, stream);
  if (line.hidden != nullptr) {
    staging.upload(state.hidden + line.line * state.hidden_size, line.hidden, state.hidden_size * 4,
                   stream);
  }
  launch(start_line_kernel, dim3(1), dim3(kMaxResidentEos), 0, stream, state, start);
}

void set_lines(const StepState& state, std::span<const int> lines, Staging& staging,
               cudaStream_t stream) {
  check_batch("set_lines", state, static_cast<int64_t>(lines.size()));
  for (const int line : lines) {
    MEDUSA_CHECK_INTERNAL(line >= 0 && line < state.num_lines, "set_lines: line ", line, " of ",
                          state.num_lines);
  }
  const std::vector<int32_t> packed(lines.begin(), lines.end());
  staging.upload(state.lines, packed.data(), static_cast<int64_t>(packed.size()) * 4, stream);
}

TensorView gather_hidden(const StepState& state, int batch, cudaStream_t stream) {
  check_batch("gather_hidden", state, batch);
  launch(gather_hidden_kernel, dim3(static_cast<unsigned>(batch)), dim3(kThreads), 0, stream,
         state);
  return {state.batch_hidden, DType::f32, batch, state.hidden_size};
}

void fill_tree(const StepState& state, int batch, TensorView ids, TensorView values,
               TensorView token_map, cudaStream_t stream) {
  check_batch("fill_tree", state, batch);
  const int64_t width = ids.size(1);
  MEDUSA_CHECK_INTERNAL(width >= 1 && width <= kMaxRanks && values.size(1) == width &&
                            ids.size(0) == int64_t{state.tree.depth} * batch,
                        "fill_tree: candidates ", shape_string(ids), " for depth ",
                        state.tree.depth, " of ", batch);
  if (state.tree.depth == 0) return;
  launch_overlapped(fill_tree_kernel,
                    dim3(static_cast<unsigned>(state.tree.depth), static_cast<unsigned>(batch)),
                    dim3(static_cast<unsigned>((width + 31) / 32 * 32)), 0, stream, state, batch,
                    static_cast<int>(width), ids.as<int32_t>(), values.as<float>(),
                    token_map.as<int32_t>(), token_map.size(0));
}

void build_rows(const StepState& state, int batch, cudaStream_t stream) {
  check_batch("build_rows", state, batch);
  // The first kernel of a graph has none before it.
  const auto start =
      state.tree.depth > 0 ? &launch_overlapped<StepState, int> : &launch<StepState, int>;
  start(build_rows_kernel, dim3(blocks_for(int64_t{batch} * state.tree.num_nodes)), dim3(kThreads),
        0, stream, state, batch);
}

void advance(const StepState& state, int batch, cudaStream_t stream) {
  check_batch("advance", state, batch);
  launch_overlapped(advance_kernel, dim3(blocks_for(batch)), dim3(kThreads), 0, stream, state,
                    batch);
}

void keep_hidden(const StepState& state, int batch, TensorView hidden, cudaStream_t stream) {
  check_batch("keep_hidden", state, batch);
  MEDUSA_CHECK_INTERNAL(hidden.size(0) == int64_t{batch} * state.tree.num_nodes &&
                            hidden.size(1) == state.hidden_size,
                        "keep_hidden: hidden is ", shape_string(hidden));
  launch_overlapped(keep_hidden_kernel, dim3(static_cast<unsigned>(batch)), dim3(kThreads), 0,
                    stream, state, hidden.as<float>());
}

void publish(const StepState& state, int batch, const Ring& ring, cudaStream_t stream) {
  check_batch("publish", state, batch);
  MEDUSA_CHECK_INTERNAL(ring.num_lines == state.num_lines && ring.num_nodes == state.tree.num_nodes,
                        "publish: the ring is for ", ring.num_lines, " lines of ", ring.num_nodes,
                        " nodes");
  launch_overlapped(publish_kernel, dim3(1), dim3(kThreads), 0, stream, state, batch, ring);
}

PinnedRing::PinnedRing(int num_entries, int num_lines, int num_nodes) {
  view_.num_entries = num_entries;
  view_.num_lines = num_lines;
  view_.num_nodes = num_nodes;
  const auto num_bytes = static_cast<size_t>(num_entries * view_.entry_bytes());
  void *memory = nullptr, *device_memory = nullptr;
  CUDA_CHECK(cudaHostAlloc(&memory, num_bytes, cudaHostAllocMapped));
  memory_ = static_cast<char*>(memory);
  std::memset(memory, 0, num_bytes);
  CUDA_CHECK(cudaHostGetDevicePointer(&device_memory, memory, 0));
  view_.device_memory = static_cast<char*>(device_memory);
}

PinnedRing::~PinnedRing() { static_cast<void>(cudaFreeHost(memory_)); }

const char* PinnedRing::entry(uint64_t step) const {
  const auto index = static_cast<int64_t>(step % static_cast<uint64_t>(view_.num_entries));
  return memory_ + index * view_.entry_bytes();
}

bool PinnedRing::has(uint64_t step) const {
  auto* number = reinterpret_cast<uint64_t*>(const_cast<char*>(entry(step)));
  return std::atomic_ref<uint64_t>(*number).load(std::memory_order_acquire) == step + 1;
}

PinnedRing::Row PinnedRing::row(uint64_t step, int b) const {
  const auto* ints =
      reinterpret_cast<const int32_t*>(entry(step) + Ring::kRowsAt) + b * view_.row_ints();
  Row row;
  std::memcpy(&row.result, ints, sizeof(row.result));
  const auto n = static_cast<size_t>(row.result.num_tokens);
  row.path = {ints + Ring::kResultInts, n};
  row.tokens = {ints + Ring::kResultInts + view_.num_nodes, n};
  return row;
}

StepTimes PinnedRing::times(uint64_t step) const {
  StepTimes times;
  std::memcpy(&times, entry(step) + sizeof(uint64_t), sizeof(times));
  return times;
}

}  // namespace medusa::cuda
