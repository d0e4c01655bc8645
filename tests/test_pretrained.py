"""Model folders that contain Python code of their own."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.pretrained import load_generation_config, load_pretrained
from v05.prior.v0.backbone import Backbone
from v05.train.policy import load_policy, load_tokenizer

CODE = """
from pathlib import Path

Path({marker!r}).write_text("ran")
from transformers import {base}


class Own({base}):
    model_type = "own"
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "policy"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def bring_code(folder, marker, file, base, **auto_map):
    (folder / "own.py").write_text(CODE.format(marker=str(marker), base=base))
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | {"auto_map": auto_map}))


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that a folder's code would create. A question on standard input is answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *question: "yes")
    return tmp_path / "marker"


@pytest.mark.parametrize("load", [load_policy, load_tokenizer, Backbone, load_generation_config])
def test_an_architecture_of_its_own_is_refused_without_a_question(folder, marker, load):
    (folder / "generation_config.json").unlink()
    bring_code(folder, marker, "config.json", "PretrainedConfig", AutoConfig="own.Own", AutoModelForCausalLM="own.Own")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "own", "architectures": ["Own"]}))
    with pytest.raises(ValueError, match=r"policy can only be read by Python code that it brings along \(auto_map in config.json"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("auto", [AutoConfig, AutoModelForCausalLM])
def test_an_architecture_that_transformers_has_is_read_without_the_folders_code(folder, marker, auto):
    bring_code(folder, marker, "config.json", "LlamaConfig", AutoConfig="own.Own", AutoModelForCausalLM="own.Own")
    load_pretrained(auto, folder)
    assert not marker.exists()


def test_the_code_of_a_tokenizer_is_not_run(folder, marker):
    bring_code(folder, marker, "tokenizer_config.json", "PreTrainedTokenizerFast", AutoTokenizer=[None, "own.Own"])
    load_pretrained(AutoTokenizer, folder)
    assert not marker.exists()


class Touch:
    """An object whose pickle creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_are_a_pickle_are_read_if_they_are_tensors_alone(folder, marker):
    (folder / "model.safetensors").unlink()
    weights = tiny_model().state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    load_policy(folder)
    torch.save(weights | {"more": Touch(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"policy are a pickle that holds more than tensors.*give weights in safetensors files"):
        load_policy(folder)
    assert not marker.exists()


def test_the_generation_config_is_read_from_its_file_or_the_models(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert load_generation_config(folder).eos_token_id == [1, 5]
    (folder / "generation_config.json").unlink()
    assert load_generation_config(folder).eos_token_id == 1
