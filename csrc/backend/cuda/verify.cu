// verify: walks each tree along the model's own choices, or takes the deepest typical path.
//
//   v = root; loop: emit x_v; stop at an end-of-sequence token or the limit; if a child of v holds
//   x_v, v = that child, else stop
//
// Shapes    see VerifyArgs; results [B], path and path_tokens [B, max_nodes]
// Traffic   16 bytes per node and chunk, and a gathered logit per node: a few dependent loads from
//           the second-level cache, 2 to 4 us of latency
// Launch    one block per row of the batch, a thread per node: the choices of all nodes and their
//           children are found side by side, so that what remains is a chain in shared memory
// Host      do_verify sends everything in one upload and reads everything in one download, which
//           waits. The decode loop on the device calls launch_verify instead
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/cuda/choose.cuh"
#include "backend/cuda/cuda_backend.h"
#include "medusa/error.h"

namespace medusa::cuda {
namespace {

constexpr int kMarkThreads = 256;

// The token chosen at a node by the exact rule, or the greatest score; every lane gets it.
__device__ int32_t chosen_at(const VerifyArgs& args, const LineParams& params, int64_t index,
                             int num_parts) {
  const ChoicePart best = merge_parts(args.parts + index * num_parts, num_parts);
  const auto top = static_cast<int32_t>(id_of(best.top));
  const Rule rule = rule_of(params, args.vocab);
  // An overflow must not make a tie.
  if (rule == Rule::greedy || !is_finite(value_of(best.top) / params.temperature)) return top;
  return rule == Rule::noise ? static_cast<int32_t>(id_of(best.noisy)) : args.filtered[index];
}

__global__ void __launch_bounds__(kMaxTreeNodes) walk_kernel(VerifyArgs args, int num_parts) {
  __shared__ int32_t choice[kMaxTreeNodes];
  __shared__ int next[kMaxTreeNodes], is_end[kMaxTreeNodes], is_broken[kMaxTreeNodes];
  begin_overlapped();
  const int batch = static_cast<int>(blockIdx.x), v = static_cast<int>(threadIdx.x);
  const int line = line_of(args, batch);
  const LineParams& params = args.params[line];
  const TreeRows tree = args.trees[batch];
  const bool by_path = args.needs.typical && is_typical(params) && tree.num_nodes > 0;
  const int path_end = by_path ? args.typical_end[batch] : -1;

  for (int node = v / kWarp; node < tree.num_nodes; node += static_cast<int>(blockDim.x) / kWarp) {
    const int32_t token = chosen_at(args, params, node_index(args, batch, node), num_parts);
    if (v % kWarp == 0) choice[node] = token;
  }
  next[v] = -1;
  __syncthreads();

  // Which child follows each node. On a typical path the child decides what its parent emits.
  const bool is_child = v > 0 && v < tree.num_nodes;
  const int64_t index = node_index(args, batch, v);
  const int parent = is_child ? args.parent[index] : 0;
  const int32_t token = is_child ? args.token[index] : -1;
  bool follows = false;
  if (by_path) {
    for_path(args, batch, path_end, [&](int node) { follows |= is_child && node == v; });
  } else {
    follows = is_child && token == choice[parent];
  }
  __syncthreads();
  if (follows) {
    next[parent] = v;
    choice[parent] = token;
  }
  __syncthreads();

  is_end[v] = is_broken[v] = 0;
  if (v < tree.num_nodes) {
    for (int i = 0; i < params.num_eos; ++i) {
      is_end[v] |= args.eos_ids[params.first_eos + i] == choice[v];
    }
    // Of a typical path the last node alone: what came before has been judged by probabilities.
    if (!by_path || v == path_end) {
      is_broken[v] = !is_finite(args.logits[(tree.first_row + v) * args.vocab + choice[v]]);
    }
  }
  __syncthreads();

  if (v != 0) return;
  const LineState state = args.states[line];
  WalkResult result{WalkStatus::idle, 0, -1, -1, 0};
  int node = tree.num_nodes > 0 ? 0 : -1;
  if (by_path && is_broken[path_end]) node = path_end;  // refused, whatever stands before it
  while (node >= 0) {
    if (is_broken[node]) {
      result.status = WalkStatus::broken;
      result.broken_position = state.position + static_cast<uint32_t>(depth_of(args, batch, node));
      break;
    }
    const int64_t at = node_index(args, batch, result.num_tokens++);
    args.path[at] = result.last_node = node;
    args.path_tokens[at] = result.next_root = choice[node];
    if (has_penalty(args, params)) {
      const auto word = static_cast<uint32_t>(choice[node]) / 32;
      atomicOr(&args.history[line * bit_words(args) + word], 1u << choice[node] % 32);
    }
    result.status = is_end[node]                           ? WalkStatus::end_of_text
                    : result.num_tokens >= state.remaining ? WalkStatus::full
                                                           : WalkStatus::goes_on;
    if (result.status != WalkStatus::goes_on) break;
    node = next[node];
  }
  args.results[batch] = result;
}

// Sets the bits of the tokens [first[line], first[line + 1]) in the line's history.
__global__ void __launch_bounds__(kMarkThreads)
    mark_history_kernel(const int32_t* tokens, const int32_t* first, int64_t vocab,
                        uint32_t* history) {
  begin_overlapped();
  const int line = static_cast<int>(blockIdx.y);
  const int64_t words = (vocab + 31) / 32;
  const int i = first[line] + static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= first[line + 1]) return;
  const auto token = static_cast<uint32_t>(tokens[i]);
  if (token < vocab) atomicOr(&history[line * words + token / 32], 1u << token % 32);
}

// What do_verify sends: host and device hold it alike.
struct Request {
  LineParams* params;
  LineState* states;
  TreeRows* trees;
  int32_t *token, *parent;
  uint64_t* ancestors;
  int32_t* eos_ids;
  int32_t *history_first, *history_tokens;
};

struct RequestSizes {
  int batch = 0, max_nodes = 0;
  int64_t num_eos = 0, num_history = 0;
};

Request divide_request(Divider& divider, const RequestSizes& sizes) {
  const int64_t nodes = int64_t{sizes.batch} * sizes.max_nodes;
  Request request;
  request.params = divider.take<LineParams>(sizes.batch);
  request.states = divider.take<LineState>(sizes.batch);
  request.trees = divider.take<TreeRows>(sizes.batch);
  request.token = divider.take<int32_t>(nodes);
  request.parent = divider.take<int32_t>(nodes);
  request.ancestors = divider.take<uint64_t>(nodes * kAncestorWords);
  request.eos_ids = divider.take<int32_t>(sizes.num_eos);
  request.history_first = divider.take<int32_t>(sizes.batch + 1);
  request.history_tokens = divider.take<int32_t>(sizes.num_history);
  return request;
}

struct Answer {
  WalkResult* results;
  int32_t *path, *path_tokens;
};

Answer divide_answer(Divider& divider, const RequestSizes& sizes) {
  const int64_t nodes = int64_t{sizes.batch} * sizes.max_nodes;
  Answer answer;
  answer.results = divider.take<WalkResult>(sizes.batch);
  answer.path = divider.take<int32_t>(nodes);
  answer.path_tokens = divider.take<int32_t>(nodes);
  return answer;
}

bool needs_history(const VerifyItem& item) { return item.sampling->repetition_penalty != 1.0f; }

RequestSizes sizes_of(std::span<const VerifyItem> items) {
  RequestSizes sizes;
  sizes.batch = static_cast<int>(items.size());
  for (const VerifyItem& item : items) {
    sizes.max_nodes = std::max(sizes.max_nodes, item.tree->num_nodes());
    sizes.num_eos += static_cast<int64_t>(item.eos_ids.size());
    if (needs_history(item)) sizes.num_history += static_cast<int64_t>(item.tokens.size());
  }
  return sizes;
}

void fill_request(std::span<const VerifyItem> items, const RequestSizes& sizes,
                  const Request& request) {
  int first_eos = 0, history = 0;
  for (size_t b = 0; b < items.size(); ++b) {
    const VerifyItem& item = items[b];
    const DraftTree& tree = *item.tree;
    const auto num_eos = static_cast<int>(item.eos_ids.size());
    request.params[b] = line_params(*item.sampling, first_eos, num_eos);
    std::copy(item.eos_ids.begin(), item.eos_ids.end(), request.eos_ids + first_eos);
    first_eos += num_eos;
    request.states[b] = {static_cast<uint32_t>(item.tokens.size()), item.max_tokens};

    request.trees[b] = {item.first_row, tree.num_nodes()};
    for (int v = 0; v < tree.num_nodes(); ++v) {
      const size_t at = b * static_cast<size_t>(sizes.max_nodes) + static_cast<size_t>(v);
      request.token[at] = tree.token(v);
      request.parent[at] = tree.parent(v);
      std::copy(tree.ancestors(v).begin(), tree.ancestors(v).end(),
                request.ancestors + at * kAncestorWords);
    }

    request.history_first[b] = history;
    if (!needs_history(item)) continue;
    std::copy(item.tokens.begin(), item.tokens.end(), request.history_tokens + history);
    history += static_cast<int>(item.tokens.size());
  }
  request.history_first[items.size()] = history;
}

}  // namespace

