// Tensor-core pieces of tree_attention: blocks of 64 slots in shared memory, scores of 16 queries.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "backend/cuda/gpu.h"
#include "backend/cuda/reduce.h"
#include "backend/cuda/tree_attention_rows.h"

namespace medusa::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarp;

// Two f32 to a pair of T, the first in the low half; and back.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162> pair;
  if constexpr (std::is_same_v<T, __half>) {
    pair = __floats2half2_rn(low, high);
  } else {
    pair = __floats2bfloat162_rn(low, high);
  }
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return make_float2(__half2float(__ushort_as_half(static_cast<uint16_t>(bits))),
                       __half2float(__ushort_as_half(static_cast<uint16_t>(bits >> 16))));
  } else {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
  }
}

// A block of rows of kD 16-bit elements in shared memory, 16-byte chunks swapped so that the eight
// rows of a matrix fall into different banks.
template <int kD>
struct Block {
  static constexpr int kChunks = kD / 8, kRowBytes = kD * 2;
  static constexpr int kBytes = kPageTokens * kRowBytes;

  __device__ static char* chunk(char* block, int row, int chunk) {
    return block + row * kRowBytes + ((chunk & ~7) | ((chunk ^ row) & 7)) * 16;
  }

  // chunk(block, row, c + steps) from at = chunk(block, row, c); c < 2, steps even.
  __device__ static char* moved(char* at, int steps) {
    return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(at) ^ ((steps & 7) * 16)) +
           (steps & ~7) * 16;
  }

  // Starts the copy of a [64, head_dim] block; zeros in the columns that it lacks, in rows before
  // first_row (nobody sees them, and 0 * NaN would be NaN), and all over where `from` is null.
  // `readable`: any address that cp_async16 takes.
  __device__ static void load(char* to, const char* from, int head_dim, int first_row,
                              const char* readable) {
    const int column = static_cast<int>(threadIdx.x) % kChunks, row_bytes = head_dim * 2;
    const bool wanted = from != nullptr && column * 16 < row_bytes;
#pragma unroll 2
    for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kPageTokens;
         row += kAttentionThreads / kChunks) {
      const bool valid = wanted && row >= first_row;
      cp_async16(chunk(to, row, column), valid ? from + row * row_bytes + column * 16 : readable,
                 valid);
    }
  }
};

// Sixteen queries as operand of the tensor cores: in registers, or in shared memory where those
// would not do.
template <int kD>
struct Queries {
  static constexpr bool kKept = kD <= 128;
  uint32_t kept[kKept ? kD / 16 : 1][4];
  char* rows;  // block of queries
  int first_row;

  // After the block of queries is there.
  __device__ void fetch(char* block, int row) {
    rows = block;
    first_row = row;
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) read(k, kept[k]);
    }
  }
  __device__ __forceinline__ void get(int k, uint32_t (&a)[4]) const {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[k][i];
    } else {
      read(k, a);
    }
  }

 private:
  __device__ __forceinline__ void read(int k, uint32_t (&a)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    ldmatrix_x4<false>(a, Block<kD>::chunk(rows, first_row + lane % 16, 2 * k + lane / 16));
  }
};

// s[n] += the products of 16 queries and the keys first_key + 8 n .. + 8, as mma_16816 lays them
// out. The sum over D runs in steps of 16 in rising order, for a key at any place of any block.
template <class T, int kD, int kTiles>
__device__ __forceinline__ void add_scores(const Queries<kD>& queries, char* keys, int first_key,
                                           float (&s)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  char* first = Block<kD>::chunk(keys, first_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[4];
    queries.get(k, a);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4<false>(b, Block<kD>::moved(first, 2 * k) + 8 * n * Block<kD>::kRowBytes);
      mma_16816<T>(s[n], a, b[0], b[1]);
      mma_16816<T>(s[n + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace medusa::cuda
