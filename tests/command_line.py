"""The command line, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

from lemix.data_dir import DataDir


def lemix(directory: DataDir, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in an environment that knows the data directory only."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LEMIX_")}
    ended = subprocess.run(
        [sys.executable, "-m", "lemix", *arguments],
        env=environment | {"LEMIX_DATA_DIR": str(directory.path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    return ended
