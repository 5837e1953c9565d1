"""The same experts and weights as transformers chooses, biased scores below zero included."""

from dataclasses import replace

import pytest
import torch
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32TopkRouter
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from workers.moe.routing import Routing, RoutingRule, route

V3 = RoutingRule(
    num_experts=32,
    experts_per_token=6,
    normalize=True,
    scale=2.5,
    scoring="sigmoid",
    balanced=True,
    num_groups=8,
    max_groups=3,
    best_of_group=2,
)


def theirs(logits: torch.Tensor, bias: torch.Tensor, rule: RoutingRule) -> Routing:
    config = DeepseekV32Config(
        hidden_size=rule.num_experts,
        n_routed_experts=rule.num_experts,
        n_group=rule.num_groups,
        topk_group=rule.max_groups,
        num_experts_per_tok=rule.experts_per_token,
        norm_topk_prob=rule.normalize,
        routed_scaling_factor=rule.scale,
    )
    router = DeepseekV32TopkRouter(config)
    router.weight.data = torch.eye(rule.num_experts)
    router.e_score_correction_bias.data = bias
    _, weights, experts = router(logits)
    return Routing(experts, weights.detach())


def by_expert(routing: Routing, num_experts: int) -> torch.Tensor:
    """[T, E]: weights, -1 where not chosen; the order of the choice does not matter."""
    dense = torch.full((len(routing.experts), num_experts), -1.0)
    return dense.scatter_(1, routing.experts, routing.weights)


@pytest.mark.parametrize("max_groups", [1, 3, 8])
@pytest.mark.parametrize("bias_mean", [0.0, -2.0, 2.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_transformers(max_groups: int, bias_mean: float, normalize: bool) -> None:
    rule = replace(V3, max_groups=max_groups, experts_per_token=4, normalize=normalize)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 32, generator=generator) * 2
    bias = bias_mean + torch.randn(32, generator=generator) * 0.5
    torch.testing.assert_close(
        by_expert(route(logits, bias, rule), 32), by_expert(theirs(logits, bias, rule), 32), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(("num_groups", "max_groups"), [(1, 1), (8, 1), (8, 3), (8, 8)])
def test_softmax_scores_equal_transformers_v2(num_groups: int, max_groups: int) -> None:
    rule = RoutingRule(
        num_experts=32, experts_per_token=4, normalize=False, scale=16.0, num_groups=num_groups, max_groups=max_groups
    )
    config = DeepseekV2Config(
        hidden_size=32,
        n_routed_experts=32,
        n_group=num_groups,
        topk_group=max_groups,
        topk_method="greedy" if num_groups == 1 else "group_limited_greedy",
        num_experts_per_tok=4,
        routed_scaling_factor=16.0,
    )
    router = DeepseekV2TopkRouter(config)
    router.weight.data = torch.eye(32)
    logits = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * 2
    _, weights, experts = router(logits)
    ours = by_expert(route(logits, None, rule), 32)
    torch.testing.assert_close(ours, by_expert(Routing(experts, weights.detach()), 32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalize", [False, True])
def test_softmax_scores_equal_transformers_qwen3(normalize: bool) -> None:
    rule = RoutingRule(num_experts=32, experts_per_token=4, normalize=normalize)
    config = Qwen3MoeConfig(hidden_size=32, num_experts=32, num_experts_per_tok=4, norm_topk_prob=normalize)
    router = Qwen3MoeTopKRouter(config)
    router.weight.data = torch.eye(32)
    logits = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * 2
    _, weights, experts = router(logits)
    ours = by_expert(route(logits, None, rule), 32)
    torch.testing.assert_close(ours, by_expert(Routing(experts, weights.detach()), 32), rtol=1e-6, atol=1e-7)


def test_negative_scores_in_a_good_group_beat_everything_in_an_excluded_one() -> None:
    """Masking with 0 would choose an excluded expert here."""
    rule = replace(V3, num_experts=8, num_groups=2, max_groups=1, experts_per_token=3, scale=1.0)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
    routing = route(logits, torch.full((8,), -5.0), rule)
    assert set(routing.experts[0].tolist()) == {0, 1, 2}


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.zeros(1, 32)
    bias = torch.zeros(32)
    bias[:6] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    routing = route(logits, bias, V3)
    assert set(routing.experts[0].tolist()) == set(range(6))
    torch.testing.assert_close(routing.weights, torch.full((1, 6), 2.5 / 6))


def test_no_tokens() -> None:
    assert route(torch.empty(0, 32), torch.zeros(32), V3).experts.shape == (0, 6)
