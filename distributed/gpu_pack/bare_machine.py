"""`python -m distributed.gpu_pack.bare_machine SITE NAME ...`: makes this interpreter look like one with few packages.

Writes SITE/sitecustomize.py. Every Python started with SITE on PYTHONPATH then finds neither modules nor metadata of installed
distributions other than those named. Imports only the standard library, so that any interpreter can run it.
"""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_SITECUSTOMIZE = '''\
"""Hides installed distributions."""

import re
import sys

MODULES = frozenset({modules!r})
DISTRIBUTIONS = frozenset({distributions!r})


class Finder:
    """Wraps a finder, and leaves out hidden modules and distributions."""

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in MODULES else self._finder.find_spec(name, path, target)

    def find_distributions(self, *arguments, **options):
        find = getattr(self._finder, "find_distributions", None)
        for found in find(*arguments, **options) if find else ():
            if re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower() not in DISTRIBUTIONS:
                yield found

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
'''


class Hidden(NamedTuple):
    """Top-level modules, and normalized names of distributions."""

    modules: set[str]
    distributions: set[str]


def hidden(shown: set[str], checkout: Path) -> Hidden:
    """Return everything that this interpreter has, except the distributions `shown` and the modules of the checkout."""
    names = {re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower() for found in metadata.distributions()}
    modules = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in shown for owner in owners)
        and not (checkout / module).is_dir()
    }
    return Hidden(modules, names - shown)


def main() -> None:
    """Write the file, and print the number of hidden distributions."""
    site, *shown = sys.argv[1:]
    modules, distributions = hidden(set(shown), Path.cwd())
    text = _SITECUSTOMIZE.format(modules=sorted(modules), distributions=sorted(distributions))
    (Path(site) / "sitecustomize.py").write_text(text)
    print(f"{len(distributions)} installed packages are hidden, since the rented machine lacks them")


if __name__ == "__main__":
    main()
