# Language, optimisation, warnings and sanitizers, the same for every target of this project.

option(MEDUSA_WERROR "Turn warnings into errors" OFF)
set(MEDUSA_SANITIZE "" CACHE STRING "Sanitizer: address, undefined, thread or empty")
set_property(CACHE MEDUSA_SANITIZE PROPERTY STRINGS "" address undefined thread)

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# Link-time optimisation could move code between objects built for different instruction sets.
set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)

# For C++ alone; what nvcc gets stands in cuda.cmake.
macro(medusa_compile_options)
  foreach(option ${ARGN})
    add_compile_options($<$<COMPILE_LANGUAGE:CXX>:${option}>)
  endforeach()
endmacro()

# The compiler must not fuse or reorder: the bits of a sum are part of the contract.
medusa_compile_options(-O3 -ffp-contract=off -Wall -Wextra
                       -Wno-missing-field-initializers)  # what {.x = 1} leaves out has a default
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  medusa_compile_options(-Wno-restrict)  # false alarms in std::string (GCC PR 105651)
endif()
if(MEDUSA_WERROR)
  medusa_compile_options(-Werror)
endif()

if(NOT MEDUSA_SANITIZE STREQUAL "")
  if(NOT MEDUSA_SANITIZE MATCHES "^(address|undefined|thread)$")
    message(FATAL_ERROR "MEDUSA_SANITIZE is '${MEDUSA_SANITIZE}'; it must be address, undefined, thread or empty")
  endif()
  medusa_compile_options(-O1 -g -fno-omit-frame-pointer -fsanitize=${MEDUSA_SANITIZE}
                         -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${MEDUSA_SANITIZE})
endif()

find_package(Threads REQUIRED)
