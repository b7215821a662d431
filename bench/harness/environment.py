"""The Python that has what ftd needs."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def ensure(*more: str) -> None:
    """Makes `ftd` importable; runs the program again with .venv's Python when this one lacks a library.

    `more` are libraries that only this program needs.
    """
    sys.path.insert(0, str(REPO))
    needed = ("numpy", "pydantic", "qemu", "rich", "xxhash", *more)
    missing = [name for name in needed if find_spec(name) is None]
    if not missing:
        return
    python = REPO / ".venv" / "bin" / "python"
    if not python.exists() or Path(sys.prefix) == python.parents[1]:
        name = Path(sys.argv[0]).name
        print(f"{name}: Python lacks {', '.join(missing)}; run scripts/setup", file=sys.stderr)
        sys.exit(1)
    os.execv(python, [str(python), *sys.argv])
