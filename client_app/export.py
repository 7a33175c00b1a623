"""Export of a personal model for other programs: ONNX, or PyTorch's own exported program (.pt2).

    input   float32 [n, ...]: rows as the model's preparation makes them (`preparation` in the card: scales, one-hots)
    output  float32 [n, classes] probabilities, or [n, 1] the target in its own unit

The written file is read back and compared with the model before it replaces an existing one.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quickbloom.client_app.export_whole import write_with_encoder
from quickbloom.client_app.offline.files import fits_together, one_model, placed
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.personal.model import Personal, spec_of
from quickbloom.common.system.extras import needs

TOLERANCE = 1e-5
"""Largest difference between outputs of the exported model and of the model itself, both absolute and relative."""


class PersonalModule(nn.Module):
    """A personal model as one torch module."""

    def __init__(self, model: Personal) -> None:
        super().__init__()
        self._algorithm = deepcopy(model.algorithm)
        self.module = self._algorithm.learner.module
        own = dict(self.module.named_parameters())
        # What is not in the personal model, frozen parameters and buffers, is in the module.
        self.module.load_state_dict({name: value for name, value in model.tensors.items() if name in own}, strict=False)
        # Tensors of a personal model that are not in the module, such as prototypes.
        self._extra = [name for name in model.tensors if name not in own]
        for name in self._extra:
            self.register_buffer(_as_buffer(name), model.tensors[name])
        self.requires_grad_(False)
        target = Preparation.from_json(model.card["preparation"]).target
        self._scale = None if target is None else (target.mean, target.deviation)
        self._temperature = model.temperature
        self._classes = model.card["spec"][0] == "classification"

    def forward(self, x: Tensor) -> Tensor:
        params = dict(self.module.named_parameters()) | {name: getattr(self, _as_buffer(name)) for name in self._extra}
        outputs = self._algorithm.predict(params, x)
        if self._classes:
            return (outputs / self._temperature).softmax(dim=-1)
        return outputs if self._scale is None else outputs * self._scale[1] + self._scale[0]


def _as_buffer(name: str) -> str:
    """Return a tensor's name as torch takes it for a buffer: without a dot."""
    return name.replace(".", "__")


def export(
    model: str | Path,
    output: str | Path,
    form: str,
    trust: Collection[str] = (),
    *,
    with_encoder: bool = False,
    encoder: str = "",
) -> Path:
    """Write the personal model `model` to `output` as "onnx" or "torch" (torch.export); return the path.

    `trust`, `encoder`: see `client_app.offline.adapting.adapt`. `with_encoder`: write the frozen encoder into the same file,
    see `client_app.export_whole`. Raises ConfigError or DataError, also if the outputs of
    the copy differ from the model's by more than 1e-5.
    """
    if form not in _WRITERS:
        raise ConfigError(f"`--format` must be {' or '.join(_WRITERS)}, got '{form}'")
    for needed in _MODULES[form]:
        needs("export", needed, f"`--format {form}`")
    if with_encoder and form != "onnx":
        raise ConfigError(f"`--with-encoder` is for `--format onnx`, got '{form}'")
    personal = one_model(Path(model).expanduser(), trust)
    if encoder or with_encoder:
        personal = placed(personal, trust, encoder)
    path, write, read = Path(output).expanduser(), *_WRITERS[form]
    with fits_together(f"the personal model of '{personal.task}'"):
        module = PersonalModule(personal).eval()
    spec = spec_of(personal.card)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, *spec.input_shape, generator=draw)
    if spec.tokens:
        x = torch.randint(spec.tokens, (5, *spec.input_shape), generator=draw)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _silence(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / "model.pt2"  # the only suffix that PyTorch accepts
        if with_encoder:
            write_with_encoder(module, personal, partial)
            partial.replace(path)
            return path
        try:
            write(module, x, partial)
        except ConfigError:
            raise
        except Exception as error:  # the exporters raise a dozen types
            raise DataError(f"the model cannot be written as {form} ({in_one_line(error)}): use the other format") from error
        for number in (5, 1, 3):
            _compare(module(x[:number]), read(partial, x[:number]), form)
        partial.replace(path)
    return path


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the exporters' log lines and warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _compare(expected: Tensor, came: Tensor, form: str) -> None:
    if not torch.allclose(came, expected, rtol=TOLERANCE, atol=TOLERANCE):
        worst = float((came - expected).abs().max())
        raise DataError(
            f"the model written as {form} gives other outputs than the model itself, by {worst:.2g}: it is not kept"
        )


def _write_torch(module: nn.Module, x: Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=_SHAPES), path)


def _read_torch(path: Path, x: Tensor) -> Tensor:
    result: Tensor = torch.export.load(path).module()(x)
    return result


def _write_onnx(module: nn.Module, x: Tensor, path: Path) -> None:
    program = torch.onnx.export(
        module, (x,), dynamo=True, dynamic_shapes=_SHAPES, verbose=False, input_names=["x"], output_names=["outputs"]
    )
    assert program is not None
    program.save(str(path), external_data=False)


def _read_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(outputs)


_SHAPES = ({0: torch.export.Dim("examples")},)
_MODULES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}
_WRITERS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path, Tensor], Any]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "torch": (_write_torch, _read_torch),
}
