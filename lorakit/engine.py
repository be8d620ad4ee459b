"""Devices and processes. The only importer of accelerate.

Proven on CPUs: one process, and two over gloo that take the steps of one with twice the batch.
On GPUs it is written, not tested. Dropout draws the same masks in every process.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Sums(Protocol):
    """What a step came to, each ()."""

    @property
    def part(self) -> Tensor:
        """The part of the loss that is of this process."""

    @property
    def norm(self) -> Tensor:
        """Of the gradient, the same in all processes."""


class Engine:
    """Where tensors live, and what must be agreed on between processes."""

    def __init__(self) -> None:
        # without a word of it, accelerate starts no process group on a machine of CPUs alone
        self._accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.device: torch.device = self._accelerator.device
        self.processes: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.is_main: bool = self._accelerator.is_main_process
        self.waits: bool = self.device.type != "cpu"
        """Whether to read a number is to wait for all that the device was asked for before."""
        self._exact = torch.float32 if self.device.type == "mps" else torch.float64

    def prepare(self, model: nn.Module, compiled: bool = False) -> nn.Module:
        """The model on its device, wrapped for as many processes as there are.

        `compiled` is by torch, in place: names of parameters stay.
        """
        if compiled:
            model.compile(dynamic=True)
        prepared: nn.Module = self._accelerator.prepare(model)
        return prepared

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the step's loss.

        Data-parallel training averages gradients over processes; the loss is divided by the items
        of all of them already, so the average is undone here.
        """
        self._accelerator.backward(loss * self.processes)

    def accumulating(self, model: nn.Module, more: bool) -> AbstractContextManager[object]:
        """Within it, gradients stay in their process while `more` batches of the step follow."""
        return self._accelerator.no_sync(model) if more else nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scales gradients down to a joint norm of `max_norm`; returns the norm before, ()."""
        limit = float("inf") if max_norm is None else max_norm
        norm: Tensor = self._accelerator.clip_grad_norm_(list(parameters), limit)
        return norm

    def read(self, steps: Sequence[Sums]) -> list[tuple[float, float]]:
        """The loss and the norm of each of `steps`; however many, the device is waited for once."""
        if not steps:
            return []
        parts = torch.stack([step.part for step in steps]).to(self._exact)
        if self.processes > 1:
            parts = self._accelerator.reduce(parts, reduction="sum")
        norms = torch.stack([step.norm for step in steps]).to(self._exact)
        return [(loss, norm) for loss, norm in torch.stack([parts, norms], dim=1).tolist()]

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def any(self, value: bool) -> bool:
        """Whether it is so in any process. Of several, all wait for each other."""
        if self.processes == 1:
            return value
        number = torch.tensor(float(value), device=self.device)
        return float(self._accelerator.reduce(number, reduction="sum")) > 0
