"""Build the wheels of `quickbloom-kernels`: the kernels compiled for other machines, which then need no C++ compiler.

    python -m kernels.build_wheels --output dist

There is one wheel for each machine in LEVELS, for Linux with glibc 2.28 (of 2018) or newer and any Python. The compiler is
zig's, from `pip install ziglang`, which compiles for all of them anywhere.
"""

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from quickbloom import __version__
from quickbloom.common.maths.kernels import source
from quickbloom.common.maths.kernels.prebuilt import DISTRIBUTION, LEVELS, MADE_FROM, PACKAGE, file_name, made_from

GLIBC = "2.28"
ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "common" / "maths" / "kernels" / "kernels.cpp"
PROCESSORS = {"x86-64-v3": "x86_64_v3", "x86-64-v4": "x86_64_v4", "armv8-a": "generic"}
"""What zig calls each level."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.build_wheels",
        description=f"Build the wheels of {DISTRIBUTION}; needs zig (pip install ziglang).",
        epilog="Example: python -m kernels.build_wheels --output dist",
    )
    parser.add_argument("--output", type=Path, default=Path("dist"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--machine", choices=sorted(LEVELS), help="one machine alone; default: a wheel for each")
    options = parser.parse_args()
    for machine in [options.machine] if options.machine else LEVELS:
        print(build(machine, options.output))


def build(machine: str, output: Path) -> Path:
    """Write the wheel for `machine` into the folder `output` and return its path."""
    tag = f"py3-none-manylinux_{GLIBC.replace('.', '_')}_{machine}"
    info = f"{PACKAGE}-{__version__}.dist-info"
    files = {
        f"{PACKAGE}/__init__.py": b'"""Compiled kernels of quickbloom."""\n',
        f"{PACKAGE}/{MADE_FROM}": json.dumps(made_from(), indent=2).encode(),
        **{f"{PACKAGE}/{name}": content for name, content in libraries(machine).items()},
        f"{info}/METADATA": _metadata().encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: quickbloom\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
        f"{info}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
    }
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{PACKAGE}-{__version__}-{tag}.whl"
    with ZipFile(path, "w") as wheel:
        for name, content in files.items():
            entry = ZipInfo(name)  # of 1980, so that equal contents make equal wheels
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content, ZIP_DEFLATED)
    return path


def libraries(machine: str) -> dict[str, bytes]:
    """Return the compiled libraries for `machine` by file name. Raises CalledProcessError if zig fails."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, options in source.KINDS.items():
            for level in LEVELS[machine]:
                library = Path(folder) / file_name(kind, level)
                target = ["-target", f"{machine}-linux-gnu.{GLIBC}", f"-mcpu={PROCESSORS[level]}"]
                # Without C++'s library, which the kernels do not use, and without the symbols of debuggers (-s).
                flags = [*target, *source.FLAGS, "-fno-exceptions", "-s", *options.split()]
                files = [str(CODE), "-o", str(library), "-lm"]
                subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags, *files], check=True)
                found[library.name] = library.read_bytes()
    return found


def _metadata() -> str:
    return (
        f"Metadata-Version: 2.4\nName: {DISTRIBUTION}\nVersion: {__version__}\n"
        "Summary: Compiled kernels of quickbloom, for machines without a C++ compiler\n"
        "License-Expression: Apache-2.0\nLicense-File: LICENSE\nRequires-Python: >=3.11\n"
    )


def _record(files: dict[str, bytes], own: str) -> bytes:
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{own},,", ""]).encode()


if __name__ == "__main__":
    main()
