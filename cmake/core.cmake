# medusa_core: everything that is neither Python nor a device's toolkit.

set(medusa_core_sources
    csrc/core/backend.cpp
    csrc/core/config.cpp
    csrc/core/forward.cpp
    csrc/core/guess_tree.cpp
    csrc/core/head_runner.cpp
    csrc/core/json.cpp
    csrc/core/load_model.cpp
    csrc/core/medusa_drafter.cpp
    csrc/core/model.cpp
    csrc/core/ngrams.cpp
    csrc/core/pages.cpp
    csrc/core/prompt_lookup.cpp
    csrc/core/resident_loop.cpp
    csrc/core/safetensors.cpp
    csrc/core/sampling.cpp
    csrc/core/scheduler.cpp
    csrc/core/score.cpp
    csrc/core/session.cpp
    csrc/core/tensor.cpp
    csrc/core/tree.cpp
    csrc/backend/cpu/attention.cpp
    csrc/backend/cpu/block_weight.cpp
    csrc/backend/cpu/cache.cpp
    csrc/backend/cpu/choose.cpp
    csrc/backend/cpu/cpu_backend.cpp
    csrc/backend/cpu/isa.cpp
    csrc/backend/cpu/limits.cpp
    csrc/backend/cpu/linear.cpp
    csrc/backend/cpu/memory.cpp
    csrc/backend/cpu/rope.cpp
    csrc/backend/cpu/thread_pool.cpp
    csrc/backend/cpu/weight.cpp
    csrc/backend/make_backend.cpp)

# Each of these is compiled once for every instruction set; run-time dispatch chooses.
set(medusa_kernel_sources
    csrc/backend/cpu/kernels/attention.cpp
    csrc/backend/cpu/kernels/block_linear.cpp
    csrc/backend/cpu/kernels/choose.cpp
    csrc/backend/cpu/kernels/linear.cpp
    csrc/backend/cpu/kernels/row_ops.cpp
    csrc/backend/cpu/kernels/table.cpp
    csrc/backend/cpu/kernels/top_k.cpp)

add_library(medusa_core STATIC ${medusa_core_sources})
target_include_directories(medusa_core PUBLIC csrc)
target_link_libraries(medusa_core PUBLIC Threads::Threads PRIVATE ${CMAKE_DL_LIBS})

function(medusa_add_kernels isa)
  add_library(medusa_kernels_${isa} OBJECT ${medusa_kernel_sources})
  target_include_directories(medusa_kernels_${isa} PRIVATE csrc)
  target_compile_definitions(medusa_kernels_${isa} PRIVATE MEDUSA_ISA=${isa})
  target_compile_options(medusa_kernels_${isa} PRIVATE ${ARGN})
  target_sources(medusa_core PRIVATE $<TARGET_OBJECTS:medusa_kernels_${isa}>)
endfunction()

medusa_add_kernels(generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  medusa_add_kernels(avx2 -mavx2 -mfma -mf16c -mbmi2)
  medusa_add_kernels(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni
                     -mfma -mf16c -mbmi2
                     # GCC 12 takes its own undefined-value intrinsics for uninitialised variables (GCC PR 105593).
                     $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized -Wno-uninitialized>)
  target_compile_definitions(medusa_core PRIVATE MEDUSA_HAVE_X86_ISAS)
endif()
