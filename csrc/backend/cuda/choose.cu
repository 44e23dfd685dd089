// choose: the model's own token at every node of every tree, greedy or with noise.
//
//   greedy   argmax_i y_i              y = logits with the repetition penalty, ties to the lowest
//   id noise    argmax_i y_i / T + G_i    G keyed by (seed, sample, position, i); see
//   medusa/noise.h
//
// Shapes    logits [N, V] f32; parts [B, max_nodes, chunks], merged by whoever reads them
// Traffic   4 V bytes per node, read once, from the second-level cache: 64 x 131072 logits are
//           33.5 MB, 6 us at 5.5 TB/s. With noise about 30 instructions per id that the bound does
//           not exclude: 8.4 M ids are 9 us of issue slots on 132 SMs
// Launch    grid (chunks, max_nodes, B), 256 threads (fewer where V < 4096): a thread holds 16 ids
//           in registers, so the maximum and the noise cost one pass. Many blocks share a row, or
//           64 rows would leave half of the chip idle, and one row nearly all of it
// Exact     the result is the minimum of a total order, so neither the order of the ids nor the
//           chunks can matter. Noise is bounded: an id is skipped where even the greatest noise
//           cannot lift it over a noisy score already met. That test uses y * (1 / T) with a margin
//           for its rounding; what may win is divided
// Source    Gumbel-max coupling, arXiv:2408.07978
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/choose.cuh"

namespace medusa::cuda {
namespace {

// Marks the tokens of the text and of the path to the node in this block's stretch of the bits.
__device__ void mark_penalised(const VerifyArgs& args, int line, int batch, int node,
                               uint32_t chunk_start) {
  const uint32_t words = static_cast<uint32_t>(bit_words(args));
  const uint32_t word = chunk_start / 32 + threadIdx.x;  // a chunk has half a word per thread
  if (threadIdx.x < 4 * kQuads * blockDim.x / 32 && word < words) {
    uint32_t bits = args.history[int64_t{line} * words + word];
    for_path(args, batch, node, [&](int v) {
      const auto token = static_cast<uint32_t>(args.token[node_index(args, batch, v)]);
      if (token / 32 == word) bits |= 1u << token % 32;
    });
    args.penalised[node_index(args, batch, node) * words + word] = bits;
  }
  __syncthreads();  // the block reads them again
}

// The best of the thread's ids with noise; `top` is the best of the chunk's scores.
__device__ Rank noisy_best(const float (&scores)[kQuads][4], uint32_t chunk_start, Rank top,
                           float temperature, const NodeNoise& noise) {
  Best best;
  const float top_score = value_of(top) / temperature;
  if (top_score == kLowest) return kNoRank;
  best.offer(top_score + noise.one(id_of(top)), id_of(top));

  const float inverse = 1.0f / temperature;
  // Of the product instead of the quotient, relative to scores that are near the best.
  const float margin = 1e-3f + 1e-6f * fabsf(best.value);
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    float bound[4];
    bool possible = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bound[i] = scores[quad][i] * inverse + margin;
      possible |= bound[i] + kMaxGumbel >= best.value;
    }
    if (!possible) continue;
    const uint32_t id = quad_id(chunk_start, quad);
    const Philox4 words = noise.four(id);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(bound[i] + gumbel_bound(words.word[i]) >= best.value)) continue;
      best.offer(scores[quad][i] / temperature + gumbel_from_bits(words.word[i]),
                 id + static_cast<uint32_t>(i));
    }
  }
  return best.rank();
}

__global__ void __launch_bounds__(kChunkThreads, 3) choose_kernel(VerifyArgs args) {
  __shared__ Rank partial[kWarp];
  begin_overlapped();
  const int node = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
  if (node >= args.trees[batch].num_nodes) return;
  const int line = line_of(args, batch);
  const LineParams& params = args.params[line];
  const uint32_t chunk_start = blockIdx.x * 4 * kQuads * blockDim.x;
  if (has_penalty(args, params)) mark_penalised(args, line, batch, node, chunk_start);

  float scores[kQuads][4];
  score_row(args, params, batch, node).chunk(chunk_start, scores);
  Best thread_top;  // ids rise: the first of equals stays
  thread_top.id = quad_id(chunk_start, 0);
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(scores[quad][i] > thread_top.value)) continue;
      thread_top.value = scores[quad][i];
      thread_top.id = quad_id(chunk_start, quad) + static_cast<uint32_t>(i);
    }
  }
  const Rank top = block_min(rank_of(thread_top.value, thread_top.id), partial);

  Rank noisy = kNoRank;
  if (rule_of(params, args.vocab) == Rule::noise) {
    const NodeNoise noise = node_noise(args, params, line, batch, node);
    noisy = block_min(noisy_best(scores, chunk_start, top, params.temperature, noise), partial);
  }
  if (threadIdx.x == 0) {
    args.parts[node_index(args, batch, node) * gridDim.x + blockIdx.x] = {top, noisy};
  }
}

}  // namespace

void launch_choose(const VerifyArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(num_chunks(args.vocab)),
                  static_cast<unsigned>(args.max_nodes), static_cast<unsigned>(args.batch));
  launch_overlapped(choose_kernel, grid, dim3(static_cast<unsigned>(chunk_threads(args.vocab))), 0,
                    stream, args);
}

}  // namespace medusa::cuda
