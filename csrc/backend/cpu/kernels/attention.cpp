// tree_attention of one tile: up to 16 queries (row, head) of one sequence that share a kv head.
//
//   s[p] = scale * q . K[p];   w = exp(s - max s);   out = sum_p w[p] V[p] / sum_p w[p]
//   over the logical positions p in [first, position] of the query
//
// Shapes    K block of a (page, head) [D/2][64][2] bf16 or [D][64] f16 | f32: a lane is a key
//           V block [64][D]
// Traffic   K and V of the visible pages once for every tile; 4 D flops for each (query, key). The
//           parts may be shared out: scores by pages, the weighted sum by columns of V
// Bits      Everything depends on (query position, key position) alone. A score is one lane of
//           dot_block. Scores lie by logical position: slots below prefix_len are their own,
//           ancestors move down to prefix_len + rank. The sum of weights takes lane p mod 16 from
//           a multiple of 16 on; the weighted sum of V takes p rising one by one. A tile shares
//           loads, never sums.
// Masked    K of a slot that a query does not see may be NaN: its score has a lane of its own and
//           is overwritten or never read. V of such a slot is never multiplied.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/kernels/dot_block.h"
#include "backend/cpu/kernels/kernels.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

#if defined(MEDUSA_SIMD_AVX512)
constexpr int kScoreQueries = 8, kScoreVectors = 2;
constexpr int kValueQueries = 4, kValueVectors = 4;
#elif defined(MEDUSA_SIMD_AVX2)
constexpr int kScoreQueries = 4, kScoreVectors = 1;
constexpr int kValueQueries = 4, kValueVectors = 1;
#else
constexpr int kScoreQueries = 2, kScoreVectors = 1;
constexpr int kValueQueries = 2, kValueVectors = 1;
#endif

// Calls f.template operator()<m>() with m = n, 1 <= n <= kMax.
template <int kMax, class F>
MEDUSA_INLINE void with_constant(int n, F f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, f);
  }
  f.template operator()<kMax>();
}

// Scores of M queries against one K block, unscaled: out[m * stride + key]. The block at `next` is
// fetched meanwhile.
template <class T, int M>
void score_page(const T* keys, const T* next, const typename Operand<T>::X* q, int D, float* out,
                int64_t stride) {
  constexpr int C = kScoreVectors;
  constexpr int kStep = Operand<T>::kStep;
  constexpr int64_t kStepBytes = C * kLanes * kStep * static_cast<int64_t>(sizeof(T));
  for (int key = 0; key < kPage; key += C * kLanes) {
    V sum[M][C];
    const char* fetched =
        reinterpret_cast<const char*>(next) + key / kLanes / C * (D / kStep) * kStepBytes;
    dot_block<T, M, C>(keys + key * kStep, kPage * kStep, q, D, sum, {fetched, kStepBytes});
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < C; ++c) store(out + m * stride + key + c * kLanes, sum[m][c]);
    }
  }
}

// sum[m][0..16 C) += weights[m * stride + i] * values[i * D + 0..16 C) for i in [0, count). The
// last vector may be partial: it holds `tail` lanes, 16 if it is whole. The same rows at `next` are
// fetched meanwhile.
template <class T, int M, int C, bool kWhole>
void add_values(const T* values, const T* next, int D, int count, const float* weights,
                int64_t stride, float* sum, int64_t sum_stride, int64_t tail) {
  V total[M][C];
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) total[m][c] = load(sum + m * sum_stride + c * kLanes);
  }
  for (int i = 0; i < count; ++i, values += D, next += D) {
    V value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      if (c * kLanes * sizeof(T) % 64 == 0) __builtin_prefetch(next + c * kLanes, 0, 2);
      value[c] =
          kWhole || c + 1 < C ? load(values + c * kLanes) : load_some(values + c * kLanes, tail);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V weight = splat(weights[m * stride + i]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[m][c] = fma(weight, value[c], total[m][c]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) store(sum + m * sum_stride + c * kLanes, total[m][c]);
  }
}

// Columns [first, last) of the weighted sum.
struct Columns {
  int first, last;
};

