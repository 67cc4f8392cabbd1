"""Compares the settings and the imported modules of all ranks."""

import hashlib

from distributed.comm import collectives
from distributed.config import TrainConfig, as_toml
from distributed.errors import InputError
from distributed.host.importable import module_files


def config_digest(config: TrainConfig) -> str:
    """Return a digest of all settings, which must be the same on all ranks."""
    return hashlib.blake2b(as_toml(config).encode(), digest_size=8).hexdigest()


def check_same_config(config: TrainConfig) -> None:
    """Raise InputError if the ranks do not all have the same config and imported modules. A collective."""
    own = config_digest(config), module_files(config.import_paths)
    digests, modules = zip(*collectives.gather_objects(own), strict=True)
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise InputError(
            f"config: rank {', '.join(map(str, different))} has different settings from rank 0; "
            "start every node with the same command and the same files"
        )
    for rank, files in enumerate(modules):
        for name, module in files.items():
            if module.sha256 != modules[0][name].sha256:
                where = f"{name} = {config.import_paths[name]}: rank {rank}"
                raise InputError(f"{where} has a different {module.file} from rank 0; every node needs the same file")
