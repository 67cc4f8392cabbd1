"""`python -m distributed.gpu_pack pack | unpack | dry-run | collect | passed`: uses a GPU rented by the minute."""

import argparse
import sys
import time
from pathlib import Path

from distributed.errors import ExitCode, prints_errors
from distributed.files import home_path
from distributed.process.streams import run_command


@prints_errors
def main() -> int:
    """Run one subcommand. For bad input print one line to stderr and return 2."""
    parser = argparse.ArgumentParser(prog="python -m distributed.gpu_pack", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="put wheels and CIFAR-10 into this checkout, and print the two commands")
    pack.add_argument("--data.root", dest="root", type=home_path, default=Path("data"), help="folder with CIFAR-10")
    unpack = commands.add_parser("unpack", help="rebuild the official CIFAR-10 files from packed parts")
    unpack.add_argument("parts", nargs="+", type=home_path)
    unpack.add_argument("--to", type=home_path, required=True, help="folder for cifar-10-batches-bin")
    dry = commands.add_parser("dry-run", help="run the two commands on a CPU")
    dry.add_argument("--python", type=home_path, default=Path(sys.executable), help="interpreter to use as python3")
    dry.add_argument(
        "--call", type=int, nargs="+", choices=(1, 2), default=(1, 2), help="which of the commands; default: both"
    )
    dry.add_argument("--only", nargs="+", default=(), metavar="STEP", help="steps of the check; default: all")
    collect = commands.add_parser("collect", help="merge returned files into the results folder")
    collect.add_argument("source", type=home_path)
    collect.add_argument("--results", type=home_path, default=Path("results"))
    passed = commands.add_parser("passed", help="exit with code 2 unless every step of a check passed on a GPU")
    passed.add_argument("lines", type=home_path, help="gpu_check.jsonl of the check")
    arguments = parser.parse_args()
    _run(arguments)
    return ExitCode.FINISHED


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "pack":
        _pack(arguments.root)
    elif arguments.command == "unpack":
        from distributed.gpu_pack import cifar_parts

        start = time.monotonic()
        print(f"{cifar_parts.unpack(arguments.parts, arguments.to)} ({time.monotonic() - start:.1f} s)")
    elif arguments.command == "dry-run":
        from distributed.gpu_pack.dry_run import dry_run

        dry_run(arguments.python, arguments.call, arguments.only)
    else:
        from distributed.gpu_pack.collect import check_passed, collect

        if arguments.command == "passed":
            check_passed(arguments.lines)
        else:
            print(*collect(arguments.source, arguments.results), sep="\n")


def _pack(root: Path) -> None:
    """Create the folders to upload, check the limits, and print sizes and commands."""
    from distributed.gpu_pack import checkout, cifar_parts, wheels
    from distributed.gpu_pack.calls import CALLS, PARTS, WHEELS, check_size

    start, root_of_checkout = time.monotonic(), Path.cwd()
    tree = checkout.size_of(root_of_checkout)
    names = [wheel.name for wheel in wheels.download(root_of_checkout / WHEELS)]
    cifar_parts.pack(root, [root_of_checkout / part for part in PARTS])
    print(f"packed in {time.monotonic() - start:.0f} s: CIFAR-10 and {', '.join(names)}")
    for call in CALLS:
        sizes = {"checkout": tree} | {name: checkout.folder_size(root_of_checkout / name) for name in call.carried}
        total = check_size(call, sizes)
        listed = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
        print(f"\n# {call.name}: carry {' '.join(call.carried)}; up to {call.seconds} s; {len(call.text)} characters")
        print(f"# {total / 2**20:.1f} of 64 MiB: {listed}")
        print(call.text, end="")


if __name__ == "__main__":
    run_command(main, starts_processes=True)
