// What the choosing kernels share: scores in one order, rows of logits by chunks, block-wide steps.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "backend/cuda/gpu.h"
#include "backend/cuda/reduce.h"
#include "backend/cuda/verify_state.h"
#include "medusa/noise.h"

namespace medusa::cuda {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

// ---- ranks: (value falling, id rising) as one integer, the first has the lowest. NaN counts as
// -infinity and the zeros are equal, as in every comparison of the CPU backend.

using Rank = uint64_t;
constexpr Rank kNoRank = ~Rank{0};

__device__ __forceinline__ Rank rank_of(float value, uint32_t id) {
  // Adding 0 makes -0 a 0.
  const uint32_t bits = __float_as_uint(value == value ? value + 0.0f : kLowest);
  const uint32_t falling = bits & 0x80000000u ? bits : ~bits & 0x7FFFFFFFu;
  return Rank{falling} << 32 | id;
}

__device__ __forceinline__ float value_of(Rank rank) {
  const auto falling = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float(falling & 0x80000000u ? falling : ~falling & 0x7FFFFFFFu);
}

__device__ __forceinline__ uint32_t id_of(Rank rank) { return static_cast<uint32_t>(rank); }

__device__ __forceinline__ bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7F800000u) != 0x7F800000u;
}

// ---- chunks: a thread holds kQuads times four neighbouring ids. Threads and chunks follow from V.

constexpr int kQuads = 4;
constexpr int kChunkThreads = 256;

inline int chunk_threads(int64_t vocab) {
  const int64_t warps = (vocab + 4 * kQuads * kWarp - 1) / (4 * kQuads * kWarp);
  return warps < kChunkThreads / kWarp ? static_cast<int>(warps) * kWarp : kChunkThreads;
}

inline int num_chunks(int64_t vocab) {
  const int64_t ids = int64_t{4} * kQuads * chunk_threads(vocab);
  return static_cast<int>((vocab + ids - 1) / ids);
}

__device__ __forceinline__ uint32_t quad_id(uint32_t chunk_start, int quad) {
  return chunk_start + 4 * (static_cast<uint32_t>(quad) * blockDim.x + threadIdx.x);
}

__device__ __forceinline__ float penalise(float score, float penalty) {
  return score < 0.0f ? score * penalty : score / penalty;
}

// The scores of one node: its logits with the repetition penalty.
struct ScoreRow {
  const float* logits;
  const uint32_t* penalised;  // bits; null: the penalty is 1
  float penalty;
  uint32_t vocab;
  bool wide;  // 16-byte aligned

  __device__ __forceinline__ float one(uint32_t id) const {
    const float score = logits[id];
    const bool is_penalised = penalised && (penalised[id / 32] >> id % 32 & 1);
    return is_penalised ? penalise(score, penalty) : score;
  }

  // Scores of ids id .. id + 3, NaN beyond the vocabulary; id is a multiple of 4.
  __device__ __forceinline__ void four(uint32_t id, float (&score)[4]) const {
    if (wide && id + 4 <= vocab) {
      const float4 v = *reinterpret_cast<const float4*>(logits + id);
      score[0] = v.x;
      score[1] = v.y;
      score[2] = v.z;
      score[3] = v.w;
    } else {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        score[i] = id + i < vocab ? logits[id + i] : kNotANumber;
      }
    }
    if (penalised && id < vocab) {
      const uint32_t bits = penalised[id / 32] >> id % 32;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (bits >> i & 1) score[i] = penalise(score[i], penalty);
      }
    }
  }

  // The whole chunk: all loads are under way before the first score is used.
  __device__ __forceinline__ void chunk(uint32_t chunk_start, float (&scores)[kQuads][4]) const {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) four(quad_id(chunk_start, quad), scores[quad]);
  }
};

// ---- a node: blockIdx.y or a loop counts nodes, blockIdx.z or blockIdx.x rows of the batch

__device__ __forceinline__ int line_of(const VerifyArgs& args, int batch) {
  return args.lines ? args.lines[batch] : batch;
}

__device__ __forceinline__ int64_t node_index(const VerifyArgs& args, int batch, int node) {
  return int64_t{batch} * args.max_nodes + node;
}

__device__ __forceinline__ int64_t bit_words(const VerifyArgs& args) {
  return (args.vocab + 31) / 32;
}

__device__ __forceinline__ bool has_penalty(const VerifyArgs& args, const LineParams& params) {
  return args.needs.penalty && params.repetition_penalty != 1.0f;
}

__device__ __forceinline__ ScoreRow score_row(const VerifyArgs& args, const LineParams& params,
                                              int batch, int node) {
  ScoreRow row;
  row.logits = args.logits + (args.trees[batch].first_row + node) * args.vocab;
  row.penalised = has_penalty(args, params)
                      ? args.penalised + node_index(args, batch, node) * bit_words(args)
                      : nullptr;
  row.penalty = params.repetition_penalty;
  row.vocab = static_cast<uint32_t>(args.vocab);
  row.wide = reinterpret_cast<uintptr_t>(row.logits) % 16 == 0;
  return row;
}

