"""`distributed.train` with a CIFAR-10 of a few images, whose binary archive has the MD5 in SMALL_CIFAR_MD5."""

import os
from dataclasses import replace

from distributed.data.sources.cifar_spec import CIFAR10, SETS

RECORDS = 24
_BINARY, _PYTHON = CIFAR10.forms

if __name__ == "__main__":
    forms = (replace(_BINARY, archive_md5=os.environ["SMALL_CIFAR_MD5"]), _PYTHON)
    SETS["cifar10"] = replace(CIFAR10, train_records=RECORDS, test_records=RECORDS, forms=forms)

    from distributed.train import main

    os._exit(main())
