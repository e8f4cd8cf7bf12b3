"""`nn.RNN`, `nn.GRU` and `nn.LSTM` in plain tensor operations: torch's own have no rule for `vmap`.

The equations are those of torch's documentation of the three layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

States = list[Tensor]
"""The state of one layer and direction: h, and for an LSTM c."""


def recurrent_forward(module: nn.RNNBase, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None) -> object:
    """What `module(input, hx)` gives: outputs [B, L, ...] and the last states [layers * directions, B, ...].

    Args:
        module: batch-first and without dropout between layers (`layers.trained_layers` refuses others).
        input: [B, L, D].
        hx: initial states as torch takes them; zeros where None.
    """
    directions = ["", "_reverse"] if module.bidirectional else [""]
    given = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    outputs = input
    last: list[States] = []
    for layer in range(module.num_layers):
        of_layer = []
        for suffix in directions:
            states = [state[len(last)] for state in given] or _zeros(module, input)
            out, states = _one_direction(module, f"_l{layer}{suffix}", outputs, states)
            of_layer.append(out)
            last.append(states)
        outputs = torch.cat(of_layer, dim=2)
    stacked = tuple(torch.stack(of_kind) for of_kind in zip(*last, strict=True))
    return outputs, stacked if module.mode == "LSTM" else stacked[0]


def _zeros(module: nn.RNNBase, input: Tensor) -> States:
    h = input.new_zeros(input.shape[0], module.proj_size or module.hidden_size)
    return [h, input.new_zeros(input.shape[0], module.hidden_size)] if module.mode == "LSTM" else [h]


def _one_direction(module: nn.RNNBase, name: str, inputs: Tensor, states: States) -> tuple[Tensor, States]:
    """Outputs [B, L, H] and the last states of one layer in one direction."""

    def of(kind: str) -> Tensor | None:
        found: Tensor | None = getattr(module, f"{kind}{name}", None)
        return found

    weight_ih, weight_hh = of("weight_ih"), of("weight_hh")
    assert weight_ih is not None
    assert weight_hh is not None
    from_inputs = functional.linear(inputs, weight_ih, of("bias_ih"))
    steps = range(inputs.shape[1])
    backwards = name.endswith("_reverse")
    outputs = []
    for step in reversed(steps) if backwards else steps:
        from_state = functional.linear(states[0], weight_hh, of("bias_hh"))
        states = _cell(module.mode, from_inputs[:, step], from_state, states)
        projection = of("weight_hr")
        if projection is not None:
            states[0] = functional.linear(states[0], projection)
        outputs.append(states[0])
    return torch.stack(outputs[::-1] if backwards else outputs, dim=1), states


def _cell(mode: str, from_inputs: Tensor, from_state: Tensor, states: States) -> States:
    if mode == "GRU":
        (input_r, input_z, input_n), (state_r, state_z, state_n) = from_inputs.chunk(3, 1), from_state.chunk(3, 1)
        reset, update = torch.sigmoid(input_r + state_r), torch.sigmoid(input_z + state_z)
        new = torch.tanh(input_n + reset * state_n)
        return [(1 - update) * new + update * states[0]]
    gates = from_inputs + from_state
    if mode == "LSTM":
        into, forget, cell, out = gates.chunk(4, 1)
        memory = torch.sigmoid(forget) * states[1] + torch.sigmoid(into) * torch.tanh(cell)
        return [torch.sigmoid(out) * torch.tanh(memory), memory]
    return [torch.tanh(gates) if mode == "RNN_TANH" else torch.relu(gates)]
