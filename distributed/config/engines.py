"""Settings of each engine and their conflicts with other sections. Imports no torch."""

from typing import Literal

from distributed.config.schema import Section, operational, setting

Shards = int | Literal["auto"]


class _Engine(Section):
    def conflicts(self, shards: Shards, precision: str) -> list[str]:
        """Return one line per conflict within the section, or with `exact.shards` or `precision`."""
        return []


class Ddp(_Engine):
    name: Literal["ddp"] = operational("ddp", "weights replicated, gradients summed over ranks")
    bucket_mib: int = operational(
        25, "size in MiB of the buckets in which gradients are exchanged; not used by fast mode's sums through shared memory",
        gt=0, le=1024,
    )  # fmt: skip
    compression: Literal["bfloat16"] | None = setting(
        None,
        "bfloat16: round gradients to bfloat16 before summing them over ranks; none: sum them in their own precision",
    )

    def conflicts(self, shards: Shards, precision: str) -> list[str]:
        if self.compression is None or shards in ("auto", 0):
            return []
        return [
            f"engine.compression = {self.compression} cannot be combined with exact.shards = {shards}: sums of compressed "
            "gradients depend on the number of ranks; set exact.shards = 0, or remove engine.compression"
        ]


class Fsdp(_Engine):
    name: Literal["fsdp"] = operational("fsdp", "weights, gradients and optimizer state sharded over ranks (FSDP2)")
    reshard_after_forward: bool = operational(
        True, "free a layer's gathered weights after the forward pass and gather them again for the backward pass"
    )


class DeepSpeed(_Engine):
    name: Literal["deepspeed"] = operational(
        "deepspeed", "DeepSpeed's ZeRO, whose stage says what is sharded over ranks"
    )
    zero_stage: int = operational(
        2, "what is sharded; 0: nothing; 1: optimizer state; 2: gradients too; 3: weights too (Rajbhandari et al. 2020)",
        ge=0, le=3,
    )  # fmt: skip
    bucket_mib: int | None = operational(
        None, "bucket size in MiB for exchanging gradients and, at stages 1 to 3, weights; none: a fraction of the model",
        gt=0, le=1024,
    )  # fmt: skip
    overlap_comm: bool = operational(
        False, "overlap the exchange of gradients with the backward pass; stages 1 to 3, CUDA only"
    )
    offload_optimizer: bool = operational(
        False, "keep optimizer state and master weights on the host and update them there; stages 1 to 3, CUDA only"
    )

    def conflicts(self, shards: Shards, precision: str) -> list[str]:
        found = [
            f"engine.{name} has no effect at engine.zero_stage = 0: set the stage to 1, 2 or 3, or remove engine.{name}"
            for name in ("bucket_mib", "overlap_comm", "offload_optimizer")
            if getattr(self, name) and not self.zero_stage
        ]
        if shards not in ("auto", 0):
            found.append(
                f"exact.shards = {shards} cannot be combined with engine.name = deepspeed, which sums gradients in its own "
                "hooks in an order that depends on the ranks: set engine.name = ddp or fsdp, or exact.shards = 0"
            )
        if precision in ("float64", "float16"):
            reason = "whose weights are float32" if precision == "float64" else "which has its own loss scaling"
            found.append(
                f"precision = {precision} cannot be combined with engine.name = deepspeed, {reason}: set precision = float32 "
                "or bfloat16, or choose another engine"
            )
        return found


AnyEngine = Ddp | Fsdp | DeepSpeed


def compile_conflicts(engine: AnyEngine, shards: Shards) -> list[str]:
    """Return one line per setting that `compile = true` cannot be combined with."""
    found = []
    if shards not in ("auto", 0):
        found.append(
            f"compile = true cannot be combined with exact.shards = {shards}: a compiled graph cannot pause where shards "
            "synchronize; set exact.shards = 0, or compile = false"
        )
    if engine.name != "ddp":
        found.append(
            f"compile = true cannot be combined with engine.name = {engine.name}: set engine.name = ddp, or compile = false"
        )
    return found
