add_executable(generate examples/generate.cpp)
target_link_libraries(generate PRIVATE medusa_core)
set_target_properties(generate PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/examples)
