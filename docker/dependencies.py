"""Print what pyproject.toml asks for, as requirements, for the image's layer of them: dependencies.py EXTRA[,EXTRA...]."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [name for name in sys.argv[1].split(",") if name]
print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")