// The same for num_queries queries and some columns, of which only the last of all D may leave a
// vector unfilled.
template <class T>
void add_slots(const T* values, const T* next, int D, Columns columns, int count,
               const float* weights, int64_t stride, float* sum, int64_t sum_stride,
               int num_queries) {
  for (int query = 0; query < num_queries; query += kValueQueries) {
    const int m = num_queries - query < kValueQueries ? num_queries - query : kValueQueries;
    with_constant<kValueQueries>(m, [&]<int M>() {
      const float* w = weights + query * stride;
      float* s = sum + query * sum_stride;
      const int end = columns.last;
      int d = columns.first;
      for (; d + kValueVectors * kLanes <= end; d += kValueVectors * kLanes) {
        add_values<T, M, kValueVectors, true>(values + d, next + d, D, count, w, stride, s + d,
                                              sum_stride, kLanes);
      }
      constexpr int kHalf = kValueVectors > 1 ? kValueVectors / 2 : 1;
      for (; d + kHalf * kLanes <= end; d += kHalf * kLanes) {
        add_values<T, M, kHalf, true>(values + d, next + d, D, count, w, stride, s + d, sum_stride,
                                      kLanes);
      }
      for (; d + kLanes <= end; d += kLanes) {
        add_values<T, M, 1, true>(values + d, next + d, D, count, w, stride, s + d, sum_stride,
                                  kLanes);
      }
      if (d < end) {
        add_values<T, M, 1, false>(values + d, next + d, D, count, w, stride, s + d, sum_stride,
                                   end - d);
      }
    });
  }
}

// Positions [first, last) of the prefix, where slot and position are one.
template <class T>
void add_prefix(const AttentionTile& tile, Columns columns, int first, int last,
                const float* weights, float* sum, int64_t sum_stride, int num_queries) {
  while (first < last) {
    const int page = first / kPage, end = (page + 1) * kPage < last ? (page + 1) * kPage : last;
    const int64_t offset = int64_t{first % kPage} * tile.head_dim;
    const auto* block = static_cast<const T*>(tile.v_pages[page]);
    const auto* next = end < last ? static_cast<const T*>(tile.v_pages[page + 1]) : block;
    add_slots(block + offset, next + offset, tile.head_dim, columns, end - first, weights + first,
              tile.score_stride, sum, sum_stride, num_queries);
    first = end;
  }
}

// Turns scores over [first, last] into weights in place; returns their sum.
float softmax(float* scores, int first, int last, float scale) {
  const int begin = first / kLanes * kLanes;
  const int64_t end = (int64_t{last} / kLanes + 1) * kLanes;
  const V factor = splat(scale);
  V greatest = splat(-__builtin_inff());
  for (int64_t p = begin; p < end; p += kLanes) {
    V score = mul(load(scores + p), factor);
    if (p < first ||
        p + kLanes - 1 > last) {  // lanes outside hold whatever the cache held: cut them off
      float lanes[kLanes];
      store(lanes, score);
      for (int i = 0; i < kLanes; ++i) {
        if (p + i < first || p + i > last) lanes[i] = -__builtin_inff();
      }
      score = load(lanes);
    }
    store(scores + p, score);
    greatest = max(greatest, score);
  }
  const V shift = splat(max_of(greatest));
  V total = zero();
  for (int64_t p = begin; p < end; p += kLanes) {
    const V weight = exp(sub(load(scores + p), shift));
    store(scores + p, weight);
    total = add(total, weight);
  }
  return sum_of(total);
}

// Calls f(rank, bit) for every set bit in rising order.
template <class F>
MEDUSA_INLINE void for_each_ancestor(const uint64_t* words, F f) {
  int rank = 0;
  for (int word = 0; word < kMaxAncestorWords; ++word) {
    for (uint64_t bits = words[word]; bits != 0; bits &= bits - 1)
      f(rank++, word * 64 + __builtin_ctzll(bits));
  }
}

template <class T>
void arrange_of(const AttentionTile& tile) {
  using X = typename Operand<T>::X;
  const int D = tile.head_dim, n = tile.num_queries;
  for (int i = 0; i < n; i += kScoreQueries) {
    const int m = n - i < kScoreQueries ? n - i : kScoreQueries;
    interleave<X, Operand<T>::kStep>([&](int query) { return tile.q[i + query]; }, m, 0, D,
                                     static_cast<X*>(tile.queries) + int64_t{i} * D);
  }
}

