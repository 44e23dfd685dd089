// filter: the model's own token where top-k, top-p or min-p is on.
//
//   kept in this order, on z = y / T: the k greatest; then those before whose rank the mass is
//   below top_p of the total; then those with exp(z - max) >= min_p. Of the kept, argmax z + G
//   rank: (z falling, id rising); masses are integers, round(2^32 exp(z - max))
//
// Shapes    logits [N, V] f32; filtered [B, max_nodes] i32
// Traffic   4 V bytes per pass over a row, from the second-level cache: V = 131072 is 6 us at some
//           90 GB/s for one SM, and bound by about 20 instructions an id, 40 where masses are
//           summed, 0.6 us each. Passes: histogram and list, as a rule (what top-k and top-p keep
//           fits the list of 2048); a third for the noise where it does not; one for min-p alone;
//           one more per 11 bits of the rank where more than 2048 ids fall into one bin.
//           Calculated: 20 to 25 us with top-k, 35 to 40 us with top-p alone
// Launch    grid (max_nodes, B), 1024 threads (fewer where V is small); a block whose line has no
//           filter ends at once
// Exact     a histogram over max - z, which falls as the rank rises, finds the bin of the border;
//           its ids are sorted by their full rank, ties included. Counts and masses are integers,
//           so the order of the atomics cannot matter. Masses are summed in two words, because
//           shared memory adds 32 bits at once
// Source    radix selection; the rule is that of the CPU backend, double arithmetic included
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/choose.cuh"

namespace medusa::cuda {
namespace {

constexpr int kFilterThreads = 1024;
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kListSize = 2048;
constexpr float kMassRange = 23.0f;  // no mass at or below max - 23: it rounds to 0
constexpr float kBinsPerUnit = 89.0f;

struct FilterMemory {
  uint32_t count[kBins];
  uint32_t mass_low[kBins], mass_high[kBins];
  Rank list[kListSize];
  uint64_t partial[kWarp];
  uint64_t crossing_before;
  int crossing, list_size;
};

// z of every id of a row.
struct TemperedRow {
  ScoreRow row;
  float temperature, max;

  __device__ __forceinline__ int bin_of(float z) const {
    const float distance = max - z;
    return distance < kMassRange ? static_cast<int>(distance * kBinsPerUnit) : kBins - 1;
  }
  __device__ __forceinline__ uint64_t mass_of(float z) const {
    const float mass = exp_f32(z - max) * 4294967296.0f;
    return mass < 4294967296.0f ? static_cast<uint32_t>(rintf(mass)) : uint64_t{1} << 32;
  }

  // visit(id, z) for the ids id .. id + 3 of each of this thread's quads. The next quad's load is
  // under way meanwhile; unrolled further, the code would outgrow the instruction cache.
  template <class Visit>
  __device__ __forceinline__ void for_each_quad(Visit visit) const {
    const uint32_t stride = 4 * blockDim.x;
    float next[4];
    row.four(4 * threadIdx.x, next);
#pragma unroll 1
    for (uint32_t id = 4 * threadIdx.x; id < row.vocab; id += stride) {
      float z[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) z[i] = next[i];
      row.four(id + stride, next);
#pragma unroll
      for (int i = 0; i < 4; ++i) z[i] = z[i] / temperature;
      visit(id, z);
    }
  }

  // visit(id, z) for each id.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_each_quad([&](uint32_t id, const float(&z)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(id + static_cast<uint32_t>(i), z[i]);
    });
  }
};

__device__ uint64_t block_sum(uint64_t value, uint64_t* partial) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();  // of the last use
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  uint64_t sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += partial[warp];
  return sum;
}

// Finds the i with before < target <= before + value(i), where before is the sum of value(0) to
// value(i - 1): into memory.crossing and crossing_before. 0 < target <= sum of all.
template <class Value>
__device__ void find_crossing(FilterMemory& memory, int size, uint64_t target, Value value) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int share = (size + threads - 1) / threads;
  const int begin = min(thread * share, size), end = min(begin + share, size);
  uint64_t own = 0;
  for (int i = begin; i < end; ++i) own += value(i);

  uint64_t upto = own;
