# TEMPORARY glob while the files land; becomes a list.
file(GLOB programs CONFIGURE_DEPENDS benchmarks/*.cpp)
foreach(source IN LISTS programs)
  cmake_path(GET source STEM name)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE medusa_core)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/benchmarks)
endforeach()
