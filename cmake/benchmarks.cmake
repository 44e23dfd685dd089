# The benchmark programs. What they print about the build is read here, once, at configure time.

if(NOT MEDUSA_COMMIT)
  set(commit "unknown")
  find_package(Git QUIET)
  if(GIT_EXECUTABLE)
    execute_process(
      COMMAND ${GIT_EXECUTABLE} -C ${PROJECT_SOURCE_DIR} describe --always --dirty --abbrev=10
      OUTPUT_VARIABLE described OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(described)
      set(commit "${described}")
    endif()
  endif()
else()
  set(commit "${MEDUSA_COMMIT}")
endif()

add_library(medusa_bench STATIC benchmarks/arguments.cpp benchmarks/matrix_rate.cpp
                                benchmarks/report.cpp)
target_link_libraries(medusa_bench PUBLIC medusa_core)
target_compile_definitions(
  medusa_bench
  PRIVATE MEDUSA_COMMIT="${commit}" MEDUSA_CUDA_TOOLKIT="${CMAKE_CUDA_COMPILER_VERSION}"
          MEDUSA_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")

foreach(name IN ITEMS bench_compact_kv bench_decode bench_linear bench_tree_attention
                      bench_typical_acceptance)
  add_executable(${name} benchmarks/${name}.cpp)
  target_link_libraries(${name} PRIVATE medusa_bench)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/benchmarks)
  # Loaded at run time.
  foreach(plugin IN ITEMS medusa_cuda medusa_cuda_emulated)
    if(TARGET ${plugin})
      add_dependencies(${name} ${plugin})
    endif()
  endforeach()
  if(MEDUSA_BUILD_TESTS)
    add_test(NAME ${name}_arguments COMMAND ${name} --shape nonsense)
    set_tests_properties(${name}_arguments PROPERTIES PASS_REGULAR_EXPRESSION "wanted one of")
    add_test(NAME ${name} COMMAND ${name} --shape tiny --quick --samples 1 --json)
    set_tests_properties(${name} PROPERTIES TIMEOUT 600)
  endif()
endforeach()