#pragma unroll
  for (unsigned step = 1; step < kWarp; step *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= static_cast<int>(step)) upto += below;
  }
  __syncthreads();  // of the last use
  if (lane == kWarp - 1) memory.partial[warp] = upto;
  __syncthreads();
  uint64_t before = upto - own;
  for (int i = 0; i < warp; ++i) before += memory.partial[i];

  for (int i = begin; i < end; ++i) {
    const uint64_t here = value(i);
    if (before < target && target <= before + here) {
      memory.crossing = i;
      memory.crossing_before = before;
    }
    before += here;
  }
  __syncthreads();
}

__device__ void clear_bins(FilterMemory& memory) {
  __syncthreads();  // of the last use
  for (unsigned bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    memory.count[bin] = memory.mass_low[bin] = memory.mass_high[bin] = 0;
  }
  __syncthreads();
}

__device__ __forceinline__ uint64_t mass_in(const FilterMemory& memory, int bin) {
  return uint64_t{memory.mass_high[bin]} << 32 | memory.mass_low[bin];
}

__device__ __forceinline__ void add_to_bin(FilterMemory& memory, int bin, uint64_t mass) {
  atomicAdd(&memory.count[bin], 1u);
  const auto low = static_cast<uint32_t>(mass);
  auto high = static_cast<uint32_t>(mass >> 32);
  if (low != 0 && atomicAdd(&memory.mass_low[bin], low) + low < low) ++high;  // it wrapped
  if (high != 0) atomicAdd(&memory.mass_high[bin], high);
}

// Neighbours in the order of ranks: of one bin, and with one beginning of the rank.
struct Stretch {
  int bin = 0, shift = 64;
  uint64_t beginning = 0;  // rank >> shift

  // Below 0: before the stretch; 0: in it.
  __device__ __forceinline__ int compare(int other_bin, Rank rank) const {
    if (other_bin != bin) return other_bin < bin ? -1 : 1;
    if (shift == 64) return 0;
    const uint64_t other = rank >> shift;
    return other < beginning ? -1 : other > beginning ? 1 : 0;
  }
  // The next bits of the rank, at most kDigitBits of them.
  __device__ __forceinline__ int digit_bits() const { return min(kDigitBits, shift); }
  __device__ __forceinline__ int digit(Rank rank) const {
    return static_cast<int>(rank >> (shift - digit_bits()) & ((1u << digit_bits()) - 1));
  }
  __device__ __forceinline__ void append(int digit) {
    beginning = beginning << digit_bits() | static_cast<uint64_t>(digit);
    shift -= digit_bits();
  }
};

struct Kept {
  Rank last = kNoRank;  // of all, in order
  int in_list = -1;     // they are list[0 .. in_list); -1: they are not listed
};

// How much mass may stand before an id that top-p keeps: before < top_p * total.
__device__ __forceinline__ uint64_t mass_target(double top_p, uint64_t total) {
  return static_cast<uint64_t>(ceil(top_p * static_cast<double>(total)));
}

