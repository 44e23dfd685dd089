// The launchers of tree_attention's kernels, one file for each number of columns.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/cuda/tree_attention_rows.h"

namespace medusa::cuda {

// walk, num_items: of the plan; at most so many items.
template <class T, int kD>
void launch_tree_attention(const AttentionArgs& args, bool walk, int64_t num_items, int num_sms,
                           cudaStream_t stream);

void launch_tree_attention_f32(const AttentionArgs& args, cudaStream_t stream);

}  // namespace medusa::cuda
