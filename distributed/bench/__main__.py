"""`python -m distributed.bench train | exact | engines | startup | save | norm`: speed against what else could be run, in
interleaved rounds. `memory`: what a rank holds under each engine."""

import argparse
import json
import statistics
import sys
from pathlib import Path

from distributed.bench.kinds import KINDS
from distributed.bench.memory import table
from distributed.bench.rounds import machine
from distributed.data import cifar
from distributed.errors import ExitCode, InputError


def main() -> int:
    """Run the rounds, print medians and ratios, write them as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m distributed.bench", description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "memory"])
    parser.add_argument("--data.root", dest="root", type=Path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80, help="steps a contender and round")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.kind == "memory":
        table(arguments.json)
        return ExitCode.FINISHED
    try:
        if arguments.kind != "norm":
            cifar.check("cifar10", arguments.root)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    kind = KINDS[arguments.kind]
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(kind.measure(arguments.root.resolve(), arguments.steps))
        print(f"round {number + 1}: " + ", ".join(f"{k} {v:,.4g}" for k, v in rounds[-1].items()), file=sys.stderr)
    ratios = [kind.ratios_of(r) for r in rounds]
    figures = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    compared = {name: sorted(r[name] for r in ratios) for name in ratios[0]}
    width = max(map(len, [*figures, *compared]))
    for name, value in figures.items():
        unit = "" if name.endswith("]") else f" {kind.unit}"
        print(f"{name:<{width}} {value:10,.4g}{unit} (median of {len(rounds)})")
    for name, values in compared.items():
        print(f"{name:<{width}} {statistics.median(values):10.3f} (median; {values[0]:.3f} to {values[-1]:.3f})")
    if arguments.json:
        command = f"python -m distributed.bench {arguments.kind} --rounds {arguments.rounds} --steps {arguments.steps}"
        content = {"command": command, "machine": machine(), "rounds": rounds, "ratios": ratios}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
