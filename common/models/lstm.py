"""An LSTM that predicts the next token: a smaller version of LEAF's network for Shakespeare (Caldas et al. 2018).

LEAF has an embedding of 8 and two layers of 256 units, trained on GPUs; the default here is one
layer of 64, for CPUs. `lstm.hidden=256` and `lstm.layers=2` give LEAF's network.

The cell is written out (Hochreiter, Schmidhuber 1997, with forget gates), since torch.func.vmap
cannot map torch's own LSTM. Parameters have the names and initial distributions of torch.nn.LSTM:

    (i, f, g, o) = W_ih x_t + b_ih + W_hh h_t-1 + b_hh
    c_t = s(f) c_t-1 + s(i) tanh(g)
    h_t = s(o) tanh(c_t)
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from quickbloom.common.errors import ConfigError
from quickbloom.common.models.base import Model
from quickbloom.common.options import Options


class LstmOptions(Options):
    embedding: int = Field(8, ge=1, le=1024, description="dimension of the token embedding")
    hidden: int = Field(64, ge=1, le=2048, description="units of every layer")
    layers: int = Field(1, ge=1, le=2, description="LSTM layers on top of each other")


class Lstm(Model):
    """Embedding, LSTM layers, then Linear from the last hidden state to one output for every token."""

    name = "lstm"
    Options: ClassVar[type[Options]] = LstmOptions
    tokens = True

    @classmethod
    def build(cls, options: LstmOptions, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        if len(input_shape) != 1:
            raise ConfigError(
                f'`model = "lstm"` needs sequences of tokens, inputs of shape (length,), got inputs of shape {input_shape}: '
                'choose `model = "auto"`'
            )
        return NextToken(tokens or outputs, outputs, options.embedding, options.hidden, options.layers)


class NextToken(nn.Module):
    """Token ids [n, length], each in 0..tokens-1 -> [n, outputs]: logits of the token that follows, or an embedding."""

    def __init__(self, tokens: int, outputs: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, embedding)
        self.lstm = LstmLayers(embedding, hidden, layers)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        # A token's contribution to the gates does not depend on its position, so it is computed once per token id.
        projected = self.lstm.project(self.embedding.weight, 0)
        logits: Tensor = self.head(self.lstm(functional.embedding(x, projected)))
        return logits


class LstmLayers(nn.Module):
    """Stacked LSTM layers with the parameters of torch.nn.LSTM(inputs, hidden, layers)."""

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.hidden, self.layers = hidden, layers
        bound = hidden**-0.5
        for layer in range(layers):
            fan_in = hidden if layer else inputs
            for name, shape in (("weight_ih", [fan_in]), ("weight_hh", [hidden]), ("bias_ih", []), ("bias_hh", [])):
                value = torch.empty(4 * hidden, *shape).uniform_(-bound, bound)
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(value))

    def project(self, inputs: Tensor, layer: int) -> Tensor:
        """Return the contribution of the inputs [..., inputs] to the gates [..., 4 * hidden]."""
        weight, bias = self._of(layer, "weight_ih"), self._of(layer, "bias_ih") + self._of(layer, "bias_hh")
        return functional.linear(inputs, weight, bias)

    def forward(self, projected: Tensor) -> Tensor:
        """Return the last hidden state of the last layer [n, hidden].

        `projected`: the first layer's projected inputs [n, length, 4 * hidden].
        """
        states = self._run(projected, 0)
        for layer in range(1, self.layers):
            # One product for all time steps; only the recurrent part needs the loop.
            states = self._run(self.project(torch.stack(states, dim=-2), layer), layer)
        return states[-1]

    def _run(self, projected: Tensor, layer: int) -> list[Tensor]:
        recurrent = self._of(layer, "weight_hh").t()
        h = c = projected.new_zeros(projected.shape[0], self.hidden)
        states = []
        for step in projected.unbind(dim=-2):
            i, f, g, o = (step + h @ recurrent).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return states

    def _of(self, layer: int, name: str) -> Tensor:
        value: Tensor = getattr(self, f"{name}_l{layer}")
        return value
