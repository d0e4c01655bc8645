"""The policy: a Hugging Face causal language model, either from a folder on disk or a small character-level decoder made here.

The small decoder is warm-started by supervised training on the task's training prompts, until its success rates spread over (0, 1):
reinforcement learning can start from nothing at 5 %, and has little left to gain at 85 %. The result is an ordinary model folder,
cached under a hash of the settings that made it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from v05.files import explained, flush_folder, require_model
from v05.machine import cache_root
from v05.pretrained import load_generation_config, load_pretrained
from v05.rollout import NotFiniteError, Request, RolloutEngine, generate
from v05.rollout.limits import stop_tokens
from v05.rollout.transformers_engine import TransformersEngine
from v05.tasks import Prompt, Task, heldout_set
from v05.train.config import PolicyConfig
from v05.train.identity import identity_of

disable_progress_bar()  # a bar per weight file would break the run's own progress display

VERSION = 1  # of the warm start; a new number makes all cached policies invalid
VALIDATION_START = 1_000_000  # first held-out prompt of validation; evaluations start at 0 and do not reach it
IGNORED = -100  # the label that cross-entropy ignores
POSITIONS = 4096  # that a policy warm-started here may use; rotary embeddings themselves have no limit
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per printable ASCII character, including newline."""
    vocabulary = [PAD, EOS, UNKNOWN, "\n", *string.printable[:95]]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def character_decoder(config: PolicyConfig, vocabulary: int) -> PreTrainedModel:
    """A randomly initialised Qwen3 of the configured size."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            head_dim=config.hidden_size // config.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def load_policy(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a local folder; the model is on the GPU if there is one. Raises ValueError for an unusable folder."""
    require_model("policy.path", path)
    model: PreTrainedModel = load_pretrained(AutoModelForCausalLM, path, dtype=dtype)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model, load_tokenizer(path)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a local folder, with a pad token. Raises ValueError if no token ends a completion."""
    tokenizer = load_pretrained(AutoTokenizer, path)
    stops = stop_tokens(tokenizer, load_generation_config(path))
    if tokenizer.pad_token_id is None:  # padding is always masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(stops[0])
    return tokenizer


def chat_tokens(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt in the tokenizer's chat template, up to where the model answers.

    A prompt without messages becomes a single user message. Raises ValueError if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the prompt {prompt.text[:60]!r} is a chat, but the tokenizer has no chat template; add one, or give the text"
        )
    messages = [{"role": role, "content": content} for role, content in prompt.messages or (("user", prompt.text),)]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(chat, add_special_tokens=False)["input_ids"])


def policy_folder(config: PolicyConfig, task_config: BaseModel, task: Task, report: Callable[[str], None]) -> Path:
    """The folder of the policy that training starts from. A character-level policy is warm-started and cached at first use."""
    if config.path is not None:
        return config.path
    made = config.model_dump(mode="json", exclude={"dtype", "lora"})  # dtype and lora do not affect the warm start
    made_of = json.dumps([VERSION, made, identity_of(task_config)], sort_keys=True)
    key = hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest()
    folder = cache_root() / f"warm-start-{key}"
    if not folder.is_dir():
        model, tokenizer = warm_start(config, task, report)
        scratch = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
        with explained(folder, "the warm start will begin again"):
            try:
                scratch.mkdir(parents=True)
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
                (scratch / "made_of.json").write_text(made_of)
                flush_folder(scratch)
                scratch.rename(folder)  # atomic: another process never sees half a folder
            except Exception:
                shutil.rmtree(scratch, ignore_errors=True)
                if not folder.is_dir():  # otherwise another process has finished the same warm start
                    raise
    return folder


def warm_start(config: PolicyConfig, task: Task, report: Callable[[str], None]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train a new character-level policy on right answers until it reaches `target_accuracy`, then decay the learning rate to 0.

    Raises:
        RuntimeError: `max_steps` do not suffice; the task may be too hard for a policy of this size.
        NotFiniteError: training has diverged.
    """
    settings = config.warm_start
    torch.manual_seed(settings.seed)
    tokenizer = character_tokenizer()
    model = character_decoder(config, len(tokenizer))
    model.config.max_position_embeddings = POSITIONS
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    train = (prompt for _, prompt in task.prompts("train"))
    validation = heldout_set(task, settings.validation_prompts, start=VALIDATION_START)
    engine = TransformersEngine(model, tokenizer, max_new_tokens=config.max_new_tokens)

    steps_left = None
    for step in range(settings.max_steps):
        warm_up = min(1.0, (step + 1) / 100)
        decay = 1.0 if steps_left is None else steps_left / settings.decay_steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm_up * decay
        tokens, labels = _supervised_batch(list(itertools.islice(train, settings.batch_size)), tokenizer)
        logits = model(input_ids=tokens, attention_mask=(tokens != tokenizer.pad_token_id).long()).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if steps_left is not None:
            steps_left -= 1
            if steps_left <= 0:
                return model, tokenizer
        elif (step + 1) % settings.validate_every == 0:
            try:
                accuracy = _accuracy(engine, tokenizer, task, validation)
            except NotFiniteError as error:
                raise NotFiniteError(f"warm start, step {step + 1}: {error}; lower warm_start.learning_rate") from error
            report(f"warm start: step {step + 1}, loss {loss.item():.3f}, held-out accuracy {accuracy:.3f}")
            if accuracy >= settings.target_accuracy:
                steps_left = settings.decay_steps
                if steps_left == 0:
                    return model, tokenizer
    raise RuntimeError(
        f"warm start: accuracy {settings.target_accuracy} was not reached in {settings.max_steps} steps; "
        "make the task easier, the policy larger or warm_start.max_steps higher"
    )


def _supervised_batch(prompts: list[Prompt], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels), both (B, L) int64, padded on the right. Only the answer and its end token have labels."""
    asked = tokenizer([p.text for p in prompts], add_special_tokens=False)["input_ids"]
    answers = tokenizer([p.answer for p in prompts], add_special_tokens=False)["input_ids"]
    longest = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True)) + 1
    tokens = torch.full((len(prompts), longest), tokenizer.pad_token_id, device="cpu")
    labels = torch.full((len(prompts), longest), IGNORED, device="cpu")
    for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        line = torch.tensor([*prompt, *answer, tokenizer.eos_token_id], device="cpu")
        tokens[row, : len(line)] = line
        labels[row, len(prompt) : len(line)] = line[len(prompt) :]
    return tokens, labels


def _accuracy(engine: RolloutEngine, tokenizer: Any, task: Task, prompts: list[Prompt]) -> float:
    requests = [Request(tuple(tokenizer(p.text, add_special_tokens=False)["input_ids"]), seed=i) for i, p in enumerate(prompts)]
    completions = generate(engine, requests)
    rewards = [task.verify(p, engine.decode(c)) for p, c in zip(prompts, completions, strict=True)]
    return sum(rewards) / len(rewards)
