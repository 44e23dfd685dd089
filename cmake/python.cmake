# _core: the pybind11 module. setup.py passes the interpreter and where pybind11 lies.

find_package(pybind11 3.0 CONFIG REQUIRED)
# TEMPORARY glob while the files land; becomes a list.
file(GLOB python_sources CONFIGURE_DEPENDS csrc/python/*.cpp)
pybind11_add_module(_core MODULE ${python_sources})
target_link_libraries(_core PRIVATE medusa_core)
target_compile_definitions(_core PRIVATE MEDUSA_VERSION="${PROJECT_VERSION}")
