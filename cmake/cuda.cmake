# The CUDA backend: a library of its own, loaded on first use, so that everything else runs on a
# machine without a driver. libmedusa_cuda.so is for GPUs. libmedusa_cuda_emulated.so is the same
# sources for the host compiler, over the emulator in tests/emulator, and only for tests.

set(MEDUSA_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO (where nvcc works), ON or OFF")
set_property(CACHE MEDUSA_CUDA PROPERTY STRINGS AUTO ON OFF)
option(MEDUSA_CUDA_EMULATED "Build the CUDA backend for the host, for tests" OFF)

set(medusa_cuda_sources
    cache.cu
    choose.cu
    cuda_backend.cpp
    filter.cu
    linear.cu
    resident.cpp
    rope.cu
    row_ops.cu
    runtime.cpp
    step_state.cu
    top_k.cu
    tree_attention.cu
    tree_attention_128.cu
    tree_attention_256.cu
    tree_attention_64.cu
    tree_attention_f32.cu
    typical.cu
    verify.cu
    weight.cu)
list(TRANSFORM medusa_cuda_sources PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/csrc/backend/cuda/)

# medusa_add_plugin(NAME SOURCES...): a library beside the Python module or at the top of the build
# folder, where make_backend looks for it. It shows only what make_backend asks for.
function(medusa_add_plugin name)
  add_library(${name} MODULE ${ARGN})
  target_link_libraries(${name} PRIVATE medusa_core)
  target_link_options(${name} PRIVATE LINKER:--exclude-libs,ALL LINKER:--no-undefined)
  if(NOT CMAKE_LIBRARY_OUTPUT_DIRECTORY)
    set_target_properties(${name} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})
  endif()
endfunction()

# medusa_cuda_version(OUT COMPILER): the version of an nvcc, empty for what is none.
function(medusa_cuda_version out compiler)
  execute_process(COMMAND ${compiler} --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" found "${text}")
  set(${out} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# Chooses, and says why.
function(medusa_choose_cuda)
  set(MEDUSA_BUILD_CUDA OFF PARENT_SCOPE)
  if(NOT MEDUSA_CUDA MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "MEDUSA_CUDA is '${MEDUSA_CUDA}'; it must be AUTO, ON or OFF")
  elseif(MEDUSA_CUDA STREQUAL "OFF")
    message(STATUS "CUDA backend: off")
    return()
  elseif(MEDUSA_CUDA STREQUAL "AUTO" AND NOT MEDUSA_SANITIZE STREQUAL "")
    message(STATUS "CUDA backend: off, as MEDUSA_SANITIZE is set (MEDUSA_CUDA=AUTO)")
    return()
  endif()
  # The toolkit's installer leaves its folder off the PATH.
  find_program(nvcc nvcc PATHS /usr/local/cuda/bin NO_CACHE)
  if(nvcc AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(ENV{CUDACXX} ${nvcc})
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  set(too_old OFF)
  if(CMAKE_CUDA_COMPILER)
    medusa_cuda_version(version ${CMAKE_CUDA_COMPILER})
    if(version AND version VERSION_LESS 12.0)
      set(too_old ON)
    endif()
  endif()
  if(too_old AND MEDUSA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MEDUSA_CUDA=ON, but ${CMAKE_CUDA_COMPILER} is of CUDA ${version}; the kernels "
                        "are C++20 and need 12.0 or newer. Set CUDACXX to such an nvcc")
  elseif(too_old)
    message(STATUS "CUDA backend: off, as ${CMAKE_CUDA_COMPILER} is of CUDA ${version} and 12.0 is "
                   "needed (MEDUSA_CUDA=AUTO)")
  elseif(CMAKE_CUDA_COMPILER)
    message(STATUS "CUDA backend: on, ${CMAKE_CUDA_COMPILER} works (MEDUSA_CUDA=${MEDUSA_CUDA})")
    set(MEDUSA_BUILD_CUDA ON PARENT_SCOPE)
  elseif(MEDUSA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MEDUSA_CUDA=ON, but no nvcc works here; set CUDACXX to one that does")
  else()
    message(STATUS "CUDA backend: off, as no nvcc works here (MEDUSA_CUDA=AUTO)")
  endif()
endfunction()

medusa_choose_cuda()
if(MEDUSA_BUILD_CUDA)
  # Code for 8.0 runs on all of 8.x; PTX for 9.0, which keeps overlapped launches, is for what comes
  # after. PTX for 8.0 would add nothing to them.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # some versions before 3.26 do not know it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit REQUIRED)

  # No fused operations but those that are written: see compiler.cmake.
  set(options -fmad=false -Xcompiler=-ffp-contract=off,-Wall)
  if(MEDUSA_WERROR)
    list(APPEND options -Werror=all-warnings)
  endif()
  medusa_add_plugin(medusa_cuda ${medusa_cuda_sources})
  set(targets medusa_cuda)
  if(MEDUSA_BUILD_TESTS)
    # Run by scripts/gpu_check.sh, where there is a GPU.
    add_executable(ptx_wrappers tests/emulator/ptx_wrappers.cu csrc/backend/cuda/runtime.cpp)
    target_include_directories(ptx_wrappers PRIVATE tests)
    list(APPEND targets ptx_wrappers)
  endif()
  foreach(target ${targets})
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${options}>")
    target_link_libraries(${target} PRIVATE medusa_core CUDA::cudart_static)
  endforeach()
endif()
