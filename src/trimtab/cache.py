"""Where Trimtab keeps what it can fetch or build again: starters, compiled kernels, states of frozen layers."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """TRIMTAB_HOME, else the platform's cache folder."""
    home = os.environ.get("TRIMTAB_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_path("trimtab"))
