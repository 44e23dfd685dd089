# _core: the pybind11 module. setup.py passes the interpreter and where pybind11 lies.

find_package(pybind11 3.0 CONFIG REQUIRED)
pybind11_add_module(_core MODULE csrc/python/bind_guesses.cpp csrc/python/bind_model.cpp
                    csrc/python/bind_ops.cpp csrc/python/bind_session.cpp csrc/python/module.cpp)
target_link_libraries(_core PRIVATE medusa_core)
target_compile_definitions(_core PRIVATE MEDUSA_VERSION="${PROJECT_VERSION}")
if(TARGET medusa_cuda)
  add_dependencies(_core medusa_cuda)  # it is loaded from beside the module
endif()
