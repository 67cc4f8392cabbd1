"""The two calls to a rented machine with one GPU and no network, one after the other within one rental.

The machine receives the checkout and a few ignored paths, runs one shell command in the root of the checkout, and returns what
the command wrote to the folder $OUT. Files outside the checkout persist between the calls, so wheels go to $D/site and CIFAR
to $D. CHECK_DEVICE and CHECK_MORE are unset there; `gpu_pack dry-run` sets them to run the same text on a CPU.
"""

from dataclasses import dataclass

from distributed.errors import InputError

MAX_BYTES = 64 * 2**20  # per call: the checkout and the carried paths
MAX_CHARACTERS = 2_000  # per command
MAX_FILES_BACK = 8
MAX_BYTES_BACK = 16 * 2**20  # per file
PARTS = (".cifar-a", ".cifar-b")
WHEELS = ".whl"

_INSTALL = """\
D=${TMPDIR:-/tmp}/gpu; mkdir -p $D/check
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $D/site .whl/*.whl || exit
export PYTHONPATH=$D/site
"""

# At most eight files are returned, so the logs of all steps are in one archive.
_CHECK = """\
if [ -d .cifar-a ]; then rm -rf $D/cifar-a; mv .cifar-a $D/cifar-a; fi
timeout -k 9 315 python3 -m distributed.gpu_check --seconds 300 --out $D/check \
--device ${CHECK_DEVICE:-cuda} ${CHECK_MORE:-}
code=$?
cd $D/check
cp $(ls -p | grep -v -e / -e '[.]log$') $OUT
tar -czf $OUT/gpu_check_logs.tar.gz *.log
exit $code
"""

_EXPERIMENTS = """\
python3 -m distributed.gpu_pack unpack $D/cifar-a .cifar-b --to $D/data || exit
python3 -m distributed.experiments --only I-10 I-50 A-10 S1-10 --minutes 6.5 \
--runs $D/runs --out $OUT/results.json --device ${CHECK_DEVICE:-cuda} ${CHECK_MORE:---data.root $D/data}
code=$?
cd $D/runs || exit
tar -czf $OUT/runs.tar.gz --exclude=checkpoints *
last=$(ls -d I-50-0/checkpoints/step-* 2>/dev/null | tail -1)
[ -z "$last" ] || tar -czf $OUT/I-50_checkpoint.tar.gz $last
exit $code
"""


@dataclass(frozen=True)
class Call:
    """A shell command.

    Args:
        carried: ignored paths to upload with the checkout.
        seconds: time limit.
    """

    name: str
    carried: tuple[str, ...]
    seconds: int
    text: str


CALLS = (
    Call("call 1: the check", (WHEELS, PARTS[0]), 345, _INSTALL + _CHECK),
    Call("call 2: the experiments", (WHEELS, PARTS[1]), 450, _INSTALL + _EXPERIMENTS),
)


def check_size(call: Call, sizes: dict[str, int]) -> int:
    """Return the sum of `sizes`, the bytes to upload by path.

    Raises:
        InputError: the sum or the length of the command exceeds the limit of a call.
    """
    total = sum(sizes.values())
    if total > MAX_BYTES:
        listed = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
        raise InputError(f"{call.name}: {total / 2**20:.1f} MiB to upload, more than the limit of 64: {listed}")
    if len(call.text) > MAX_CHARACTERS:
        raise InputError(
            f"{call.name}: its command has {len(call.text)} characters, more than the limit of {MAX_CHARACTERS}"
        )
    return total
