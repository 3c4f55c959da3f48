"""The wheel also brings the entry scripts and configurations, which lie outside of the packages in the source tree."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithJobs(build_py):
    """Copies ``jobs/*.py`` and ``configs/*.yaml`` into the built ``pipelines`` package."""

    def run(self) -> None:
        """Build the packages, then add the files."""
        super().run()
        if self.editable_mode:
            return  # an editable installation uses the source tree
        for folder, pattern in (("jobs", "*.py"), ("configs", "*.yaml")):
            target = Path(self.build_lib) / "pipelines" / folder
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted((ROOT / folder).glob(pattern)):
                shutil.copyfile(file, target / file.name)


setup(cmdclass={"build_py": BuildWithJobs})