VerifyNeeds needs_of(const SamplingParams& sampling, int64_t vocab) {
  VerifyNeeds needs;
  needs.penalty = sampling.repetition_penalty != 1.0f;
  if (sampling.temperature == 0.0f) return needs;
  needs.typical = sampling.acceptance == Acceptance::typical;
  needs.filters = !needs.typical && ((sampling.top_k > 0 && sampling.top_k < vocab) ||
                                     sampling.top_p < 1.0 || sampling.min_p > 0.0);
  return needs;
}

LineParams line_params(const SamplingParams& sampling, int first_eos, int num_eos) {
  LineParams params;
  params.seed = sampling.seed;
  params.top_p = sampling.top_p;
  params.min_p = sampling.min_p;
  params.epsilon = sampling.epsilon;
  params.delta = sampling.delta;
  params.temperature = sampling.temperature;
  params.repetition_penalty = sampling.repetition_penalty;
  params.sample_index = sampling.sample_index;
  params.top_k = sampling.top_k;
  params.typical = sampling.acceptance == Acceptance::typical;
  params.first_eos = first_eos;
  params.num_eos = num_eos;
  return params;
}

int64_t set_verify_work(VerifyArgs& args, void* memory) {
  Divider divider(memory);
  const int64_t nodes = int64_t{args.batch} * args.max_nodes;
  const int64_t parts = nodes * num_chunks(args.vocab);
  args.parts = divider.take<ChoicePart>(parts);
  if (args.needs.penalty) args.penalised = divider.take<uint32_t>(nodes * ((args.vocab + 31) / 32));
  if (args.needs.filters) args.filtered = divider.take<int32_t>(nodes);
  if (args.needs.typical) {
    args.totals = divider.take<double>(parts);
    args.entropies = divider.take<double>(parts);
    args.typical_end = divider.take<int32_t>(args.batch);
  }
  return divider.num_bytes();
}

