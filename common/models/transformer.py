"""A pretrained encoder of the library `transformers`, whole or with a low-rank adapter (LoRA).

The encoder and its weights are read from a directory, as `save_pretrained` writes it or a package holds it; nothing is
fetched, and no code or pickle in it is run. With an adapter (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language
Models", by the library `peft`) the encoder is a constant, and only the adapter and the layer to the outputs are trained:
W x + alpha / rank * B A x with A drawn and B zero, so that training starts from what the encoder can do.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from quickbloom.common.errors import ConfigError, as_told, in_one_line
from quickbloom.common.maths.inner_loop import is_differentiated_twice
from quickbloom.common.models.base import Model
from quickbloom.common.options import Options, Text
from quickbloom.common.system.extras import needs

_SUBJECT = '`model = "transformer"`'


class TransformerOptions(Options):
    directory: str = Field("", description="directory of the encoder: config.json and model.safetensors; nothing is fetched")
    pooling: Literal["mean", "class", "last"] = Field(
        "mean", description="what a text is: the mean of the last states of its tokens, that of the first or of the last one"
    )
    unit: bool = Field(False, description="scale what a text is to length 1")
    centre: bool = Field(
        False, description="with `unit`: move what a text is by a learned centre, and scale it to length 1 again"
    )
    lora_rank: int = Field(0, ge=0, le=1024, description="rank of the adapter, which alone is trained; 0: none, all is trained")
    lora_targets: Text = Field(
        "auto", description="layers with an adapter, by the ends of their names, with commas; auto: query and value"
    )
    lora_alpha: float = Field(16.0, gt=0, description="the adapter's outputs are multiplied by this over the rank")


class Transformer(Model):
    """The encoder, pooling over tokens, then Linear to the outputs, or none where an embedding is wanted."""

    name = "transformer"
    Options: ClassVar[type[Options]] = TransformerOptions
    tokens = True
    pretrained = True

    @classmethod
    def embedding(cls, options: TransformerOptions, input_shape: tuple[int, ...]) -> int:
        return int(_config(options.directory).hidden_size)

    @classmethod
    def build(cls, options: TransformerOptions, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        seed = torch.initial_seed()
        config = _config(options.directory)
        _check_inputs(config, input_shape, tokens)
        encoder = _load(options.directory)
        torch.manual_seed(seed)  # reading may have drawn numbers
        if options.lora_rank:
            _add_adapter(encoder, options)
        head = nn.Linear(config.hidden_size, outputs) if outputs else None
        return TextEncoder(encoder, head, options.pooling, unit=options.unit, centre=options.centre)


class Centre(nn.Module):
    """[n, size] -> [n, size], moved by a learned centre: a layer, so that the one after it is the last layer of the model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.at


class TextEncoder(nn.Module):
    """Token ids [n, length] -> [n, outputs], or the pooled state [n, hidden]; padding is on the right and has no effect."""

    def __init__(self, encoder: Any, head: nn.Linear | None, pooling: str, *, unit: bool, centre: bool = False) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self._pooling, self._unit = pooling, unit
        self.centre = Centre(encoder.config.hidden_size) if unit and centre else None
        self._padding = int(encoder.config.pad_token_id)
        self._fuses = bool(getattr(encoder, "_supports_sdpa", False))
        self._causal = _is_causal(encoder)
        self._more = {"use_cache": False} if self._causal else {}

    def forward(self, x: Tensor) -> Tensor:
        if self._fuses:
            # The fused kernels lack a second derivative, and a rule for vmap.
            self.encoder.config._attn_implementation = "eager" if is_differentiated_twice() else "sdpa"
        real = x != self._padding
        states = self.encoder(input_ids=x, attention_mask=self._mask(real), **self._more).last_hidden_state
        pooled = self._pooled(states, real)
        if self._unit:
            pooled = nn.functional.normalize(pooled, dim=-1)
        if self.centre is not None:
            pooled = nn.functional.normalize(self.centre(pooled), dim=-1)
        return pooled if self.head is None else self.head(pooled)

    def _mask(self, real: Tensor) -> Tensor:
        """Return what is added to the scores of attention [n, 1, 1 or length, length].

        A mask of 0 and 1 is turned into this by code that looks at values, which cannot be mapped over tasks.
        """
        seen = real[:, None, None, :]
        if self._causal:
            seen = seen & torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool, device=real.device).tril()
        dtype = self.encoder.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def _pooled(self, states: Tensor, real: Tensor) -> Tensor:
        if self._pooling == "class":
            return states[:, 0]
        weights = real.to(states.dtype)
        if self._pooling == "last":
            places = torch.arange(real.shape[-1], device=real.device)
            weights = (places == (real * places).amax(dim=-1, keepdim=True)).to(states.dtype)
        return (states * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)


