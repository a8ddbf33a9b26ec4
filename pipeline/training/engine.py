"""The DeepSpeed engine: parameter groups, schedule, averaged weights, steps that are not finite.

DeepSpeed's ZeRO stages keep parameters and moments in layouts of their own. This file is the one
place that knows them: out of it come and into it go plain tensors by parameter name.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.detectors.backbone import Backbone, ParameterRule
from pipeline.errors import RecipeError
from pipeline.recipe import Training
from pipeline.training.checkpoint import State

# DeepSpeed chooses its accelerator while it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

MOMENTS = ("exp_avg", "exp_avg_sq")


def schedule_factor(step: int, section: Training) -> float:
    """What the learning rates are multiplied by in step `step` (from 0): a pure function.

    Linear warm-up, then drops at `drop_steps` or a half cosine down to 0 at the last step.
    """
    if step < section.warmup_steps:
        return (step + 1) / (section.warmup_steps + 1)
    if section.schedule == "cosine":
        progress = (step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    return section.drop_factor ** sum(step >= drop for drop in section.drop_steps)


def parameter_groups(module: nn.Module, section: Training) -> list[dict[str, Any]]:
    """AdamW groups: the backbone has its own learning rate, which may fall from layer to layer;
    norms, biases and what the backbone excepts are not decayed.

    Each group is {params, lr, base_lr, weight_decay}.
    """
    rules = _backbone_rules(module)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rule = rules.get(name, ParameterRule(1.0, parameter.ndim > 1))
            kind = "backbone" in name.split("."), rule.rate, rule.decayed
            groups.setdefault(kind, []).append(parameter)
    rates = {False: section.learning_rate, True: section.backbone_learning_rate}
    return [
        {
            "params": parameters,
            "lr": rates[of_backbone] * rate,
            "base_lr": rates[of_backbone] * rate,
            "weight_decay": section.weight_decay if decayed else 0.0,
        }
        for (of_backbone, rate, decayed), parameters in sorted(
            groups.items(), key=lambda item: item[0]
        )
    ]


def _backbone_rules(module: nn.Module) -> dict[str, ParameterRule]:
    """What backbones say of their parameters, by the names that these have in the module."""
    return {
        f"{prefix}.{name}" if prefix else name: rule
        for prefix, child in module.named_modules()
        if isinstance(child, Backbone)
        for name, rule in child.parameter_rules().items()
    }


def num_micro_batches(batch_size: int, micro_batch: int, world_size: int) -> int:
    """How many micro-batches each rank runs per step; the last ones may hold padding samples."""
    return math.ceil(math.ceil(batch_size / world_size) / micro_batch)


def named_persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the state dict."""
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def init_process_group(device: torch.device, patience: timedelta | None = None) -> None:
    """Make the default process group, which must exist, known to DeepSpeed; all ranks call it.

    `patience` is how long a rank waits for another from now on, by default as long as the groups
    were made for. Raises `RecipeError` when DeepSpeed works on another kind of device than
    `device`.

    The compiled shared-memory operator of the CPU accelerator is declined: it would be built with
    a C++ compiler at first use, and gloo does the same work.
    """
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", "0")
    accelerator = get_accelerator().device_name()
    if accelerator != device.type:
        raise RecipeError(
            f"workers of this recipe use {device.type}, but DeepSpeed found {accelerator}; set "
            f"cluster.gpus_per_worker to fit, or DS_ACCELERATOR={device.type} in the environment"
        )
    backend = dist.get_backend()
    deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
    # DeepSpeed's own group, of the same ranks, would have PyTorch's default of 10 or 30 minutes.
    for group in (dist.group.WORLD, groups._get_data_parallel_group()):
        if patience is not None:
            dist.set_timeout(patience, group)
        # NCCL connects in the first call, by a store that keeps the patience of the rendezvous.
        dist.all_reduce(torch.zeros(1, device=device), group=group)


@dataclass(frozen=True)
class _Fragment:
    """The part of a parameter that this rank updates: `numel` elements, from `flat_start` in the
    optimizer's tensor `flat`, from `start` in the flattened parameter."""

    flat: Tensor
    flat_start: int
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """This part of a tensor that is laid out as `self.flat`."""
        return flat.detach().view(-1).narrow(0, self.flat_start, self.numel)


