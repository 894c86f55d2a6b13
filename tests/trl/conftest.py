"""What the tests of trainers share."""

from __future__ import annotations

from functools import partial

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models by what they are for, each made when it is asked for first."""
    from trl_fixtures import tiny_encoder_dir, tiny_llama_dir, tiny_reward_dir

    make = {
        "dpo": tiny_llama_dir,
        "grpo": tiny_llama_dir,
        "dropout": partial(tiny_llama_dir, attention_dropout=0.3),
        "reward": tiny_reward_dir,
        "encoder": tiny_encoder_dir,
    }

    class Folders(dict):
        def __missing__(self, name):
            self[name] = str(make[name](tmp_path_factory.mktemp(name)))
            return self[name]

    return Folders()
