// The table of this instruction set's kernels.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/kernels/kernels.h"

#define MEDUSA_JOIN_(a, b) a##b
#define MEDUSA_JOIN(a, b) MEDUSA_JOIN_(a, b)
#define MEDUSA_TEXT_(a) #a
#define MEDUSA_TEXT(a) MEDUSA_TEXT_(a)

namespace medusa::cpu {
namespace MEDUSA_ISA {

int tile_rows(DType);
int64_t arranged_bytes(DType, int64_t);
void arrange_rows(DType, const void*, int64_t, int64_t, Span, void*);
void linear(const LinearTask&);
void attention_arrange(const AttentionTile&);
void attention_scores(const AttentionTile&, int, int);
void attention_softmax(const AttentionTile&);
void attention_values(const AttentionTile&, int, int);
void rms_norm(const float*, const float*, float, int64_t, void*, bool);
void silu_gate(const float*, const float*, int64_t, void*, bool);
void gelu_gate(const float*, const float*, int64_t, void*, bool);
void gelu_tanh_gate(const float*, const float*, int64_t, void*, bool);
void residual_silu(const float*, float*, int64_t, void*, bool);
void rotate(float*, const float*, const float*, int64_t);
void top_k(const float*, int64_t, int, int32_t*, float*);
int64_t greatest(const float*, int64_t);
void noisy_block(const NoisyRow&, int64_t, float, NoisyBlock&);
int64_t gather(const float*, int64_t, float, float, int32_t*, float*);
void masses(const float*, int64_t, float, uint64_t*);
uint64_t total_mass(const float*, int64_t, float, float);
void convert(const void*, DType, void*, DType, int64_t);

}  // namespace MEDUSA_ISA

const Kernels& MEDUSA_JOIN(kernels_, MEDUSA_ISA)() {
  static constexpr Kernels kTable{
      .name = MEDUSA_TEXT(MEDUSA_ISA),
      .tile_rows = MEDUSA_ISA::tile_rows,
      .arranged_bytes = MEDUSA_ISA::arranged_bytes,
      .arrange_rows = MEDUSA_ISA::arrange_rows,
      .linear = MEDUSA_ISA::linear,
      .attention_arrange = MEDUSA_ISA::attention_arrange,
      .attention_scores = MEDUSA_ISA::attention_scores,
      .attention_softmax = MEDUSA_ISA::attention_softmax,
      .attention_values = MEDUSA_ISA::attention_values,
      .rms_norm = MEDUSA_ISA::rms_norm,
      .silu_gate = MEDUSA_ISA::silu_gate,
      .gelu_gate = MEDUSA_ISA::gelu_gate,
      .gelu_tanh_gate = MEDUSA_ISA::gelu_tanh_gate,
      .residual_silu = MEDUSA_ISA::residual_silu,
      .rotate = MEDUSA_ISA::rotate,
      .top_k = MEDUSA_ISA::top_k,
      .greatest = MEDUSA_ISA::greatest,
      .noisy_block = MEDUSA_ISA::noisy_block,
      .gather = MEDUSA_ISA::gather,
      .masses = MEDUSA_ISA::masses,
      .total_mass = MEDUSA_ISA::total_mass,
      .convert = MEDUSA_ISA::convert,
  };
  return kTable;
}

}  // namespace medusa::cpu
