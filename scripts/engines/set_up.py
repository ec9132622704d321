"""Make the environment in which one engine's own loader runs, without kernels, on top of this project's packages.

    python scripts/engines/set_up.py ENGINE FOLDER

Run it with the project's Python. Nothing is installed into the project's environment.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENGINES = tomllib.loads((HERE / "engines.toml").read_text(encoding="utf-8"))


def missing(engine: str) -> str | None:
    """Why an engine that is no package is not run, or None.

    Raises:
        SystemExit: The checkout is not of the pinned release.
    """
    variable, version = ENGINES[engine].get("checkout"), ENGINES[engine]["version"]
    if variable is None:
        return None
    if not os.environ.get(variable):
        return f"{variable} names no checkout of its tag v{version}"
    file = Path(os.environ[variable]) / "comfyui_version.py"
    found = re.search(r'__version__ = "(.+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    if found is None or found[1] != version:
        raise SystemExit(f"{file}: expected version {version}, found {found[1] if found else 'none'}")
    return None


def set_up(engine: str, folder: Path) -> Path:
    """The Python of the environment, made in ``folder`` if it is not there."""
    python, made = folder / "bin" / "python", folder / "installed"
    pins = ENGINES[engine]
    if made.exists() and made.read_text(encoding="utf-8") == repr(pins):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python3*/site-packages")
    (packages / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    install = [*pip, "install", "--quiet", "--no-compile", "--no-warn-conflicts"]
    if pins["wheels"] or pins["packages"]:
        subprocess.run([*install, "--no-deps", *pins["wheels"], *pins["packages"]], check=True)
    if pins["full"]:
        subprocess.run([*install, *pins["full"]], check=True)
    made.write_text(repr(pins), encoding="utf-8")
    return python


if __name__ == "__main__":
    set_up(sys.argv[1], Path(sys.argv[2]).absolute())
