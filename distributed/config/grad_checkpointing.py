"""Settings of gradient checkpointing. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from distributed.config.engines import AnyEngine, DeepSpeed
from distributed.config.schema import Section, setting


def _names(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise PydanticCustomError("names", 'should be a list of the names of modules, e.g. ["layer1", "layer2.0"]')
    if len(set(names)) < len(names):
        raise PydanticCustomError("names", "should name each module once")
    return tuple(names)


class GradCheckpointing(Section):
    """Whether and where activations are recomputed in the backward pass."""

    enabled: bool = setting(
        False, "keep only the inputs of the network's blocks and recompute the blocks in the backward pass: the same results "
        "with less memory, about a third slower; in fast mode only"
    )  # fmt: skip
    modules: Annotated[tuple[str, ...], BeforeValidator(_names)] = setting(
        (), 'modules to recompute instead, e.g. ["layer1", "layer2.0"]; only if enabled; []: the network\'s blocks'
    )

    def conflicts(self, shards: int | Literal["auto"], engine: AnyEngine, *, compile: bool) -> list[str]:
        """Return one line per conflict within the section, or with `exact.shards`, the engine or `compile`."""
        found = []
        if self.modules and not self.enabled:
            found.append(
                "grad_checkpointing.modules has no effect without grad_checkpointing.enabled: set that to true, or remove it"
            )
        if self.enabled and shards not in ("auto", 0):
            found.append(
                f"grad_checkpointing.enabled = true cannot be combined with exact.shards = {shards}, where a backward pass "
                "runs shard by shard: set exact.shards = 0, or grad_checkpointing.enabled = false"
            )
        if self.enabled and compile:
            found.append(
                "grad_checkpointing.enabled = true cannot be combined with compile = true, which decides itself what to "
                "recompute: set one of them to false"
            )
        if self.enabled and isinstance(engine, DeepSpeed) and engine.zero_stage == 3:
            found.append(
                "grad_checkpointing.enabled = true cannot be combined with engine.zero_stage = 3, which frees the weights of a "
                "block before it is recomputed: set engine.name = fsdp, or engine.zero_stage = 2"
            )
        return found
