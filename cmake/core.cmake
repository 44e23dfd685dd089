# medusa_core: everything that is neither Python nor a device's toolkit.

# TEMPORARY glob while the files land; becomes a list.
file(GLOB core_sources CONFIGURE_DEPENDS csrc/core/*.cpp csrc/backend/cpu/*.cpp)
file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/backend/cpu/kernels/*.cpp)

add_library(medusa_core STATIC ${core_sources})
target_include_directories(medusa_core PUBLIC csrc)
target_link_libraries(medusa_core PUBLIC Threads::Threads)
set_target_properties(medusa_core PROPERTIES LINKER_LANGUAGE CXX)

# Each kernel file is compiled once for every instruction set; run-time dispatch chooses.
function(medusa_add_kernels isa)
  if(NOT kernel_sources)
    return()
  endif()
  add_library(medusa_kernels_${isa} OBJECT ${kernel_sources})
  target_include_directories(medusa_kernels_${isa} PRIVATE csrc)
  target_compile_definitions(medusa_kernels_${isa} PRIVATE MEDUSA_ISA=${isa})
  target_compile_options(medusa_kernels_${isa} PRIVATE ${ARGN})
  target_sources(medusa_core PRIVATE $<TARGET_OBJECTS:medusa_kernels_${isa}>)
endfunction()

medusa_add_kernels(generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  medusa_add_kernels(avx2 -mavx2 -mfma -mf16c -mbmi2)
  medusa_add_kernels(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni
                     -mavx512vbmi -mfma -mf16c -mbmi2
                     # GCC 12 takes its own undefined-value intrinsics for uninitialised variables (GCC PR 105593).
                     -Wno-maybe-uninitialized)
  target_compile_definitions(medusa_core PRIVATE MEDUSA_HAVE_X86_ISAS)
endif()
