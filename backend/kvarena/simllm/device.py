"""Which device a request for one gets on this machine."""

from __future__ import annotations

import warnings

import torch


def available_device(name: str) -> torch.device:
    """The device of that name, or with a `RuntimeWarning` the CPU where the machine has none of the kind.

    Raises `ValueError` for what isn't a device's name.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a PyTorch device, as cpu, cuda or cuda:1, not {name!r}") from error
    if device.type == "cpu" or _is_there(device):
        return device
    warnings.warn(f"this machine has no {name}; using the CPU", RuntimeWarning, stacklevel=3)
    return torch.device("cpu")


def _is_there(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (
        accelerator is not None
        and accelerator.type == device.type
        and (device.index or 0) < torch.accelerator.device_count()
    )
