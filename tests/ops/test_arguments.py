"""What is no tensor is refused by name, before anything is asked of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import drrlhf as dr

pytestmark = pytest.mark.usual

X, ROWS, HEAD = torch.rand(4), torch.rand(4, 3), torch.rand(7, 3)
IDS, TOKENS = torch.tensor([0, 0, 1, 1]), torch.zeros(4, 3, dtype=torch.long)
HIDDEN = torch.rand(4, 3, 3)
LIST = [0.0] * 4
CALLS = {
    "losses": [
        lambda: dr.robust_risk(LIST),
        lambda: dr.robust_risk(np.zeros(4)),
        lambda: dr.worst_view([LIST]),
    ],
    "nominal": [lambda: dr.robust_risk(X, nominal=LIST)],
    "groups": [lambda: dr.robust_risk(X, "group:2", groups=[0, 0, 1, 1])],
    "mask": [
        lambda: dr.worst_view(ROWS, mask=[[True] * 3] * 4),
        lambda: dr.policy_loss(ROWS, None, X, X, IDS, mask=[[1] * 3] * 4),
    ],
    "rewards": [
        lambda: dr.robust_reward([LIST]),
        lambda: dr.policy_loss(ROWS, None, X, LIST, IDS),
    ],
    "weights": [lambda: dr.robust_reward(ROWS, weights=[1.0] * 3)],
    "logits": [lambda: dr.token_logprobs([LIST], TOKENS[0])],
    "labels": [
        lambda: dr.token_logprobs(ROWS, [0] * 4),
        lambda: dr.linear_token_logprobs(ROWS, HEAD, [0] * 4),
        lambda: dr.sequence_logprobs(ROWS, [[0] * 3] * 4),
        lambda: dr.linear_preference_loss(HIDDEN, HEAD, [[0] * 3] * 4, X),
    ],
    "hidden": [
        lambda: dr.linear_token_logprobs([LIST], HEAD, TOKENS[0]),
        lambda: dr.linear_preference_loss([LIST], HEAD, TOKENS, X),
    ],
    "weight": [
        lambda: dr.linear_token_logprobs(ROWS, torch.nn.Linear(3, 7), IDS),
        lambda: dr.linear_token_logprobs(ROWS, None, IDS),
    ],
    "bias": [lambda: dr.linear_token_logprobs(ROWS, HEAD, IDS, bias=[0.0] * 7)],
    "cu_seqlens": [
        lambda: dr.sequence_logprobs(X, IDS, cu_seqlens=[0, 4]),
        lambda: dr.policy_loss(X, None, X[:1], X[:1], IDS[:1], cu_seqlens=[0, 4]),
    ],
    "chosen_logps": [lambda: dr.preference_loss(LIST, X, X, X)],
    "chosen_lengths": [
        lambda: dr.preference_loss(
            X, X, X, X, loss_type="ipo", chosen_lengths=[1] * 4, rejected_lengths=IDS
        )
    ],
    "label_probs": [lambda: dr.preference_loss(X, X, X, X, label_probs=LIST)],
    "rejected_rewards": [lambda: dr.reward_loss(X, None)],
    "margin": [lambda: dr.reward_loss(X, X, margin=0.5)],
    "ref_logps": [lambda: dr.linear_preference_loss(HIDDEN, HEAD, TOKENS, LIST)],
    "logps": [lambda: dr.policy_loss(LIST, None, X, X, IDS)],
    "old_logps": [lambda: dr.policy_loss(ROWS, [LIST], X, X, IDS)],
    "prompt_ids": [lambda: dr.policy_loss(ROWS, None, X, X, [0, 0, 1, 1])],
}


@pytest.mark.parametrize("name,call", [(name, call) for name in CALLS for call in CALLS[name]])
def test_what_is_no_tensor_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected a torch\.Tensor.*, got \w+$"):
        call()


def test_a_tensor_elsewhere_is_told_where_to_go():
    with pytest.raises(ValueError, match=r"^nominal: .*got meta; move it with \.to\('cpu'\)$"):
        dr.linear_preference_loss(HIDDEN, HEAD, TOKENS, X, nominal=X[:2].to("meta"))


def test_a_state_of_groups_takes_the_number_that_a_set_of_groups_takes():
    assert dr.Group(4.0).num_groups == 4
    assert dr.GroupState(4.0).weights.tolist() == [0.25] * 4
