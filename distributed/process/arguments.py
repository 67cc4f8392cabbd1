"""The parser of a command's arguments. Imports no torch."""

import argparse
import sys
from typing import NoReturn

from distributed.errors import InputError, on_one_line


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports a wrong argument in one line, like all other bad input, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        sys.exit(InputError(f"command line: {on_one_line(message)}; --help lists the options").report())
