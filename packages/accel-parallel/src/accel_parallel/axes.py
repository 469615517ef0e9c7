"""What the axes besides data do to a model before it is sharded: tensor parallel, context and sequence parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from accel_parallel.mesh import Mesh
from accel_parallel.parallelism import ParallelismConfig
from accel_state.errors import ConfigError
from accel_state.logging import get_logger

if TYPE_CHECKING:
    from accel_parallel.sequence.attention import SequenceParallel
    from accel_parallel.tensor.apply import FirstInputs
    from accel_parallel.tensor.plan import TensorPlan

__all__ = ["ModelAxes"]

logger = get_logger(__name__)


class ModelAxes:
    """The axes along which ranks see the same samples. What is not asked for costs nothing, not even an import."""

    def __init__(self, mesh: Mesh, parallelism: ParallelismConfig) -> None:
        """
        Args:
            mesh: with its groups.
            parallelism: options of the axes; their sizes are the mesh's.

        Raises:
            ConfigError: for a backend that the device has no kernels for.
        """
        self._mesh = mesh
        self._parallelism = parallelism
        self._tp_size = mesh.topology.shape.tp
        self._unproven: list[tuple[nn.Module, TensorPlan, FirstInputs]] = []
        """Models whose inputs and copies of one gradient have not been compared yet."""
        self.sequence: SequenceParallel | None = self._sequence()
        """What divides sequences, where they are divided."""

    @property
    def divides_tensors(self) -> bool:
        """Whether there is tensor parallel."""
        return self._tp_size > 1

    def plan(self, model: nn.Module) -> TensorPlan | None:
        """How `model` will be divided along tp, after checking that it can. Changes nothing.

        Raises:
            ConfigError: for what cannot be divided exactly.
        """
        if self.sequence is not None:
            self.sequence.check(model)
        if self._tp_size == 1:
            return None
        from accel_parallel.tensor.plan import plan_tensor_parallel

        return plan_tensor_parallel(
            model,
            plan=self._parallelism.tp_plan,
            tp_size=self._tp_size,
            loss_parallel=self._parallelism.loss_parallel,
        )

    def apply(self, model: nn.Module, plan: TensorPlan | None) -> None:
        """Every rank must call this. Divide `model` along tp, and let its attention reach over whole sequences."""
        if plan is not None:
            assert self._mesh.tp is not None
            from accel_parallel.tensor.apply import FirstInputs, apply_tensor_parallel

            apply_tensor_parallel(model, plan, self._mesh.tp)
            logger.info("%s", plan)
            self._unproven.append((model, plan, FirstInputs(model)))
        if self.sequence is not None:
            self.sequence.attach(model)

    def after_backward(self) -> None:
        """Every rank must call this. Once a model has gradients, compare those that its tp ranks hold alike, once.

        Raises:
            ConfigError: for other inputs, or naming the parameter whose gradients differ, as under other dropout masks.
        """
        if not self._unproven:
            return
        from accel_parallel.tensor.apply import audit_replicas

        assert self._mesh.tp is not None
        for each in self._unproven[:]:
            model, plan, inputs = each
            if any(parameter.grad is not None for parameter in model.parameters()):
                inputs.refuse_other(self._mesh.tp)
                audit_replicas(model, plan, self._mesh.tp)
                self._unproven.remove(each)

    def _sequence(self) -> SequenceParallel | None:
        shape = self._mesh.topology.shape
        if shape.cp == 1 and shape.sp == 1:
            return None
        from accel_parallel.sequence.attention import SequenceParallel

        if self._parallelism.sp_backend == "deepspeed":
            raise ConfigError(
                f"`sp_backend='deepspeed'` (`sp_size={shape.sp}`) is for models that DeepSpeed trains, and FSDP "
                f"spreads these. Give a `deepspeed_plugin`, or use `sp_backend='native'`."
            )
        in_context = shape.cp > 1
        return SequenceParallel(
            self._mesh.group("cp" if in_context else "sp"),
            kind="context" if in_context else "ulysses",
            backend=self._parallelism.cp_backend if in_context else "native",
            options=self._parallelism.cp_handler,
            device_type=self._mesh.root.device_type,
            tp_size=self._tp_size,
        )
