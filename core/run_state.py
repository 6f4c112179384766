"""What training changes of a network and its optimizer, as one dictionary of tensors and back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Optimizer = torch.optim.Optimizer
Scaler = torch.amp.GradScaler
_NETWORK, _AVERAGE, _OPTIMIZER, _SCALER = "network.", "average.", "optimizer.", "scaler."


def read_state(
    network: nn.Module, average: nn.Module | None, optimizer: Optimizer, scaler: Scaler
) -> dict[str, Tensor]:
    """Collect what training has changed, by name.

    Args:
        network: In the mode in which it trains: statistics of parts in eval mode do not change.
        average: The moving average of its weights, if there is one.
        optimizer: Of its trained parameters.
        scaler: Of its gradients.

    Returns:
        The live tensors of network, average and optimizer; copies of the scaler's numbers.
    """
    state = _in_place(network, average)
    for number, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if value is not None:
                state[f"{_OPTIMIZER}{number}.{name}"] = torch.as_tensor(value)
    for name, value in scaler.state_dict().items():
        state[_SCALER + name] = torch.tensor(value)
    return state


def write_state(
    state: Mapping[str, Tensor],
    network: nn.Module,
    average: nn.Module | None,
    optimizer: Optimizer,
    scaler: Scaler,
) -> None:
    """Bring everything to where it was when `read_state` was called.

    Raises:
        ValueError: The state is of another network; nothing has been changed then.
        LookupError: The same, of another optimizer or scaler.
    """
    live = _in_place(network, average)
    told = {name for name in state if name.startswith((_NETWORK, _AVERAGE))}
    if told != set(live) or any(live[name].shape != state[name].shape for name in told):
        raise ValueError("it holds other weights than this run trains")
    memory = _optimizer_memory(state, optimizer)
    scale = {name: state[_SCALER + name].item() for name in scaler.state_dict()}
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(state[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": memory, "param_groups": groups})
    if scale:
        scaler.load_state_dict(scale)


def _in_place(network: nn.Module, average: nn.Module | None) -> dict[str, Tensor]:
    """Return the tensors that training writes into."""
    found: dict[str, Tensor] = {
        _NETWORK + name: p for name, p in network.named_parameters() if p.requires_grad
    }
    for name, module in network.named_modules():
        if module.training:
            for buffer_name, buffer in module.named_buffers(name, recurse=False):
                found[_NETWORK + buffer_name] = buffer
    if average is not None:  # all of it: averaging moves frozen weights too, by rounding
        found |= {_AVERAGE + name: value for name, value in average.state_dict().items()}
    return found


def _optimizer_memory(
    state: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[int, dict[str, Tensor]]:
    """Return what the optimizer remembers of each parameter, by the parameter's place."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    for key, kept in state.items():
        if key.startswith(_OPTIMIZER):
            _, number, name = key.split(".")
            parameter = own[int(number)]
            if kept.shape == parameter.shape:  # laid out as its parameter, not as in the file
                kept = torch.empty_like(parameter, requires_grad=False).copy_(kept)
            found.setdefault(int(number), {})[name] = kept
    return found
