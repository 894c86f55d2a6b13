"""Sentence embeddings from a frozen encoder, computed once and cached.

A text's embedding is the mean of its last hidden states over real tokens (the pooling that the
encoder was trained with), float32, not normalised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from drrlhf.batching import by_length
from drrlhf.demo.material import cache_dir, sha256
from drrlhf.files import write_whole
from drrlhf.precision import fast_dtype
from drrlhf.threads import threads

MAX_TOKENS = 256
# Batches are cut by tokens, padding included: on a CPU, activations of about this size stay in
# cache.
BATCH_TOKENS = 1024


def encode(
    texts: Sequence[str],
    model_dir: Path,
    *,
    cache: Path | None = None,
    console: Console | None = None,
) -> torch.Tensor:
    """Embeddings (len(texts), hidden size), float32, of ``texts`` by the encoder in ``model_dir``.

    They are made in the CPU's fast precision; in another one they differ by about 1e-4 in cosine.
    They are kept in ``cache`` (default: the demonstration's cache), keyed by the texts, the model's
    sha256 and the precision; a second call with the same texts reads them back.
    """
    dtype = fast_dtype()
    folder = cache or cache_dir() / "embeddings"
    path = folder / f"{_key(texts, model_dir, dtype)}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        found = _encode(texts, model_dir, dtype, console)
        write_whole(path, lambda part: save_file({"embeddings": found}, part))
    return load_file(path)["embeddings"]


def _key(texts: Sequence[str], model_dir: Path, dtype: torch.dtype) -> str:
    weights = sha256(model_dir / "model.safetensors")
    described = json.dumps([list(texts), weights, str(dtype), MAX_TOKENS])
    return hashlib.sha256(described.encode()).hexdigest()[:24]


def _encode(
    texts: Sequence[str], model_dir: Path, dtype: torch.dtype, console: Console | None
) -> torch.Tensor:
    # transformers takes seconds to import; cached embeddings do not need it
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir, dtype=dtype).eval()
    ids = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    result = torch.empty(len(texts), model.config.hidden_size)

    def fill(batch: list[int]) -> int:
        padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
        result[batch] = _pooled(model, padded)
        return len(batch)

    # A batch a core, not all cores on each batch: threads that meet after every product lose most
    # of their time when another program runs beside, and numbers would depend on how many there
    # are.
    cores = torch.get_num_threads()
    with threads(1), ThreadPoolExecutor(cores) as pool, progress_bar(console) as progress:
        task = progress.add_task("Encoding texts", total=len(texts))
        for done in pool.map(fill, by_length([len(i) for i in ids], BATCH_TOKENS)):
            progress.advance(task, done)
    return result


@torch.inference_mode()
def _pooled(model: Any, batch: Any) -> torch.Tensor:
    hidden = model(**batch).last_hidden_state.float()  # (texts, tokens, hidden)
    real = batch["attention_mask"].unsqueeze(-1)
    return (hidden * real).sum(1) / real.sum(1)


def progress_bar(console: Console | None) -> Progress:
    """How many of all are done, and when the rest will be."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
