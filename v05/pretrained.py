"""Reads folders of Hugging Face models, from disk only and without running code from the folder."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers


def load_pretrained(auto: Any, folder: Path, **options: Any) -> Any:
    """`auto.from_pretrained` of a local folder, where `auto` is AutoConfig, AutoModel or similar.

    Raises ValueError if reading the folder needs code of its own, or if its weights are a pickle that holds more than tensors.
    """
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except UnpicklingError:  # torch reads only tensors from a pickle, and refuses everything else
        raise ValueError(
            f"the weights of {folder} are a pickle that holds more than tensors, which could run code and is not opened; "
            "give weights in safetensors files"
        ) from None
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{folder} can only be read by Python code that it brings along (auto_map in config.json or tokenizer_config.json), "
            f"which v05 never runs; give a folder whose architecture transformers {transformers.__version__} has, or upgrade it"
        ) from None


def load_generation_config(folder: Path) -> Any:
    """The generation configuration of a model folder, or the one implied by its config.json if it has no generation_config.json."""
    if (folder / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return transformers.GenerationConfig.from_model_config(load_pretrained(transformers.AutoConfig, folder))