// By slot.
template <class T>
void scores_of(const AttentionTile& tile, int first_page, int last_page) {
  using X = typename Operand<T>::X;
  const int D = tile.head_dim, n = tile.num_queries;
  const auto* q = static_cast<const X*>(tile.queries);
  for (int page = first_page; page < last_page; ++page) {
    if (tile.k_pages[page] == nullptr) continue;
    const auto* keys = static_cast<const T*>(tile.k_pages[page]);
    const bool more = page + 1 < tile.num_pages && tile.k_pages[page + 1] != nullptr;
    const auto* next = more ? static_cast<const T*>(tile.k_pages[page + 1]) : keys;
    for (int i = 0; i < n; i += kScoreQueries) {
      const int m = n - i < kScoreQueries ? n - i : kScoreQueries;
      float* scores = tile.scores + i * tile.score_stride + int64_t{page} * kPage;
      with_constant<kScoreQueries>(m, [&]<int M>() {
        score_page<T, M>(keys, next, q + int64_t{i} * D, D, scores, tile.score_stride);
      });
    }
  }
}

template <class T>
void values_of(const AttentionTile& tile, Columns columns) {
  const int D = tile.head_dim, n = tile.num_queries;
  const int64_t sum_stride = (D + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < n * sum_stride; ++i) tile.values[i] = 0.0f;

  // Positions that all queries see in the prefix together, what lies before and behind one by one.
  int common_first = 0, common_last = tile.prefix_len[0];
  for (int i = 0; i < n; ++i) {
    if (tile.first[i] > common_first) common_first = tile.first[i];
    if (tile.prefix_len[i] < common_last) common_last = tile.prefix_len[i];
  }
  const bool shared = common_first < common_last;
  for (int i = 0; i < n; ++i) {
    const int last = shared ? common_first : tile.prefix_len[i];
    add_prefix<T>(tile, columns, tile.first[i], last, tile.scores + i * tile.score_stride,
                  tile.values + i * sum_stride, sum_stride, 1);
  }
  if (shared) {
    add_prefix<T>(tile, columns, common_first, common_last, tile.scores, tile.values, sum_stride,
                  n);
  }
  for (int i = 0; i < n; ++i) {
    const float* weights = tile.scores + i * tile.score_stride;
    float* sum = tile.values + i * sum_stride;
    if (shared) {
      add_prefix<T>(tile, columns, common_last, tile.prefix_len[i], weights, sum, sum_stride, 1);
    }
    for_each_ancestor(tile.ancestors[i], [&](int rank, int bit) {
      const int position = tile.prefix_len[i] + rank, slot = tile.prefix_len[i] + bit;
      if (position < tile.first[i]) return;
      const T* values =
          static_cast<const T*>(tile.v_pages[slot / kPage]) + int64_t{slot % kPage} * D;
      add_slots(values, values, D, columns, 1, weights + position, tile.score_stride, sum,
                sum_stride, 1);
    });

    const V inverse = splat(1.0f / tile.totals[i]);
    for (int d = columns.first; d < columns.last; d += kLanes) {
      const V value = mul(load(sum + d), inverse);
      if (tile.out_bf16) {
        store_some(static_cast<Bf16*>(tile.out[i]) + d, value, columns.last - d);
      } else {
        store_some(static_cast<float*>(tile.out[i]) + d, value, columns.last - d);
      }
    }
  }
}

}  // namespace

void attention_arrange(const AttentionTile& tile) {
  if (tile.dtype == DType::bf16) return arrange_of<Bf16>(tile);
  if (tile.dtype == DType::f16) return arrange_of<F16>(tile);
  arrange_of<float>(tile);
}

void attention_scores(const AttentionTile& tile, int first_page, int last_page) {
  if (tile.dtype == DType::bf16) return scores_of<Bf16>(tile, first_page, last_page);
  if (tile.dtype == DType::f16) return scores_of<F16>(tile, first_page, last_page);
  scores_of<float>(tile, first_page, last_page);
}

// Ancestors go down to their logical positions first: rank <= bit, so none is overwritten before it
// moves.
void attention_softmax(const AttentionTile& tile) {
  for (int i = 0; i < tile.num_queries; ++i) {
    float* scores = tile.scores + i * tile.score_stride;
    float* tree = scores + tile.prefix_len[i];
    for_each_ancestor(tile.ancestors[i], [&](int rank, int bit) { tree[rank] = tree[bit]; });
    tile.totals[i] = softmax(scores, tile.first[i], tile.position[i], tile.scale);
  }
}

void attention_values(const AttentionTile& tile, int first_column, int last_column) {
  const Columns columns{first_column, last_column};
  if (tile.dtype == DType::bf16) return values_of<Bf16>(tile, columns);
  if (tile.dtype == DType::f16) return values_of<F16>(tile, columns);
  values_of<float>(tile, columns);
}

}  // namespace medusa::cpu::MEDUSA_ISA
