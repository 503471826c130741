"""A real DeepSpeed engine of a tiny model, one step: writes the bytes that its first process holds.

Arguments: ZERO STAGE KIND OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch

from llava_vlora.bench.shapes import SHAPES
from llava_vlora.bench.training import TrainBench, TrainOptions

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def total(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def settings(zero: int, width: int) -> dict[str, object]:
    """The recipe's file with what transformers puts for its ``auto``."""
    config = json.loads((SCRIPTS / f"zero{zero}.json").read_text())
    partition = config["zero_optimization"] | {"reduce_bucket_size": width**2}
    if zero == 3:
        partition["stage3_prefetch_bucket_size"] = int(0.9 * width**2)
        partition["stage3_param_persistence_threshold"] = 10 * width
    return {
        "zero_optimization": partition,
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
    }


def main() -> None:
    zero, stage, kind, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    deepspeed.init_distributed("gloo")
    shape = SHAPES["tiny"]
    steps = TrainBench(
        TrainOptions(shape, torch.device("cpu"), text_tokens={stage: 8}, stages=(stage,))
    ).stage(stage)
    system = "llava" if kind == "mlp2x_gelu" else kind
    model, trained = steps._models[system], steps.trained[system]
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=1e-6),
        config=settings(zero, shape.language["hidden_size"]),
    )
    engine.backward(engine(**steps.batches[system]).loss)
    if zero == 2:
        gradients = total(t for group in optimizer.averaged_gradients.values() for t in group)
    else:
        gradients = optimizer.grad_partitions_flat_buffer.nbytes
    engine.step()
    states = optimizer.optimizer.state.values()
    found = {
        "gradients": gradients,
        "moments": total(t for s in states for n, t in s.items() if n.startswith("exp_avg")),
    }
    parameters = list(model.parameters())
    if zero == 2:
        found["copies"] = total(optimizer.single_partition_of_fp32_groups)
        found["weights"] = total(parameters)
    else:
        found["copies"] = total(optimizer.fp32_partitioned_groups_flat)
        found["weights"] = total(p.ds_tensor for p in parameters)
        found["whole"] = total(p for p in parameters if p.ds_status.name == "AVAILABLE")
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
