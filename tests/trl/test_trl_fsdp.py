"""The trainers' steps on a model that is sharded over processes equal those of one process."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("trl")

from trl_fixtures import tiny_llama_dir, tiny_pairs, tiny_reward_dir  # isort: skip

import steps
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig
from ranks import on_ranks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.xdist_group("ranks")  # forked from one server

PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
CASES = {
    "dpo tv": ("dpo", {"ambiguity": "tv:0.2"}),
    "dpo cvar, packed lora": (
        "dpo",
        {"ambiguity": "cvar:0.3", "padding_free": True, "trainer_peft_config": LORA},
    ),
    "reward tv": ("reward", {"ambiguity": "tv:0.2"}),
    "reward cvar": ("reward", {"ambiguity": "cvar:0.3"}),
    "grpo tv": ("grpo", {"ambiguity": "tv:0.4"}),
}


def arguments(case, models, folder, cut):
    method, options = CASES[case]
    if "trainer_peft_config" in options:
        options = options | {"trainer_peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM")}
    return {
        "method": method,
        "model": models["reward" if method == "reward" else "dpo"],
        "folder": folder,
        "data": tiny_pairs(16),
        "max_steps": 2,
        **cut,
        **options,
    }


def shard_on_cpu():
    """Have accelerate prepare models with fully_shard, which it does where there are GPUs alone."""
    original = transformers.Trainer.create_accelerator_and_postprocess

    def create(self):
        original(self)
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True

    transformers.Trainer.create_accelerator_and_postprocess = create


class Sharded(transformers.TrainerCallback):
    """Sees that what is trained is in parts: a model that DDP had wrapped would be right too."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert isinstance(model, FSDPModule)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def every_case(rank, models, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # of a group that exists
    shard_on_cpu()
    return {
        case: steps.run(**arguments(case, models, folder, PARTS), trainer_callbacks=[Sharded()])
        for case in CASES
    }


def test_two_sharded_ranks_equal_one_process(tmp_path_factory):
    places = [tmp_path_factory.mktemp(name) for name in ("llama", "reward", "out")]
    models = {"dpo": str(tiny_llama_dir(places[0])), "reward": str(tiny_reward_dir(places[1]))}
    found = on_ranks(2, every_case, models, str(places[2]))
    assert all(isinstance(f, dict) for f in found), found
    for case in CASES:
        whole = steps.run(**arguments(case, models, str(places[2]), WHOLE))
        for rank in found:
            ours = rank[case]
            for a, b in zip(ours["gradients"], whole["gradients"], strict=True):
                assert b.abs().max() > 1e-3
                torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * max(float(b.abs().max()), 1))
            torch.testing.assert_close(
                ours["parameters"], whole["parameters"], rtol=1e-5, atol=1e-6
            )
            for a, b in zip(ours["logs"], whole["logs"], strict=True):
                for name in ("loss", "grad_norm", "robust/effective_sample_size"):
                    assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6), (case, name)
