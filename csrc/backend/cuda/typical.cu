// typical: the deepest path of typical tokens of each tree, the likeliest among equals.
//
//   p = softmax(y / T), H = -sum p ln(p + 1e-5); child c of v stands if
//   p(token_c) > min(epsilon, delta exp(-H)) and v stands; of the standing nodes the deepest,
//   then the one with the greatest sum of ln p along the path, then the lowest
//
// Shapes    logits [N, V] f32; totals, entropies [B, max_nodes, chunks] f64; typical_end [B] i32
// Traffic   8 V bytes per inner node, from the second-level cache. About 50 f64 operations per id
//           bound it: 22 inner nodes x 131072 ids are 144 M, 10 us at the 15 T/s of an H200 (a card
//           with few f64 units takes far longer)
// Launch    totals and entropies: grid (chunks, max_nodes, B), 256 threads, 16 ids each; a block
//           whose node has no child, or whose line is of another kind, ends at once. Path: one
//           block per row of the batch, a thread per node
// Bits      sums run within a thread, then over lanes, warps and chunks in one order that V fixes
// Source    typical acceptance, arXiv:2401.10774; the 1e-5 inside the logarithm is the original's
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/choose.cuh"

namespace medusa::cuda {
namespace {

__device__ double block_sum(double value, double* partial) {  // partial [32], shared
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();  // of the last use
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += partial[warp];
  return sum;
}

__device__ __forceinline__ double in_order(const double* parts, int num_parts) {
  double sum = 0.0;
  for (int i = 0; i < num_parts; ++i) sum += parts[i];
  return sum;
}

// exp((y - max) / T)
__device__ __forceinline__ double weight_of(float score, double max, double inverse_temperature) {
  return exp((score - max) * inverse_temperature);
}

__device__ bool has_child(const VerifyArgs& args, int batch, int node) {
  bool found = false;
  const int num_nodes = args.trees[batch].num_nodes;
  for (int v = node + 1 + static_cast<int>(threadIdx.x); v < num_nodes;
       v += static_cast<int>(blockDim.x)) {
    found |= args.parent[node_index(args, batch, v)] == node;
  }
  return __syncthreads_or(found);
}

// Sums one chunk: of the weights, or (kEntropy) of -p ln(p + 1e-5), for which all totals must
// stand.
template <bool kEntropy>
__global__ void __launch_bounds__(kChunkThreads) typical_sum_kernel(VerifyArgs args) {
  __shared__ double partial[kWarp];
  begin_overlapped();
  const int node = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
  if (node >= args.trees[batch].num_nodes) return;
  const LineParams& params = args.params[line_of(args, batch)];
  if (!is_typical(params) || !has_child(args, batch, node)) return;

  const int num_parts = static_cast<int>(gridDim.x);
  const int64_t first_part = node_index(args, batch, node) * num_parts;
  const double max = value_of(merge_parts(args.parts + first_part, num_parts).top);
  const double inverse_temperature = 1.0 / params.temperature;
  const double share = kEntropy ? 1.0 / in_order(args.totals + first_part, num_parts) : 0.0;

  const uint32_t chunk_start = blockIdx.x * 4 * kQuads * blockDim.x;
  float scores[kQuads][4];
  score_row(args, params, batch, node).chunk(chunk_start, scores);
  double sum = 0.0;
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (quad_id(chunk_start, quad) + static_cast<uint32_t>(i) >= args.vocab) continue;
      const double weight = weight_of(scores[quad][i], max, inverse_temperature);
      if (kEntropy) {
        const double p = weight * share;
        sum -= p * log(p + 1e-5);
      } else {
        sum += weight;
      }
    }
  }
  sum = block_sum(sum, partial);
  double* parts = kEntropy ? args.entropies : args.totals;
  if (threadIdx.x == 0) parts[first_part + blockIdx.x] = sum;
}

// The least likelihood there is: of a node that does not stand.
constexpr double kRejected = -std::numeric_limits<double>::infinity();

__global__ void __launch_bounds__(kMaxTreeNodes)
    typical_path_kernel(VerifyArgs args, int num_parts) {
  __shared__ int is_inner[kMaxTreeNodes], depth[kMaxTreeNodes];
  __shared__ double max[kMaxTreeNodes], total[kMaxTreeNodes], threshold[kMaxTreeNodes];
  __shared__ double log_p[kMaxTreeNodes], likelihood[kMaxTreeNodes];
  begin_overlapped();
  const int batch = static_cast<int>(blockIdx.x), v = static_cast<int>(threadIdx.x);
  const int num_nodes = args.trees[batch].num_nodes;
  const LineParams& params = args.params[line_of(args, batch)];
  if (num_nodes == 0 || !is_typical(params)) return;

  // What judges the children of each inner node, one warp a node.
  const bool is_child = v > 0 && v < num_nodes;
  const int parent = is_child ? args.parent[node_index(args, batch, v)] : 0;
  is_inner[v] = 0;
  __syncthreads();
  if (is_child) is_inner[parent] = 1;
  __syncthreads();
  for (int node = v / kWarp; node < num_nodes; node += static_cast<int>(blockDim.x) / kWarp) {
    const int64_t first_part = node_index(args, batch, node) * num_parts;
    const Rank top = merge_parts(args.parts + first_part, num_parts).top;
    if (v % kWarp != 0 || !is_inner[node]) continue;
    max[node] = value_of(top);
    total[node] = in_order(args.totals + first_part, num_parts);
    const double bound = params.delta * exp(-in_order(args.entropies + first_part, num_parts));
    threshold[node] = bound < params.epsilon ? bound : params.epsilon;
  }
  __syncthreads();

  log_p[v] = v == 0 ? 0.0 : kRejected;
  if (is_child) {
    const auto token = static_cast<uint32_t>(args.token[node_index(args, batch, v)]);
    if (token < args.vocab) {
      const float score = score_row(args, params, batch, parent).one(token);
      const double p = weight_of(score, max[parent], 1.0 / params.temperature) / total[parent];
      if (p > threshold[parent]) log_p[v] = log(p);
    }
  }
  __syncthreads();
  likelihood[v] = kRejected;
  if (v < num_nodes) {
    double sum = 0.0;  // a rejected ancestor makes it -infinity
    for_path(args, batch, v, [&](int ancestor) { sum += log_p[ancestor]; });
    likelihood[v] = sum;
    depth[v] = depth_of(args, batch, v);
  }
  __syncthreads();

  if (v != 0) return;
  int best = 0;
  for (int node = 1; node < num_nodes; ++node) {
    if (likelihood[node] == kRejected || depth[node] < depth[best]) continue;
    if (depth[node] > depth[best] || likelihood[node] > likelihood[best]) best = node;
  }
  args.typical_end[batch] = best;
}

}  // namespace

void launch_typical(const VerifyArgs& args, cudaStream_t stream) {
  const int num_parts = num_chunks(args.vocab);
  const dim3 grid(static_cast<unsigned>(num_parts), static_cast<unsigned>(args.max_nodes),
                  static_cast<unsigned>(args.batch));
  const dim3 block(static_cast<unsigned>(chunk_threads(args.vocab)));
  launch_overlapped(typical_sum_kernel<false>, grid, block, 0, stream, args);
  launch_overlapped(typical_sum_kernel<true>, grid, block, 0, stream, args);
  const int threads = (args.max_nodes + kWarp - 1) / kWarp * kWarp;
  launch_overlapped(typical_path_kernel, dim3(static_cast<unsigned>(args.batch)),
                    dim3(static_cast<unsigned>(threads)), 0, stream, args, num_parts);
}

}  // namespace medusa::cuda