// Keeps, of the ids up to `last`, those up to the one with which the count reaches top_k or,
// by_mass, the mass its target.
__device__ Kept select(const TemperedRow& tempered, bool by_mass, Rank last,
                       const LineParams& params, FilterMemory& memory) {
  // The coarse histogram.
  clear_bins(memory);
  uint32_t beyond = 0;  // ids of the last bin: too many for atomics
  tempered.for_each([&](uint32_t id, float z) {
    const int bin = tempered.bin_of(z);
    if (bin == kBins - 1) {
      ++beyond;
    } else if (last == kNoRank || rank_of(z, id) <= last) {
      add_to_bin(memory, bin, by_mass ? tempered.mass_of(z) : 0);
    }
  });
  if (!by_mass) {  // they have no mass
    const uint64_t sum = block_sum(beyond, memory.partial);
    if (threadIdx.x == 0) memory.count[kBins - 1] = static_cast<uint32_t>(sum);
  }
  __syncthreads();
  uint64_t target = static_cast<uint64_t>(params.top_k);
  if (by_mass) {
    uint64_t own = 0;
    for (unsigned bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      own += mass_in(memory, static_cast<int>(bin));
    }
    target = mass_target(params.top_p, block_sum(own, memory.partial));
  }

  // The stretch that holds the border, narrowed down until it fits the list.
  Stretch stretch;
  uint64_t before = 0, count_before = 0;
  uint32_t count_within = 0;
  for (bool is_coarse = true;; is_coarse = false) {
    find_crossing(memory, kBins, target - before, [&](int bin) {
      return by_mass ? mass_in(memory, bin) : uint64_t{memory.count[bin]};
    });
    const int crossing = memory.crossing;
    before += memory.crossing_before;
    count_within = memory.count[crossing];
    uint64_t own = 0;
    for (int bin = static_cast<int>(threadIdx.x); bin < crossing;
         bin += static_cast<int>(blockDim.x)) {
      own += memory.count[bin];
    }
    count_before += block_sum(own, memory.partial);
    if (is_coarse) {
      stretch.bin = crossing;
    } else {
      stretch.append(crossing);
    }
    if (count_within <= kListSize) break;

    clear_bins(memory);
    tempered.for_each([&](uint32_t id, float z) {
      const Rank rank = rank_of(z, id);
      if (stretch.compare(tempered.bin_of(z), rank) != 0 || rank > last) return;
      add_to_bin(memory, stretch.digit(rank), by_mass ? tempered.mass_of(z) : 0);
    });
    __syncthreads();
  }

  // The list, with all that comes before the stretch where there is room.
  const bool is_whole = count_before + count_within <= kListSize;
  if (threadIdx.x == 0) memory.list_size = 0;
  __syncthreads();
  tempered.for_each([&](uint32_t id, float z) {
    const int bin = tempered.bin_of(z);
    if (bin > stretch.bin) return;  // nearly all
    const Rank rank = rank_of(z, id);
    const int order = stretch.compare(bin, rank);
    if (order > 0 || (order < 0 && !is_whole) || rank > last) return;
    memory.list[atomicAdd(&memory.list_size, 1)] = rank;
  });
  __syncthreads();
  const int size = memory.list_size, padded = power_of_two(size);
  for (int i = size + static_cast<int>(threadIdx.x); i < padded;
       i += static_cast<int>(blockDim.x)) {
    memory.list[i] = kNoRank;
  }
  __syncthreads();
  block_sort(memory.list, padded);

  if (!is_whole) target -= before;
  int num_kept = static_cast<int>(target);
  if (by_mass) {
    find_crossing(memory, size, target,
                  [&](int i) { return tempered.mass_of(value_of(memory.list[i])); });
    num_kept = memory.crossing + 1;
  }
  return {memory.list[num_kept - 1], is_whole ? num_kept : -1};
}

// Top-p of the first ids of the list, which are all that is left.
__device__ Kept cut_list(const TemperedRow& tempered, int num_listed, const LineParams& params,
                         FilterMemory& memory) {
  const auto mass = [&](int i) { return tempered.mass_of(value_of(memory.list[i])); };
  uint64_t own = 0;
  for (int i = static_cast<int>(threadIdx.x); i < num_listed; i += static_cast<int>(blockDim.x)) {
    own += mass(i);
  }
  const uint64_t total = block_sum(own, memory.partial);
  find_crossing(memory, num_listed, mass_target(params.top_p, total), mass);
  return {memory.list[memory.crossing], memory.crossing + 1};
}

// Top-k, then top-p of what is left.
__device__ Kept kept_ids(const TemperedRow& tempered, const LineParams& params,
                         FilterMemory& memory) {
  const bool by_k = params.top_k > 0 && static_cast<uint32_t>(params.top_k) < tempered.row.vocab;
  const bool by_p = params.top_p < 1.0;
  Kept kept;
#pragma unroll 1  // one copy of the code
  for (int rule = by_k ? 0 : 1; rule < (by_p ? 2 : 1); ++rule) {
    const bool by_mass = rule == 1;
    kept = by_mass && kept.in_list >= 0 ? cut_list(tempered, kept.in_list, params, memory)
                                        : select(tempered, by_mass, kept.last, params, memory);
  }
  return kept;
}

