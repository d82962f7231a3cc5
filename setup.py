"""Build entry point: metadata is in pyproject.toml, compiling the kernels in csrc/native_build.py
and csrc/cpu_build.py.

The libraries need no Python headers, so they are no extension modules but files of the package, and
a wheel that holds them serves every Python 3 of its platform.
"""

import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import cpu_build  # noqa: E402
import native_build  # noqa: E402


class BuildNative(Command):
    """Compiles csrc/ and puts the libraries into the package: the source's own when editable."""

    description = "compile the kernels for CPUs and GPUs"
    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        root = ROOT if self.editable_mode else Path(self.build_lib)
        package = root / native_build.PACKAGE.name
        made = [kernels.install(package) for kernels in (cpu_build, native_build)]
        self.distribution.has_library = any(outcome.library is not None for outcome in made)

    def get_source_files(self):
        return []  # MANIFEST.in names them

    def get_outputs(self):
        return list(self.get_output_mapping())

    def get_output_mapping(self):
        return {}


class Build(build):
    # build_ext would look for extension modules
    sub_commands = (
        *(command for command in build.sub_commands if command[0] != "build_ext"),
        ("build_native", None),
    )


class Package(Distribution):
    has_library = False  # until it is compiled

    def has_ext_modules(self):
        """Whether it belongs to a platform. Asked for metadata too, so it compiles nothing."""
        return self.has_library


class BdistWheel(bdist_wheel):
    """py3-none-<platform> with the library in it, py3-none-any without."""

    def run(self):
        self.run_command("build_native")  # once: `build` finds that it was run
        self.root_is_pure = not self.distribution.has_library
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


# two installs from one checkout would write the same files
with native_build.alone(ROOT):
    setup(
        distclass=Package,
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
    )
