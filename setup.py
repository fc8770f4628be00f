"""What setup.cfg cannot say: `simpletuner_layerprobe.pth` goes to the root of site-packages.

Python runs that file at start-up, which is how the probe gets into SimpleTuner's processes. Wheels and
editable installs both carry it, and both list it in RECORD, so that uninstalling removes it.
"""

import os
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

PTH = "simpletuner_layerprobe.pth"


class build_pth(Command):
    """A build step after setuptools' `SubCommand` protocol."""

    description = "copy the .pth file to the root of the wheel"
    user_options: ClassVar = []

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        # An editable wheel packs nothing from build_lib, only what lies where `install` would put a library.
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(root)
        self.copy_file(PTH, os.path.join(root, PTH))

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [os.path.join(self.build_lib, PTH)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [PTH]


class build_with_pth(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_pth", None)]


setup(cmdclass={"build": build_with_pth, "build_pth": build_pth})