struct MinP {
  double min_p;
  float max;
  float limit;  // no id further below the maximum passes: saves most of the exponentials and noise

  __device__ __forceinline__ bool may_pass(float z) const { return max - z <= limit; }
  __device__ __forceinline__ bool passes(float z) const {
    return min_p <= 0.0 || (may_pass(z) && double{exp_f32(z - max)} >= min_p);
  }
};

__device__ __forceinline__ MinP min_p_of(const LineParams& params, float max) {
  const auto min_p = static_cast<float>(params.min_p);
  return {params.min_p, max, min_p > 1e-37f ? 0.01f - log_f32(min_p) : -kLowest};
}

__device__ Best best_of_list(const FilterMemory& memory, int num_kept, const MinP& min_p,
                             const NodeNoise& noise) {
  Best best;
  for (int i = static_cast<int>(threadIdx.x); i < num_kept; i += static_cast<int>(blockDim.x)) {
    const float z = value_of(memory.list[i]);
    const uint32_t id = id_of(memory.list[i]);
    if (min_p.passes(z)) best.offer(z + noise.one(id), id);
  }
  return best;
}

// The same over the whole row, where the kept were too many to list.
__device__ Best best_of_row(const TemperedRow& tempered, Rank last, const MinP& min_p,
                            const NodeNoise& noise) {
  const float last_z = last == kNoRank ? kLowest : value_of(last);
  const uint32_t last_id = id_of(last);
  Best best;
  tempered.for_each_quad([&](uint32_t id, float(&z)[4]) {
    bool possible = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool in_order =
          z[i] > last_z || (z[i] == last_z && id + static_cast<uint32_t>(i) <= last_id);
      if (!in_order || !min_p.may_pass(z[i])) z[i] = kLowest;
      possible |= z[i] > kLowest && z[i] + kMaxGumbel >= best.value;
    }
    if (!possible) return;
    const Philox4 words = noise.four(id);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (z[i] > kLowest && z[i] + gumbel_bound(words.word[i]) >= best.value &&
          min_p.passes(z[i])) {
        best.offer(z[i] + gumbel_from_bits(words.word[i]), id + static_cast<uint32_t>(i));
      }
    }
  });
  return best;
}

__global__ void __launch_bounds__(kFilterThreads) filter_kernel(VerifyArgs args, int num_parts) {
  __shared__ FilterMemory memory;
  begin_overlapped();
  const int node = static_cast<int>(blockIdx.x), batch = static_cast<int>(blockIdx.y);
  if (node >= args.trees[batch].num_nodes) return;
  const int line = line_of(args, batch);
  const LineParams& params = args.params[line];
  if (rule_of(params, args.vocab) != Rule::filtered) return;

  const int64_t index = node_index(args, batch, node);
  TemperedRow tempered{score_row(args, params, batch, node), params.temperature, 0.0f};
  tempered.max =
      value_of(merge_parts(args.parts + index * num_parts, num_parts).top) / params.temperature;
  if (!is_finite(tempered.max)) return;  // the walk does not ask

  const Kept kept = kept_ids(tempered, params, memory);
  const MinP min_p = min_p_of(params, tempered.max);
  const NodeNoise noise = node_noise(args, params, line, batch, node);
  const Best best = kept.in_list >= 0 ? best_of_list(memory, kept.in_list, min_p, noise)
                                      : best_of_row(tempered, kept.last, min_p, noise);
  const Rank rank = block_min(best.rank(), memory.partial);
  if (threadIdx.x == 0) args.filtered[index] = static_cast<int32_t>(id_of(rank));
}

}  // namespace

void launch_filter(const VerifyArgs& args, cudaStream_t stream) {
  const int64_t warps = (args.vocab + 4 * kQuads * kWarp - 1) / (4 * kQuads * kWarp);
  const int threads =
      warps < kFilterThreads / kWarp ? static_cast<int>(warps) * kWarp : kFilterThreads;
  launch_overlapped(filter_kernel,
                    dim3(static_cast<unsigned>(args.max_nodes), static_cast<unsigned>(args.batch)),
                    dim3(static_cast<unsigned>(threads)), 0, stream, args, num_chunks(args.vocab));
}

}  // namespace medusa::cuda
