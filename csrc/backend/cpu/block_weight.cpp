// Source    the formats: GGUF (ggml-quants), q8_0, q4_0, q4_1, q4_k
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/block_weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/kernels/block_layout.h"

namespace medusa::cpu {
namespace {

constexpr int kSuperGroups = 8;  // groups of a q4_k block

float widen_f16(const Kernels& kernels, const uint8_t* p) {
  float value;
  kernels.convert(p, DType::f16, &value, DType::f32, 1);
  return value;
}

void put_f16(const Kernels& kernels, uint8_t* p, float value) {
  kernels.convert(&value, DType::f32, p, DType::f16, 1);
}

bool is_finite_f16(const uint8_t* p) { return (p[1] & 0x7c) != 0x7c; }

// One column of one tile.
template <DType kType>
class Column {
  using Tile = BlockTile<kType>;

 public:
  Column(uint8_t* tile, int column) : tile_(tile), column_(column) {}

  uint8_t* scale(int group) const { return tile_ + 2 * (group * kColumns + column_); }
  uint8_t* minimum(int group) const {
    return tile_ + 2 * ((Tile::kGroups + group) * kColumns + column_);
  }
  uint8_t* super_scale() const { return tile_ + 2 * column_; }
  uint8_t* super_minimum() const { return tile_ + 2 * (kColumns + column_); }
  uint8_t& small_scale(int group) const { return tile_[4 * kColumns + group * kColumns + column_]; }
  uint8_t& small_minimum(int group) const {
    return tile_[4 * kColumns + (kSuperGroups + group) * kColumns + column_];
  }

  void put(int group, int k, uint8_t value) const {
    uint8_t& byte = at(group, k);
    if constexpr (Tile::kNibbles) {
      value = group % 2 == 0 ? static_cast<uint8_t>((byte & 0xf0) | value)
                             : static_cast<uint8_t>((byte & 0x0f) | value << 4);
    }
    byte = value;
  }
  int get(int group, int k) const {
    const uint8_t byte = at(group, k);
    if constexpr (!Tile::kNibbles) return byte;
    return group % 2 == 0 ? byte & 15 : byte >> 4;
  }

 private:
  uint8_t& at(int group, int k) const {
    const int64_t bytes = kQuads * kQuadBytes;  // of one group, or of two in nibbles
    const int64_t index = Tile::kNibbles ? group / 2 : group;
    return tile_[Tile::kScaleBytes + index * bytes + k / 4 * kQuadBytes + 4 * column_ + k % 4];
  }

