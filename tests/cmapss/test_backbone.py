"""The network: its sizes, its switches, and the attention that computes one step."""

from __future__ import annotations

import pytest
import torch
from mtlbalance_cmapss.backbone import CnnBiLstmAttention, LastStepAttention, build
from mtlbalance_cmapss.config import CmapssConfig, CnnBiLstmAttentionConfig, tasks_of
from pydantic import ValidationError
from torch import nn

from mtlbalance.errors import ConfigError
from mtlbalance.slots import InputSpec, TaskSpec

TASKS = tasks_of(CmapssConfig())
INPUTS = InputSpec(shape=(30, 17))


def small(**options: object) -> CnnBiLstmAttentionConfig:
    sizes = {"hidden_size": 6, "cnn_channels": (5, 7), "num_attention_heads": 3, "fc_dims": (8, 4)}
    return CnnBiLstmAttentionConfig.model_validate(sizes | options)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_study() -> None:
    model = build(CnnBiLstmAttentionConfig(), INPUTS, TASKS)
    assert count(model.trunk.cnn) == 53_184
    assert count(model.trunk.lstm) == 2_236_416
    assert count(model.trunk.attention) == 1_051_648
    assert count(model.trunk.funnel) == 149_856
    assert count(model.heads["rul"]) == 4_737
    assert count(model.heads["health"]) == 1_635
    assert count(model) == 3_497_476


@pytest.mark.parametrize("use_attention", [True, False])
@pytest.mark.parametrize("use_residual", [True, False])
@pytest.mark.parametrize("num_lstm_layers", [1, 2])
def test_shapes_and_gradients(use_attention: bool, use_residual: bool, num_lstm_layers: int) -> None:
    config = small(use_attention=use_attention, use_residual=use_residual, num_lstm_layers=num_lstm_layers)
    model = build(config, InputSpec(shape=(9, 5)), TASKS)
    inputs = torch.randn(4, 9, 5)
    assert model.trunk(inputs).shape == (4, 4)
    predictions = model(inputs)
    assert predictions["rul"].shape == (4,)
    assert predictions["health"].shape == (4, 3)
    (predictions["rul"].sum() + predictions["health"].square().sum()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_the_last_step_equals_full_attention() -> None:
    torch.manual_seed(0)
    block = LastStepAttention(12, 3, dropout=0.1, use_residual=True).eval()
    steps = torch.randn(5, 9, 12)
    full, _ = block.attention(steps, steps, steps, need_weights=False)
    expected = block.norm(steps + full)[:, -1]
    torch.testing.assert_close(block(steps), expected, rtol=1e-5, atol=1e-6)


def test_the_last_step_has_the_gradients_of_full_attention() -> None:
    torch.manual_seed(0)
    block = LastStepAttention(12, 3, dropout=0.0, use_residual=True).double()
    steps = torch.randn(5, 9, 12, dtype=torch.float64)
    seed = torch.randn(5, 12, dtype=torch.float64)
    parameters = list(block.parameters())
    got = torch.autograd.grad((block(steps) * seed).sum(), parameters)
    full, _ = block.attention(steps, steps, steps, need_weights=False)
    expected = torch.autograd.grad((block.norm(steps + full)[:, -1] * seed).sum(), parameters)
    torch.testing.assert_close(got, expected)


def test_the_residual_switch_matters() -> None:
    steps = torch.randn(2, 4, 12)
    torch.manual_seed(0)
    with_residual = LastStepAttention(12, 3, dropout=0.0, use_residual=True)
    without = LastStepAttention(12, 3, dropout=0.0, use_residual=False)
    without.load_state_dict(with_residual.state_dict())
    assert not torch.allclose(with_residual(steps), without(steps))


@pytest.mark.parametrize("activation", ["relu", "softplus", "identity"])
def test_the_rul_head_starts_alive(activation: str) -> None:
    torch.manual_seed(0)
    model = build(small(rul_activation=activation), INPUTS, TASKS).eval()
    rul = model(10 * torch.randn(64, 30, 17))["rul"]
    assert (rul > 31).all()
    assert (rul < 94).all()
    rul.sum().backward()
    for parameter in model.heads["rul"].parameters():
        assert parameter.grad is not None
    assert count(build(small(rul_activation=activation), INPUTS, TASKS)) == count(model)


def test_activations_bound_the_rul() -> None:
    def lowest(activation: str) -> float:
        model = build(small(rul_activation=activation), INPUTS, TASKS).eval()
        output = model.heads["rul"].output
        assert isinstance(output, nn.Linear)
        nn.init.constant_(output.bias, -50.0)
        lowest_rul: float = model(torch.randn(8, 30, 17))["rul"].min().item()
        return lowest_rul

    assert lowest("relu") == 0.0
    assert 0.0 <= lowest("softplus") < 1e-6
    assert lowest("identity") < -40


def test_funnel_dropout_is_apart_from_the_rest() -> None:
    def rates(module: nn.Module) -> set[float]:
        return {layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)}

    default = build(CnnBiLstmAttentionConfig(), INPUTS, TASKS)
    assert rates(default.trunk.cnn) == {0.15}
    assert rates(default.trunk.funnel) == {0.3}
    assert default.trunk.lstm.dropout == 0.3
    assert rates(default.heads) == set()
    without = build(CnnBiLstmAttentionConfig(funnel_dropout=0.0), INPUTS, TASKS)
    assert rates(without.trunk.funnel) == {0.0}
    assert rates(without.trunk.cnn) == {0.15}


def test_any_tasks_get_heads() -> None:
    tasks = (
        TaskSpec("position", "regression", "mse", outputs=2),
        TaskSpec("speed", "regression", "l1"),
        TaskSpec("kind", "classification", "cross_entropy", outputs=5),
    )
    model = build(small(), INPUTS, tasks)
    shapes = {name: tuple(value.shape) for name, value in model(torch.randn(3, 30, 17)).items()}
    assert shapes == {"position": (3, 2), "speed": (3,), "kind": (3, 5)}
    # Only a life cannot be negative.
    assert not any(name.startswith("activation") for name, _ in model.heads["speed"].named_children())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads = 5 does not divide 2 x hidden_size = 12"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"cnn_channels": ()}, "cnn_channels"),
        ({"cnn_channels": (8, 0)}, "cnn_channels"),
        ({"fc_dims": ()}, "fc_dims"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_lstm_layers": 0}, "num_lstm_layers"),
        ({"rul_activation": "tanh"}, "rul_activation"),
        ({"rul_initial": 0.0}, "rul_initial"),
    ],
)
def test_impossible_sizes_are_errors_that_name_the_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small(**options)


def test_heads_need_not_divide_where_there_is_no_attention() -> None:
    model = build(small(num_attention_heads=5, use_attention=False), INPUTS, TASKS)
    assert isinstance(model, CnnBiLstmAttention)


def test_inputs_without_time_steps_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\(time steps, features\), but the dataset gives \(8,\)"):
        build(CnnBiLstmAttentionConfig(), InputSpec(shape=(8,)), TASKS)