void launch_walk(const VerifyArgs& args, cudaStream_t stream) {
  const int threads = (args.max_nodes + kWarp - 1) / kWarp * kWarp;
  launch_overlapped(walk_kernel, dim3(static_cast<unsigned>(args.batch)),
                    dim3(static_cast<unsigned>(threads)), 0, stream, args, num_chunks(args.vocab));
}

void launch_verify(const VerifyArgs& args, cudaStream_t stream) {
  launch_choose(args, stream);
  if (args.needs.filters) launch_filter(args, stream);
  if (args.needs.typical) launch_typical(args, stream);
  launch_walk(args, stream);
}

void throw_broken_logits(uint32_t position) {
  throw ArgumentError(concat("the logits at position ", position,
                             " hold no finite maximum: the weights are broken or too large for "
                             "their type; try dtype f32"));
}

void CudaBackend::do_verify(TensorView logits, std::span<const VerifyItem> items) {
  const cudaStream_t stream = stream_.get();
  const RequestSizes sizes = sizes_of(items);
  VerifyArgs args;
  args.logits = logits.as<float>();
  args.vocab = logits.size(1);
  args.batch = sizes.batch;
  args.max_nodes = sizes.max_nodes;
  for (const VerifyItem& item : items) args.needs |= needs_of(*item.sampling, args.vocab);
  const int64_t history_bytes =
      args.needs.penalty ? sizes.batch * ((args.vocab + 31) / 32) * int64_t{4} : 0;

  // One piece of memory: what is sent, the history's bits, what comes back.
  Divider request_size(nullptr), answer_size(nullptr);
  divide_request(request_size, sizes);
  divide_answer(answer_size, sizes);
  auto* state = static_cast<char*>(verify_state_.at_least(
      request_size.num_bytes() + answer_size.num_bytes() + history_bytes, stream));
  Divider on_device(state), answer_on_device(state + request_size.num_bytes());
  const Request request = divide_request(on_device, sizes);
  const Answer answer = divide_answer(answer_on_device, sizes);
  args.params = request.params;
  args.states = request.states;
  args.eos_ids = request.eos_ids;
  args.trees = request.trees;
  args.token = request.token;
  args.parent = request.parent;
  args.ancestors = request.ancestors;
  args.results = answer.results;
  args.path = answer.path;
  args.path_tokens = answer.path_tokens;
  args.history =
      reinterpret_cast<uint32_t*>(state + request_size.num_bytes() + answer_size.num_bytes());

  std::vector<char> sent(static_cast<size_t>(request_size.num_bytes()));
  Divider on_host(sent.data());
  fill_request(items, sizes, divide_request(on_host, sizes));
  staging_.upload(state, sent.data(), request_size.num_bytes(), stream);
  if (args.needs.penalty) {
    CUDA_CHECK(cudaMemsetAsync(args.history, 0, static_cast<size_t>(history_bytes), stream));
    size_t longest = 0;
    for (const VerifyItem& item : items) {
      if (needs_history(item)) longest = std::max(longest, item.tokens.size());
    }
    launch_overlapped(mark_history_kernel,
                      dim3(static_cast<unsigned>((longest + kMarkThreads - 1) / kMarkThreads),
                           static_cast<unsigned>(sizes.batch)),
                      dim3(kMarkThreads), 0, stream, request.history_tokens, request.history_first,
                      args.vocab, args.history);
  }
  VerifyArgs counted = args;
  set_verify_work(args, verify_parts_.at_least(set_verify_work(counted, nullptr), stream));
  launch_verify(args, stream);

  std::vector<char> received(static_cast<size_t>(answer_size.num_bytes()));
  do_download(received.data(), answer.results, answer_size.num_bytes());
  Divider received_on_host(received.data());
  const Answer got = divide_answer(received_on_host, sizes);
  for (size_t b = 0; b < items.size(); ++b) {
    const WalkResult& result = got.results[b];
    if (result.status == WalkStatus::broken) throw_broken_logits(result.broken_position);
    const size_t first = b * static_cast<size_t>(sizes.max_nodes);
    const auto count = static_cast<size_t>(result.num_tokens);
    items[b].accepted->path.assign(got.path + first, got.path + first + count);
    items[b].accepted->tokens.assign(got.path_tokens + first, got.path_tokens + first + count);
  }
}

}  // namespace medusa::cuda