  uint8_t* tile_;
  int column_;
};

// The 6-bit scale and minimum of group j of a q4_k block: 12 bytes hold the low groups' six bits,
// and in their two highest bits what the high groups' four lack.
void unpack_q4_k(const uint8_t* packed, int j, uint8_t* scale, uint8_t* minimum) {
  if (j < 4) {
    *scale = packed[j] & 63;
    *minimum = packed[j + 4] & 63;
  } else {
    *scale = static_cast<uint8_t>((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
    *minimum = static_cast<uint8_t>((packed[j + 4] >> 4) | (packed[j] >> 6) << 4);
  }
}

// Value k of a group whose 16 bytes hold 32 nibbles, the second half high.
uint8_t nibble(const uint8_t* bytes, int k) {
  return k < 16 ? bytes[k] & 15 : static_cast<uint8_t>(bytes[k - 16] >> 4);
}

template <DType kType>
bool place(const uint8_t* blocks, int64_t num_inputs, uint8_t* tiles, int column) {
  using Tile = BlockTile<kType>;
  bool finite = true;
  for (int64_t k = 0; k < num_inputs; k += block_elements(kType), blocks += block_bytes(kType)) {
    const Column<kType> to(tiles + k / Tile::kInputs * Tile::kBytes, column);
    const int group = static_cast<int>(k % Tile::kInputs) / kGroup;
    finite = finite && is_finite_f16(blocks) && (!Tile::kHasMinimum || is_finite_f16(blocks + 2));
    if constexpr (kType == DType::q4_k) {
      std::memcpy(to.super_scale(), blocks, 2);
      std::memcpy(to.super_minimum(), blocks + 2, 2);
      for (int j = 0; j < kSuperGroups; ++j) {
        unpack_q4_k(blocks + 4, j, &to.small_scale(j), &to.small_minimum(j));
        const uint8_t* values = blocks + 16 + j / 2 * kGroup;
        for (int i = 0; i < kGroup; ++i) {
          to.put(j, i, j % 2 == 0 ? values[i] & 15 : static_cast<uint8_t>(values[i] >> 4));
        }
      }
      continue;
    }
    std::memcpy(to.scale(group), blocks, 2);
    if constexpr (kType == DType::q4_1) std::memcpy(to.minimum(group), blocks + 2, 2);
    const uint8_t* values = blocks + (kType == DType::q4_1 ? 4 : 2);
    for (int i = 0; i < kGroup; ++i) {
      to.put(group, i,
             kType == DType::q8_0 ? static_cast<uint8_t>(values[i] ^ 128) : nibble(values, i));
    }
  }
  return finite;
}

template <DType kType>
void read(const Kernels& kernels, const uint8_t* tiles, int64_t num_inputs, int column,
          float* out) {
  using Tile = BlockTile<kType>;
  for (int64_t k = 0; k < num_inputs; k += kGroup) {
    // Only reads.
    const Column<kType> from(const_cast<uint8_t*>(tiles) + k / Tile::kInputs * Tile::kBytes,
                             column);
    const int group = static_cast<int>(k % Tile::kInputs) / kGroup;
    float scale, minimum = 0.0f;
    if constexpr (kType == DType::q4_k) {
      scale = widen_f16(kernels, from.super_scale()) * from.small_scale(group);
      minimum = -(widen_f16(kernels, from.super_minimum()) * from.small_minimum(group));
    } else {
      scale = widen_f16(kernels, from.scale(group));
      if constexpr (kType == DType::q4_1) minimum = widen_f16(kernels, from.minimum(group));
    }
    constexpr int kZero = kType == DType::q8_0 ? 128 : kType == DType::q4_0 ? 8 : 0;
    for (int i = 0; i < kGroup; ++i) {
      const auto q = static_cast<float>(from.get(group, i) - kZero);
      out[k + i] = Tile::kHasMinimum ? std::fma(scale, q, minimum) : scale * q;
    }
  }
}

// Its scale says that a group holds a value that is none.
bool put_nan_if_not_finite(const float* x, uint8_t* block) {
  float poison = 0.0f;
  for (int i = 0; i < kGroup; ++i) poison += x[i] * 0.0f;
  if (poison == 0.0f) return false;
  block[0] = 0x00;
  block[1] = 0x7e;
  return true;
}

float inverse_of(float d) {  // 0 for a group so small that its scale is none
  const float inverse = 1.0f / d;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

// NaN, of a group whose range is beyond f32 and its scale therefore none, is 0.
uint8_t limited(float q) { return static_cast<uint8_t>(q > 0.0f ? std::min(q, 15.0f) : 0.0f); }

void quantise_q8_0(const Kernels& kernels, const float* x, uint8_t* block) {
  float most = 0.0f;
  for (int i = 0; i < kGroup; ++i) most = std::max(most, std::fabs(x[i]));
  const float d = most / 127.0f, inverse = inverse_of(d);
  put_f16(kernels, block, d);
  for (int i = 0; i < kGroup; ++i) {
    const float q = std::clamp(std::round(x[i] * inverse), -127.0f, 127.0f);
    block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(q));
  }
}

void quantise_q4_0(const Kernels& kernels, const float* x, uint8_t* block) {
  const float most = *std::max_element(
      x, x + kGroup, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
  const float d = most / -8.0f, inverse = inverse_of(d);
  put_f16(kernels, block, d);
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint8_t low = limited(std::floor(x[i] * inverse + 8.5f));
    const uint8_t high = limited(std::floor(x[i + kGroup / 2] * inverse + 8.5f));
    block[2 + i] = static_cast<uint8_t>(low | high << 4);
  }
}

void quantise_q4_1(const Kernels& kernels, const float* x, uint8_t* block) {
  const auto [least, most] = std::minmax_element(x, x + kGroup);
  const float m = *least, d = (*most - m) / 15.0f, inverse = inverse_of(d);
  put_f16(kernels, block, d);
  put_f16(kernels, block + 2, m);
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint8_t low = limited(std::floor((x[i] - m) * inverse + 0.5f));
    const uint8_t high = limited(std::floor((x[i + kGroup / 2] - m) * inverse + 0.5f));
    block[4 + i] = static_cast<uint8_t>(low | high << 4);
  }
}

// body(constant) with the type as a constant.
template <class Body>
auto by_type(DType dtype, const Body& body) {
  if (dtype == DType::q8_0) return body.template operator()<DType::q8_0>();
  if (dtype == DType::q4_0) return body.template operator()<DType::q4_0>();
  if (dtype == DType::q4_1) return body.template operator()<DType::q4_1>();
  return body.template operator()<DType::q4_k>();
}

}  // namespace

int64_t tiles_bytes(DType dtype, int64_t num_inputs) {
  return by_type(dtype, [&]<DType kType>() -> int64_t {
    using Tile = BlockTile<kType>;
    return (num_inputs + Tile::kInputs - 1) / Tile::kInputs * Tile::kBytes;
  });
}

bool place_row(DType dtype, const uint8_t* blocks, int64_t num_inputs, uint8_t* tiles, int column) {
  return by_type(dtype,
                 [&]<DType kType>() { return place<kType>(blocks, num_inputs, tiles, column); });
}

void read_row(const Kernels& kernels, DType dtype, const uint8_t* tiles, int64_t num_inputs,
              int column, float* out) {
  by_type(dtype, [&]<DType kType>() { read<kType>(kernels, tiles, num_inputs, column, out); });
}

void quantise_row(const Kernels& kernels, DType dtype, const float* x, int64_t num_inputs,
                  uint8_t* blocks) {
  const auto quantise = dtype == DType::q8_0   ? quantise_q8_0
                        : dtype == DType::q4_0 ? quantise_q4_0
                                               : quantise_q4_1;
  for (int64_t k = 0; k < num_inputs; k += kGroup, blocks += block_bytes(dtype)) {
    if (!put_nan_if_not_finite(x + k, blocks)) quantise(kernels, x + k, blocks);
  }
}

}  // namespace medusa::cpu
