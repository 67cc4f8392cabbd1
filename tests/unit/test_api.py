"""The public interface: `from distributed import ...`."""

import subprocess
import sys

import pytest

import distributed


@pytest.mark.parametrize("name", distributed.__all__)
def test_public_names_can_be_imported(name: str) -> None:
    assert getattr(distributed, name).__name__ == name
    assert name in dir(distributed)


def test_all_is_complete() -> None:
    assert set(distributed.__all__) == distributed._MODULES.keys()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'distributed' has no attribute 'Trainer'"):
        _ = distributed.Trainer


def test_importing_the_package_and_its_config_imports_no_torch() -> None:
    script = "import sys, distributed; distributed.TrainConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(("setup", "shown"), [("", "INFO "), ("logger.remove()", None)], ids=["default", "configured"])
def test_logs_from_python_are_at_info(setup: str, shown: str | None) -> None:
    script = f"""
from loguru import logger
from distributed.process.logs import replace_default_logs
{setup}
replace_default_logs(0, level="INFO")
replace_default_logs(0, level="INFO")
logger.debug("not shown")
logger.info("a message")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == ([f"{shown}   a message"] if shown else [])


def test_a_second_run_in_a_process_has_its_own_log_level() -> None:
    code = """
from loguru import logger
from distributed.process.logs import replace_default_logs

replace_default_logs(0, level="WARNING")
logger.info("first")
replace_default_logs(0, level="INFO")
logger.info("second")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "second" in done.stderr
    assert "first" not in done.stderr
