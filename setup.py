"""Builds the extension with CMake and ninja; everything else stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension module whose sources CMake knows."""

    def __init__(self, name: str) -> None:
        """Name the module as Python imports it."""
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure and build one CMake target per extension."""

    def build_extension(self, ext: CMakeExtension) -> None:
        """Build `ext` and leave it where setuptools expects it."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # An editable install keeps its objects, so that the next one compiles only what changed.
        kept = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        build = kept if self.editable_mode else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            "-DMEDUSA_BUILD_PYTHON=ON",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMEDUSA_CUDA={os.environ.get('MEDUSA_CUDA', 'AUTO')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]
        subprocess.run(configure, check=True)
        target = ext.name.rpartition(".")[2]
        subprocess.run(["cmake", "--build", str(build), "--target", target], check=True)

    def copy_extensions_to_source(self) -> None:
        """In an editable install the module is loaded from the sources, and its library too."""
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("medusa_ext"))
        built = Path(self.build_lib, "medusa_ext", "libmedusa_cuda.so")
        (package / built.name).unlink(missing_ok=True)  # an earlier build's
        if built.exists():
            shutil.copy2(built, package)


setup(ext_modules=[CMakeExtension("medusa_ext._core")], cmdclass={"build_ext": CMakeBuild})
