"""Copies `configs/`, which is beside the package in a checkout, into the wheel; pyproject.toml cannot express this."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = "configs"
PACKAGED = "adaskip/packaged_configs"
"""Where `adaskip.common.configs` looks for the files in an installed wheel."""


class BuildWithConfigs(build_py):
    """Builds the package, then copies `configs/` into it; an editable install reads them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copytree(CONFIGS, Path(self.build_lib, PACKAGED), dirs_exist_ok=True)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copies = [str(Path(self.build_lib, PACKAGED, path.name)) for path in Path(CONFIGS).glob("*.yaml")]
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else copies)]


setup(cmdclass={"build_py": BuildWithConfigs})
