"""The same experts and weights as transformers chooses, biased scores below zero included."""

import pytest
import torch
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32TopkRouter

from workers.moe.routing import Routing, RoutingRule, route

RULE = RoutingRule(num_experts=32, num_groups=8, max_groups=3, experts_per_token=6, normalize=True, scale=2.5)


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
    rule = RoutingRule(
        num_experts=32,
        num_groups=8,
        max_groups=max_groups,
        experts_per_token=4,
        normalize=normalize,
        scale=2.5,
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 32, generator=generator) * 2
    bias = bias_mean + torch.randn(32, generator=generator) * 0.5
    torch.testing.assert_close(
        by_expert(route(logits, bias, rule), 32), by_expert(theirs(logits, bias, rule), 32), rtol=1e-6, atol=1e-7
    )


def test_negative_scores_in_a_good_group_beat_everything_in_an_excluded_one() -> None:
    """Masking with 0 would choose an excluded expert here."""
    rule = RoutingRule(num_experts=8, num_groups=2, max_groups=1, experts_per_token=3, normalize=True, scale=1.0)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
    routing = route(logits, torch.full((8,), -5.0), rule)
    assert set(routing.experts[0].tolist()) == {0, 1, 2}


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.zeros(1, 32)
    bias = torch.zeros(32)
    bias[:6] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    routing = route(logits, bias, RULE)
    assert set(routing.experts[0].tolist()) == set(range(6))
    torch.testing.assert_close(routing.weights, torch.full((1, 6), 2.5 / 6))


def test_no_tokens() -> None:
    assert route(torch.empty(0, 32), torch.zeros(32), RULE).experts.shape == (0, 6)
