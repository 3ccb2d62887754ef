"""The pins: exact versions of everything that moesaic and its developer's tools stand on.

Prints what is installed in the running environment, following the requirements from
``moesaic[dev]`` on. Local suffixes (``2.13.0+cpu``) are left out: they name a build, not a version.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement


def closure(root: str) -> dict[str, str]:
    """Return name -> version of every installed distribution that ``root`` leads to."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [Requirement(root)]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if f"{name}{sorted(wanted.extras)}" in seen:
            continue
        seen.add(f"{name}{sorted(wanted.extras)}")
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # asked for on another platform only
        found[name] = installed.version.partition("+")[0]
        for text in installed.requires or ():
            inner = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *wanted.extras)]
            if inner.marker is None or any(inner.marker.evaluate(e) for e in environments):
                waiting.append(inner)
    return found


def main() -> None:
    """Print constraints.txt."""
    print("# Exact versions, written by `make pins`; `make setup` installs under them.")
    for name, version in sorted(closure("moesaic[dev]").items()):
        if name != "moesaic":
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()
