"""Set-up in one line: requirements files, pyproject.toml and the README's commands agree."""

import re
import tomllib

from conftest import ROOT


def pins(name: str) -> list[str]:
    """The requirements of a file, those of the files it names included."""
    found = []
    for line in (ROOT / name).read_text().split("\n"):
        other = re.fullmatch(r"-r (\S+)", line)
        found += pins(other[1]) if other else [line] * bool(line)
    return sorted(set(found))


def test_uv_and_pip_install_the_same_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dependencies, dev = project["project"]["dependencies"], project["dependency-groups"]["dev"]
    assert sorted(dependencies) == pins("requirements.txt")
    assert sorted(dependencies + dev) == pins("requirements-dev.txt")
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in dependencies + dev)


def test_ci_runs_the_test_command_of_the_readme():
    blocks = re.findall(r"^```\n(.*?)```", (ROOT / "README.md").read_text(), re.M | re.S)
    [command] = [block for block in blocks if "pytest" in block]
    assert command in (ROOT / ".ci/run").read_text()
