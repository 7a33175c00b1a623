"""Export of a personal model with its frozen encoder as one ONNX file, for programs that have the examples and nothing else.

    input   what the encoder's own file reads: token ids and their mask, pictures, or numbers
    output  float32 [n, classes] probabilities, or [n, 1] the target in its own unit

The file is read back and compared with encoder and model, one after the other, before it replaces an existing one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quickbloom.common.datasets.own.encoded import LENGTH
from quickbloom.common.encoders import load_encoder
from quickbloom.common.encoders.onnx_file import OnnxEncoder
from quickbloom.common.encoders.pooling import pooled
from quickbloom.common.errors import DataError, in_one_line
from quickbloom.common.personal.model import Personal

_STATES, _MASK, _PREFIX = "states", "mask", "personal/"


class AfterEncoder(nn.Module):
    """What follows an encoder's states [n, ...]: pooling, the shared mean, and the personal model."""

    def __init__(self, model: nn.Module, mean: list[float], size: int, pooling: str) -> None:
        super().__init__()
        self.model, self._pooling, self._moves = model, pooling, bool(mean)
        self.centre: Tensor  # not `mean`, a name that the exporter gives an operation of its own
        self.register_buffer("centre", torch.tensor(mean or [0.0] * size))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        x = nn.functional.normalize(pooled(states, mask, self._pooling), dim=1)
        if self._moves:
            x = nn.functional.normalize(x - self.centre, dim=1)
        found: Tensor = self.model(LENGTH * x)
        return found


def write_with_encoder(module: nn.Module, personal: Personal, path: Path) -> None:
    """Write encoder and model to `path`. `module`: the model from features to outputs. Raises DataError."""
    encoder = _encoder_of(personal)
    examples = _made_up(encoder)
    feed, mask = encoder.feed(examples)
    states = torch.from_numpy(encoder.states(feed))
    (mean,) = personal.preparation.encoded.values()
    after = AfterEncoder(module, list(mean), encoder.size, encoder.pooling).eval()
    inputs: tuple[Tensor, ...] = (states,) if mask is None or states.ndim != 3 else (states, mask)
    expected = after(*inputs)
    try:
        merged = _merged(encoder, _written(after, inputs))
        path.write_bytes(merged.SerializeToString())
        came = _run(path, feed)
    except Exception as error:  # onnx and the runtime raise a dozen types
        raise DataError(
            f"encoder and model cannot be written as one file ({in_one_line(error)}): export the model alone, without "
            "`--with-encoder`"
        ) from error
    if not np.allclose(came, expected.detach().numpy(), rtol=1e-4, atol=1e-4):
        raise DataError("the file gives other outputs than encoder and model themselves: it is not kept")


def _encoder_of(personal: Personal) -> OnnxEncoder:
    """Return the model's encoder. Raises DataError if the two cannot be one file."""
    if not personal.schema.encoder or personal.card["tokens"]:
        raise DataError(f"the personal model of '{personal.task}' has no frozen encoder: leave `--with-encoder` out")
    options = personal.own_options
    if not options.encoder.startswith("onnx:"):
        raise DataError(f"`--with-encoder` needs an encoder in an ONNX file, got '{options.encoder}'")
    if len(personal.preparation.features) != 1:
        raise DataError(
            f"the personal model of '{personal.task}' reads {len(personal.preparation.features)} columns, and one file can "
            "begin with one encoder alone: export the model, and the encoder is a file already"
        )
    found = load_encoder(options.encoder, options.encoder_pooling)
    assert isinstance(found, OnnxEncoder)
    if found.digest != personal.schema.encoder["digest"]:
        raise DataError(
            f"the encoder '{options.encoder}' has the SHA-256 {found.digest}, the model's has "
            f"{personal.schema.encoder['digest']}: say with `--encoder` where that is"
        )
    return found


def _made_up(encoder: OnnxEncoder) -> list[Any]:
    rng = np.random.default_rng(0)
    if encoder.kind == "text":
        return ["one", "two words", "and three more words"]
    if encoder.kind == "images":
        return list(rng.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8))
    return list(rng.normal(size=(3, encoder.columns or 1)).astype(np.float32))


def _written(after: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Return the ONNX model of what follows the encoder."""
    names = [_STATES, _MASK][: len(inputs)]
    count, length = torch.export.Dim("examples"), torch.export.Dim("length")
    shapes: list[Mapping[int, Any]] = [
        {0: count, 1: length} if value.ndim in (2, 3) and len(inputs) > 1 else {0: count} for value in inputs
    ]
    program = torch.onnx.export(
        after, inputs, dynamo=True, dynamic_shapes=tuple(shapes), verbose=False, input_names=names, output_names=["outputs"]
    )
    assert program is not None
    return program.model_proto


def _merged(encoder: OnnxEncoder, after: Any) -> Any:
    """Return one model: the encoder's nodes, then the others with its output, and its mask, as their inputs."""
    import onnx
    from onnx import compose, version_converter

    before = onnx.load(encoder.file)
    version = {one.domain: one.version for one in after.opset_import}.get("", 0)
    if {one.domain: one.version for one in before.opset_import}.get("", 0) != version:
        before = version_converter.convert_version(before, version)
    after = compose.add_prefix(after, _PREFIX, rename_outputs=False)
    ours = {f"{_PREFIX}{_STATES}": encoder.output, f"{_PREFIX}{_MASK}": "attention_mask"}
    for node in after.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = ours.get(name, name)
    graph = onnx.helper.make_graph(
        [*before.graph.node, *after.graph.node],
        "encoder_and_personal_model",
        list(before.graph.input),
        list(after.graph.output),
        [*before.graph.initializer, *after.graph.initializer],
        value_info=[*before.graph.value_info, *after.graph.value_info],
    )
    domains = {one.domain: one for one in [*before.opset_import, *after.opset_import]}
    merged = onnx.helper.make_model(
        graph, opset_imports=list(domains.values()), functions=[*before.functions, *after.functions]
    )
    merged.ir_version = max(before.ir_version, after.ir_version)
    onnx.checker.check_model(merged)
    return merged


def _run(path: Path, feed: Mapping[str, Any]) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(["outputs"], dict(feed))[0]
