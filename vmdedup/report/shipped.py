"""The files of pages: ours in `assets/`, and Plotly's from its package.

Owns their paths. Imports nothing for them: the API server, whose memory
counts, asks here, and serving Plotly's JavaScript does not need its Python code.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_ASSETS = Path(__file__).with_name("assets")


def asset_path(name: str) -> Path:
    """A file of `assets/`, ours and therefore trusted."""
    return _ASSETS / name


def plotly_path() -> Path | None:
    """Plotly's JavaScript in the installed `plotly` package (extra `html`); `None` without it."""
    found = find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        return None
    script = Path(next(iter(found.submodule_search_locations))) / "package_data/plotly.min.js"
    return script if script.is_file() else None