__device__ __forceinline__ int depth_of(const VerifyArgs& args, int batch, int node) {
  const uint64_t* words = args.ancestors + node_index(args, batch, node) * kAncestorWords;
  int depth = -1;
  for (int word = 0; word < kAncestorWords; ++word) depth += __popcll(words[word]);
  return depth;
}

// Calls visit(v) for each node v from the root down to `node`: parents have lower numbers.
template <class Visit>
__device__ __forceinline__ void for_path(const VerifyArgs& args, int batch, int node, Visit visit) {
  const uint64_t* words = args.ancestors + node_index(args, batch, node) * kAncestorWords;
  for (int word = 0; word < kAncestorWords; ++word) {
    for (uint64_t bits = words[word]; bits != 0; bits &= bits - 1) {
      visit(64 * word + __ffsll(static_cast<long long>(bits)) - 1);
    }
  }
}

__device__ __forceinline__ bool is_typical(const LineParams& params) {
  return params.typical != 0 && params.temperature > 0.0f;
}

enum class Rule { greedy, noise, filtered };

__device__ __forceinline__ Rule rule_of(const LineParams& params, int64_t vocab) {
  if (params.temperature == 0.0f || params.typical != 0) return Rule::greedy;
  const bool by_k = params.top_k > 0 && params.top_k < vocab;
  return by_k || params.top_p < 1.0 || params.min_p > 0.0 ? Rule::filtered : Rule::noise;
}

// ---- noise

struct NodeNoise {
  uint64_t seed;
  uint32_t sample_index, position;

  __device__ __forceinline__ Philox4 four(uint32_t id) const {
    return noise_words(seed, sample_index, position, id / 4);
  }
  __device__ __forceinline__ float one(uint32_t id) const {
    return gumbel_from_bits(noise_word(seed, sample_index, position, id));
  }
};

__device__ __forceinline__ NodeNoise node_noise(const VerifyArgs& args, const LineParams& params,
                                                int line, int batch, int node) {
  return {params.seed, params.sample_index,
          args.states[line].position + static_cast<uint32_t>(depth_of(args, batch, node))};
}

// At least gumbel_from_bits(word): E >= u, so G <= -log u <= (1 + leading zeros) log 2.
__device__ __forceinline__ float gumbel_bound(uint32_t word) {
  return static_cast<float>(1 + __clz(static_cast<int>(word))) * 0.693148f + 1e-3f;
}

// The best of the ids that were offered.
struct Best {
  float value = kLowest;
  uint32_t id = 0xFFFFFFFFu;  // none

  __device__ __forceinline__ void offer(float candidate, uint32_t candidate_id) {
    if (candidate > value || (candidate == value && candidate_id < id)) {
      value = candidate;
      id = candidate_id;
    }
  }
  __device__ __forceinline__ Rank rank() const {
    return id == 0xFFFFFFFFu ? kNoRank : rank_of(value, id);
  }
};

// ---- block-wide steps; blockDim.x is a multiple of 32, every thread calls them

__device__ __forceinline__ Rank warp_min(Rank rank) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Rank other = __shfl_xor_sync(kAllLanes, rank, step);
    rank = other < rank ? other : rank;
  }
  return rank;
}

__device__ __forceinline__ Rank block_min(Rank rank, Rank* partial) {  // partial [32], shared
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  rank = warp_min(rank);
  __syncthreads();  // of the last use
  if (lane == 0) partial[threadIdx.x / kWarp] = rank;
  __syncthreads();
  return warp_min(lane < static_cast<int>(blockDim.x) / kWarp ? partial[lane] : kNoRank);
}

// The best of a row's chunks; every lane gets it.
__device__ __forceinline__ ChoicePart merge_parts(const ChoicePart* parts, int num_parts) {
  ChoicePart best{kNoRank, kNoRank};
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < num_parts; i += kWarp) {
    const ChoicePart part = parts[i];
    best.top = part.top < best.top ? part.top : best.top;
    best.noisy = part.noisy < best.noisy ? part.noisy : best.noisy;
  }
  return {warp_min(best.top), warp_min(best.noisy)};
}

// Sorts data [size], shared memory, rising; size is a power of 2. A barrier stands before the call,
// and one follows the last step.
__device__ inline void block_sort(Rank* data, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < size / 2;
           pair += static_cast<int>(blockDim.x)) {
        const int low = 2 * pair - (pair & (step - 1)), high = low + step;
        const Rank a = data[low], b = data[high];
        if ((a > b) == ((low & run) == 0)) {
          data[low] = b;
          data[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

__device__ __forceinline__ int power_of_two(int at_least) {
  return at_least <= 1 ? 1 : 1 << (32 - __clz(at_least - 1));
}

}  // namespace medusa::cuda