def _is_causal(encoder: Any) -> bool:
    """Return whether tokens see only those before them, as its attention layers say."""
    return any(getattr(module, "is_causal", False) is True for module in encoder.modules())


def _check_inputs(config: Any, input_shape: tuple[int, ...], tokens: int) -> None:
    if len(input_shape) != 1:
        raise ConfigError(
            f"{_SUBJECT} needs sequences of tokens, inputs of shape (length,), got inputs of shape {input_shape}: choose "
            '`model = "auto"`'
        )
    if tokens > config.vocab_size:
        raise ConfigError(
            f"`transformer.directory` holds an encoder that knows {config.vocab_size} tokens, and the data have {tokens}: take "
            "the tokenizer and the encoder of one directory"
        )
    longest = getattr(config, "max_position_embeddings", input_shape[0])
    if config.pad_token_id is None:
        raise ConfigError(
            "`transformer.directory` holds an encoder without `pad_token_id` in its config.json, so it would read what fills "
            "up short texts: set it there to the id with which the tokenizer pads"
        )
    if input_shape[0] > longest:
        raise ConfigError(
            f"`transformer.directory` holds an encoder of texts of up to {longest} tokens, and the data have {input_shape[0]}: "
            "shorten them"
        )


def _config(directory: str) -> Any:
    """Return the configuration in a directory. Raises ConfigError."""
    said = (
        f"`transformer.directory` must name a directory with config.json and model.safetensors, got '{as_told(directory, 200)}'"
    )
    folder = Path(directory).expanduser()
    if not directory or not (folder / "config.json").is_file():
        raise ConfigError(f"{said}: download the model there, and name it by `--set transformer.directory=DIRECTORY`")
    with _quietly() as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise ConfigError(f"{said}, whose config.json cannot be read ({in_one_line(error)})") from None
    if getattr(config, "is_encoder_decoder", False) or not isinstance(getattr(config, "hidden_size", None), int):
        raise ConfigError(f"{said}, which holds no encoder of texts: take one such as BERT, MiniLM or MPNet")
    return config


def _load(directory: str) -> Any:
    """Return the encoder in a directory, with float32 weights. Raises ConfigError."""
    folder = Path(directory).expanduser()
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise ConfigError(
            f"`transformer.directory` must hold the weights as model.safetensors, and '{as_told(directory, 200)}' does not: no "
            "other file is read, since that may run code"
        )
    with _quietly() as transformers:
        try:
            encoder, found = transformers.AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="eager",  # see `TextEncoder.forward`
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # it raises a dozen types
            raise ConfigError(
                f"`transformer.directory` must hold an encoder that can be read, and '{as_told(directory, 200)}' does not "
                f"({in_one_line(error)})"
            ) from None
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # a layer for another task, which would be made, sent and never used
    if missing := sorted(name for name in found["missing_keys"] if "pooler" not in name):
        raise ConfigError(
            f"`transformer.directory` must hold all weights of its encoder, and '{as_told(directory, 200)}' lacks "
            f"`{as_told(missing[0], 100)}`"
        )
    return encoder


def _add_adapter(encoder: nn.Module, options: TransformerOptions) -> None:
    """Add a low-rank adapter to layers of the encoder, in place, and freeze all else. Raises ConfigError."""
    targets = None if options.lora_targets == "auto" else [part.strip() for part in options.lora_targets.split(",")]
    with _quietly():
        peft: Any = needs("pretrained", "peft", "`transformer.lora-rank` above 0")
        settings = peft.LoraConfig(
            r=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=0.0, bias="none", target_modules=targets
        )
        try:
            peft.inject_adapter_in_model(settings, encoder)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "`transformer.lora-targets` must name linear layers of the encoder by the ends of their names, such as "
                f"query,value, got '{as_told(options.lora_targets, 100)}' ({in_one_line(error)})"
            ) from None
    for name, value in encoder.named_parameters():
        value.requires_grad_("lora_" in name)


@contextmanager
def _quietly() -> Iterator[Any]:
    """Yield the library `transformers`, while its progress bars, log lines and warnings are suppressed. Raises ConfigError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers: Any = needs("pretrained", "transformers", _SUBJECT)
        logging = transformers.utils.logging
        before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield transformers
        finally:
            logging.set_verbosity(before)
            if bars:
                logging.enable_progress_bar()
