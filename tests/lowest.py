"""Print pip constraints that pin each dependency of pyproject.toml to the lowest version that it declares."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def constraints() -> list[str]:
    """Return "name==version" for each dependency of the package and of its extras for media."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    declared = [
        *project["dependencies"],
        *(each for extra in ("video", "heif", "lidar", "parquet") for each in project["optional-dependencies"][extra]),
    ]
    return [re.sub(r">=([\w.]+).*", r"==\1", requirement) for requirement in declared]


if __name__ == "__main__":
    print("\n".join(constraints()))