class Engine:
    """One worker's share of the model and optimizer."""

    def __init__(
        self,
        module: nn.Module,
        section: Training,
        accumulation: int,
        restored: State | None = None,
    ) -> None:
        """Take over `module`, whose weights are loaded and which is on its device.

        `accumulation` is the number of micro-batches of a step; `restored` continues an optimizer
        and averaged weights (its `weights` must be in the module already).
        """
        self.section = section
        self.accumulation = accumulation
        self.shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        # Any, because DeepSpeed hangs its own attributes on parameters.
        self._trainable: dict[str, Any] = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        names = self.shapes.keys() | dict(named_persistent_buffers(module)).keys()
        assert names == module.state_dict().keys(), "a parameter has two names in the state dict"
        num_elements = sum(parameter.numel() for parameter in self._trainable.values())
        # On the host the fused step goes once over its tensors and needs no room beside them.
        fused = True if section.offload != "none" else None
        optimizer = torch.optim.AdamW(parameter_groups(module, section), fused=fused)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_config(section, accumulation, num_elements),
            dist_init_required=False,
        )
        self._optimizer = self._engine.optimizer
        self._adamw = optimizer if section.zero_stage == 0 else self._optimizer.optimizer
        self._fragments = dict(self._own_fragments())
        self._restore_moments(restored)
        self._averages = {
            name: fragment.of(fragment.flat).clone()
            for name, fragment in self._fragments.items()
            if section.ema_decay > 0
        }
        if restored is not None:
            for name, average in self._averages.items():
                self._copy_own_part(average, restored.averaged[name], name)

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        device: torch.device = torch.device(self._engine.device)
        return device

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """The student's losses of one micro-batch."""
        losses: dict[str, Tensor] = self._engine(*inputs)
        return losses

    def backward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Back-propagate one micro-batch; returns the detached sum of its losses.

        Losses are parts of the global batch's loss. DeepSpeed averages over workers and
        micro-batches, so they are multiplied by both counts: the gradient is that of the plain
        sum. A sum that is not finite makes every gradient NaN, which `step` sees on all ranks.
        """
        total = torch.stack(list(losses.values())).sum()
        poison = torch.where(total.detach().isfinite(), 1.0, math.nan)
        self._engine.backward(total * (poison * (dist.get_world_size() * self.accumulation)))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        return total.detach()

    def step(self, step: int) -> float:
        """Update the weights with the learning rates of step `step`; returns the gradient's norm.

        Where a gradient is not finite on any rank, weights and moments stay as they are on all
        ranks, and the norm that is returned is not finite either.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "a micro-batch is missing"
        factor = schedule_factor(step, self.section)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if self.section.zero_stage == 0:
            norm = self._step_replicated()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if self.section.zero_stage == 3:
            # Without this a parameter that takes no part in the next step would be updated again
            # with this step's gradient: DeepSpeed copies into the buffer and never clears it.
            self._optimizer.grad_partitions_flat_buffer.zero_()
        if self.section.offload != "none":
            # The same of the gradients on the host, which are copied into, at stages 1 and 2 too.
            for flat in self._optimizer_tensors():
                assert flat.grad is not None
                flat.grad.zero_()
            # Stage 2 adds up micro-batches elsewhere, on what is there unless it is the first.
            for added_up in getattr(self._optimizer, "accumulated_grads_in_cpu", {}).values():
                added_up.zero_()
        if math.isfinite(norm):
            for name, average in self._averages.items():
                fragment = self._fragments[name]
                average.lerp_(fragment.of(fragment.flat), 1 - self.section.ema_decay)
        return norm

    def state(self) -> State | None:
        """Gather the whole state on rank 0, None elsewhere; every rank must call it.

        Only rank 0 copies it to host memory: a node has room for one copy, not for one per GPU.
        """
        first = dist.get_rank() == 0
        if self.section.zero_stage == 0 and not first:
            return None  # Rank 0 has all of it itself, and waits for nobody.
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "averaged": {}, "moments": {}}
        for part, name, tensor in self._gathered():
            if first:
                parts[part][name] = tensor.detach().to("cpu", copy=True)
        if not first:
            return None
        for name, buffer in named_persistent_buffers(self._engine.module):
            parts["weights"][name] = buffer.detach().cpu()
        updates = int(next(iter(self._adamw.state.values()))["step"])
        return State(**parts, updates=updates)

    def _step_replicated(self) -> float:
        """Stage 0 of DeepSpeed neither reports a norm nor guards against NaN gradients."""
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
            self._engine.micro_steps += 1
        return norm

    def _own_fragments(self) -> Iterator[tuple[str, _Fragment]]:
        """What this rank updates, in each stage's layout."""
        stage, optimizer = self.section.zero_stage, self._optimizer
        for name, parameter in self._trainable.items():
            if stage == 0:
                yield name, _Fragment(parameter, 0, 0, parameter.numel())
            elif stage < 3:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                    inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield name, _Fragment(flat, inside.start, whole.start, inside.numel)
            else:
                group, flat_start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = dist.get_rank() * parameter.partition_numel()
                numel = min(int(size), self.shapes[name].numel() - start)
                if numel > 0:
                    flat = optimizer.fp32_partitioned_groups_flat[group]
                    yield name, _Fragment(flat, int(flat_start), start, numel)

    def _optimizer_tensors(self) -> Sequence[Tensor]:
        if self.section.zero_stage == 0:
            return list(self._trainable.values())
        if self.section.zero_stage < 3:
            return self._optimizer.single_partition_of_fp32_groups
        return self._optimizer.fp32_partitioned_groups_flat

    def _restore_moments(self, restored: State | None) -> None:
        """Create AdamW's state, which it would otherwise create in its first step, and fill it."""
        for flat in self._optimizer_tensors():
            self._adamw.state[flat] = {
                "step": torch.tensor(float(restored.updates if restored else 0)),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if restored is None:
            return
        for name, fragment in self._fragments.items():
            for moment in MOMENTS:
                own = fragment.of(self._adamw.state[fragment.flat][moment])
                self._copy_own_part(own, restored.moments[f"{moment}/{name}"], name)

    def _copy_own_part(self, own: Tensor, whole: Tensor, name: str) -> None:
        fragment = self._fragments[name]
        own.copy_(whole.flatten().narrow(0, fragment.start, fragment.numel))

    def _gathered(self) -> Iterator[tuple[str, str, Tensor]]:
        """Each tensor of a `State` but the buffers, after its field and name; collective calls.

        It is whole on rank 0, and only until the next one is asked for.
        """
        for name, parameter in self._engine.module.named_parameters():
            if name in self._trainable:
                continue
            partitioned = [parameter] if self.section.zero_stage == 3 else []
            with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
                yield "weights", name, parameter
        for name in self._trainable:
            fragment = self._fragments.get(name)
            flat = fragment.flat if fragment else None
            yield "weights", name, self._whole(name, flat)
            for moment in MOMENTS:
                own = None if flat is None else self._adamw.state[flat][moment]
                yield "moments", f"{moment}/{name}", self._whole(name, own)
            if self.section.ema_decay > 0:
                yield "averaged", name, self._whole(name, None, self._averages.get(name))

    def _whole(self, name: str, flat: Tensor | None, own: Tensor | None = None) -> Tensor:
        """A parameter-shaped tensor on rank 0 from each rank's part; a collective call.

        The part is cut from `flat`, laid out as the optimizer's tensor, or given as `own`.
        """
        fragment = self._fragments.get(name)
        if fragment is not None and flat is not None:
            own = fragment.of(flat)
        if self.section.zero_stage == 0:
            assert own is not None
            return own.view(self.shapes[name])
        whole = torch.zeros(self.shapes[name].numel(), device=self.device)
        if fragment is not None and own is not None:
            whole.narrow(0, fragment.start, fragment.numel).copy_(own)
        dist.reduce(whole, dst=0)
        return whole.view(self.shapes[name])


def _config(section: Training, accumulation: int, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; buckets are no larger than the model."""
    bucket = max(1, min(num_elements, 50_000_000))
    moved = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}
    offload = {f"offload_{what}": {"device": "cpu"} for what in moved[section.offload]}
    return {
        "train_micro_batch_size_per_gpu": section.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": section.clip_norm,
        "zero_optimization": {
            "stage": section.zero_stage,
            "overlap_comm": get_accelerator().device_name() != "cpu",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # DeepSpeed's own linear layer lets stage 3 give up gathered weights, which PyTorch's
            # would keep. In bfloat16 a copy is kept anyway, and it would round a second time.
            "memory_efficient_linear": section.precision == "float32",
            **offload,
        },
        # Gradients are float32, as weights are, and so is DeepSpeed's default; this pins it.
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for the host is compiled at first use; PyTorch's is there.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
