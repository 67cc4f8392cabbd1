"""The settings of each engine, and what cannot go with it. Imports no torch."""

from typing import Literal

from distributed.config.schema import Section, operational, setting

Shards = int | Literal["auto"]


class Ddp(Section):
    name: Literal["ddp"] = operational(
        "ddp", "replicated weights, gradients summed over ranks (DistributedDataParallel)"
    )
    bucket_mib: int = operational(25, "size of a bucket of gradients that is exchanged at once, MiB", gt=0, le=1024)
    compression: Literal["bfloat16"] | None = setting(
        None, "bfloat16: round gradients to bfloat16 before they are summed over ranks; none: sum them in their own precision"
    )  # fmt: skip

    def conflicts(self, shards: Shards, precision: str) -> list[str]:
        """What cannot go with each other or with other sections' settings, a line each."""
        if self.compression is None or shards in ("auto", 0):
            return []
        return [
            f"engine.compression = {self.compression} cannot go with exact.shards = {shards}: sums of compressed gradients "
            "depend on the ranks; set exact.shards = 0, or leave engine.compression out"
        ]


class Fsdp(Section):
    name: Literal["fsdp"] = operational("fsdp", "weights, gradients and optimizer sharded over ranks (FSDP2)")
    reshard_after_forward: bool = operational(
        True, "free a layer's gathered weights after the forward pass and gather them again for the backward one"
    )

    def conflicts(self, shards: Shards, precision: str) -> list[str]:
        """None: it goes with every setting of other sections but `compile`."""
        return []


class DeepSpeed(Section):
    name: Literal["deepspeed"] = operational("deepspeed", "DeepSpeed with what its ZeRO stage shards over ranks")
    zero_stage: int = operational(
        2, "shards 0: nothing; 1: the optimizer; 2: gradients too; 3: weights too (Rajbhandari et al. 2020)", ge=0, le=3
    )
    bucket_mib: int | None = operational(
        None, "gradients, and from stage 1 up weights, that are exchanged at once, MiB; none: a part of the model",
        gt=0, le=1024,
    )  # fmt: skip
    overlap_comm: bool = operational(False, "exchange gradients beside the backward pass; from stage 1 up, on CUDA")
    offload_optimizer: bool = operational(False, "keep and update optimizer and weights on the host; as overlap_comm")

    def conflicts(self, shards: Shards, precision: str) -> list[str]:
        """What cannot go with each other or with other sections' settings, a line each."""
        found = [
            f"engine.{name} has no effect at engine.zero_stage = 0: raise that to 1, 2 or 3, or leave {name} out"
            for name in ("bucket_mib", "overlap_comm", "offload_optimizer")
            if getattr(self, name) and not self.zero_stage
        ]
        if shards not in ("auto", 0):
            found.append(
                f"exact.shards = {shards} cannot go with engine.name = deepspeed, which sums gradients inside its own hooks, "
                "in an order that depends on the ranks: set engine.name = ddp or fsdp, or exact.shards = 0"
            )
        if precision in ("float64", "float16"):
            reason = "whose weights are float32" if precision == "float64" else "which keeps a loss scale of its own"
            found.append(
                f"precision = {precision} cannot go with engine.name = deepspeed, {reason}: choose float32 or bfloat16, or "
                "another engine"
            )
        return found


AnyEngine = Ddp | Fsdp | DeepSpeed
