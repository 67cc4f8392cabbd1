"""The settings of each engine, and what cannot go with it. Imports no torch."""

from typing import Literal

from distributed.config.schema import Section, operational, setting

Shards = int | Literal["auto"]


class Ddp(Section):
    name: Literal["ddp"] = operational(
        "ddp", "replicated weights, gradients summed over ranks (DistributedDataParallel)"
    )
    bucket_mib: int = operational(25, "size of a bucket of gradients that is exchanged at once, MiB", gt=0, le=1024)
    compression: Literal["bfloat16", "powersgd"] | None = setting(
        None, "send less of gradients: bfloat16: rounded to it; powersgd: as products of two thin matrices, what they leave "
        "out with the next ones (Vogels et al. 2019); none: as they are"
    )  # fmt: skip
    powersgd_rank: int | None = setting(
        None, "columns of those matrices; more are closer and more to send; only with powersgd", gt=0, le=1024
    )

    def conflicts(self, shards: Shards, precision: str) -> list[str]:
        """What cannot go with each other or with other sections' settings, a line each."""
        found, powersgd = [], self.compression == "powersgd"
        if self.compression and shards not in ("auto", 0):
            found.append(
                f"engine.compression = {self.compression} cannot go with exact.shards = {shards}: sums of compressed gradients "
                "depend on the ranks; set exact.shards = 0, or leave engine.compression out"
            )
        if powersgd and precision == "float16":
            found.append(
                "engine.compression = powersgd cannot go with precision = float16: an overflow would stay in the errors that "
                "it keeps; set precision = bfloat16"
            )
        if powersgd and self.powersgd_rank is None:
            found.append("engine.compression = powersgd needs engine.powersgd_rank: 2 or 4 is what the paper takes")
        if self.powersgd_rank is not None and not powersgd:
            found.append(
                f"engine.powersgd_rank = {self.powersgd_rank} has no effect without engine.compression = powersgd: set that, "
                "or remove it"
            )
        if powersgd and self.bucket_mib != Ddp().bucket_mib:
            found.append(
                f"engine.bucket_mib = {self.bucket_mib} has no effect with engine.compression = powersgd, which sends what is "
                "left in one piece: remove it"
            )
        return found


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
