"""Where the project lies, and whether everything is run."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = bool(os.environ.get("MOPT_TEST_LONG"))  # else a share of the cases, another for each test
