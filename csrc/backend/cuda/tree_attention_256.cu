// tree_attention of head sizes up to 256.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/tree_attention_kernel.h"

namespace medusa::cuda {

template void launch_tree_attention<__half, 256>(const AttentionArgs&, bool, int64_t, int,
                                                 cudaStream_t);
template void launch_tree_attention<__nv_bfloat16, 256>(const AttentionArgs&, bool, int64_t, int,
                                                        cudaStream_t);

}  // namespace medusa::cuda
