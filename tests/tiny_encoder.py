"""A random encoder of a few thousand numbers with a tokenizer, in a directory as a pretrained one is."""

import json
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "the", "my", "a", "to", "how", "do", "i", "of", "you", "me", "can"),
    *(
        "please",
        "tell",
        "in",
        "for",
        "on",
        "need",
        "card",
        "account",
        "much",
        "are",
        "there",
        "set",
        "have",
        "want",
        "at",
        "by",
    ),
)
VOCABULARY = len(WORDS)


@lru_cache(maxsize=8)
def directory(kind: str = "bert", seed: int = 0) -> str:
    """Return a directory with config.json, model.safetensors and tokenizer.json; the same for the same arguments."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-encoder-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.utils.logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _KINDS[kind](transformers).save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}))
    return str(folder)


@lru_cache(maxsize=1)
def characters() -> str:
    """Return a directory with a tokenizer alone, whose ids are the characters of a sentence."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{chr(code): 2 + code - 32 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    folder = Path(tempfile.mkdtemp(prefix="tiny-tokenizer-"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def _bert(transformers: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 12, "max_position_embeddings": 40, "initializer_range": 0.5}
    return transformers.BertModel(transformers.BertConfig(**sizes, **more))


def _llama(transformers: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    more = {"intermediate_size": 12, "max_position_embeddings": 40, "initializer_range": 0.5, "num_key_value_heads": 1}
    return transformers.LlamaModel(transformers.LlamaConfig(**sizes, **more))


_KINDS: dict[str, Callable[[Any], Any]] = {"bert": _bert, "llama": _llama}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer
