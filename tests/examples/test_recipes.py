"""The recipes that need PyTorch alone: what each says of itself is what it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mtlbalance import GABALoss, PCGradLoss, UncertaintyLoss
from mtlbalance.errors import NonFiniteWarning

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_shows_the_line_that_changes(path):
    text = path.read_text()
    assert 40 <= len(text.splitlines()) <= 165
    changed = re.findall(r"^ +\+ *(\S.*balancer\(.*)$", text.split('"""')[1], flags=re.MULTILINE)
    assert len(changed) == 1, "the header shows one changed line"
    assert text.count("# the one line that changes") == 1
    assert path.name in (ROOT / "docs" / "recipes.md").read_text()


def test_the_snippet_in_the_readme_runs(recipe):
    block = (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    changed = [line[1:] for line in block.splitlines() if not line.startswith("-")]
    torch.manual_seed(0)
    model = recipe("own_loop").Model()
    predictions = model(torch.randn(16, 10))
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "rul_loss": predictions["distance"].square().mean(),
        "health_loss": predictions["angle"].square().mean(),
    }
    before = model.trunk[0].weight.detach().clone()
    exec("\n".join(changed), names)
    assert not torch.equal(model.trunk[0].weight, before)
    assert names["balancer"].get_weights() == {"rul": 0.5, "health": 0.5}


# ---------------------------------------------------------------- own_loop.py
def test_own_loop(run_recipe):
    out = run_recipe("own_loop", "--seeds", "1")
    change = {task: int(value) for task, value in re.findall(r"mean error of (\w+): .*\(([+-]\d+) %\)", out)}
    assert change["angle"] < -30
    assert change["distance"] < 30
    weights = re.findall(r"GABA .*?(\d\.\d+) +(\d\.\d+)$", out, flags=re.MULTILINE)[0]
    assert sum(map(float, weights)) == pytest.approx(1.0)
    assert 0.047 < float(weights[0]) < 0.1


# torch.compile itself looks at ``.grad`` of the features.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("method", ["gaba", "uncertainty", "upgrad"])
def test_own_loop_with_trunk_and_heads_compiled(recipe, method):
    module = recipe("own_loop")

    def train(compiled):
        torch.manual_seed(0)
        model = module.Model()
        inputs, targets = module.make_data(torch.randn(10, 2), 32)
        if compiled:
            model.trunk = torch.compile(model.trunk, backend="aot_eager")
            for task in module.TASKS:
                model.heads[task] = torch.compile(model.heads[task], backend="aot_eager")
        options = {"warmup_steps": 1, "beta": 0.5} if method == "gaba" else {}
        balancer = module.METHODS[method](module.TASKS, **options)
        optimizer = torch.optim.SGD([*model.parameters(), *balancer.parameters()], lr=0.1)
        for _ in range(4):
            predictions = model(inputs)
            losses = {task: (predictions[task] - targets[task]).square() for task in module.TASKS}
            optimizer.zero_grad()
            balancer(losses, shared_params=model.trunk.parameters()).backward()
            optimizer.step()
        return balancer.get_weights(), [parameter.detach() for parameter in model.parameters()]

    (weights, parameters), (expected_weights, expected) = train(compiled=True), train(compiled=False)
    assert weights == pytest.approx(expected_weights, rel=1e-5)
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- amp_accumulation.py
def test_counts_are_in_micro_batches(recipe):
    """Weights of the first micro-batch hold for the step, smoothed as without accumulation."""
    module = recipe("amp_accumulation")
    torch.manual_seed(0)
    inputs, targets = module.make_data(25 * module.MICRO_BATCHES * module.MICRO_BATCH_SIZE)
    torch.manual_seed(1)
    model, balancer = module.Model(), module.make_balancer("gaba")
    module.train(model, balancer, inputs, targets, torch.float32)

    torch.manual_seed(1)
    reference, controller = module.Model(), GABALoss(module.TASKS, beta=0.97, warmup_steps=10)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=5e-3)
    steps = torch.arange(len(inputs)).split(module.MICRO_BATCHES * module.MICRO_BATCH_SIZE)
    for number, step in enumerate(steps):
        controller.beta = 0.97**0.25 if number == 10 else 0.97  # the first one comes a call after warm-up
        first = step[: module.MICRO_BATCH_SIZE]
        controller(
            reference.losses(inputs[first], {task: target[first] for task, target in targets.items()}),
            shared_params=reference.trunk,
        )
        weights = controller.get_weights()
        losses = reference.losses(inputs[step], {task: target[step] for task, target in targets.items()})
        optimizer.zero_grad()
        sum(weights[task] * loss for task, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    assert weights["distance"] < 0.4, "the smoothing has begun"
    assert balancer.get_weights() == pytest.approx(weights, rel=1e-4)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["gaba", "uncertainty", "pcgrad"])
def test_half_precision_follows_float32(recipe, method, recwarn):
    module = recipe("amp_accumulation")
    torch.manual_seed(0)
    inputs, targets = module.make_data(40 * module.MICRO_BATCHES * module.MICRO_BATCH_SIZE)
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(1)
        model, balancer = module.Model(), module.make_balancer(method)
        skipped = module.train(model, balancer, inputs, targets, dtype)
        assert skipped <= (3 if dtype == torch.float16 else 0)
        with torch.no_grad():
            losses = model.losses(inputs, targets)
        found[dtype] = [balancer.get_weights(), {task: loss.item() for task, loss in losses.items()}]
    assert all(issubclass(warning.category, NonFiniteWarning) for warning in recwarn)
    for dtype in (torch.float16, torch.bfloat16):
        for ours, exact in zip(found[dtype], found[torch.float32], strict=True):
            assert ours == pytest.approx(exact, rel=0.15)


def test_amp_accumulation(run_recipe):
    out = run_recipe("amp_accumulation", warnings="default")  # the scale of the probes warns where it adapts
    before, after = (dict(re.findall(r"(\w+) (\d\.\d+)", line)) for line in out.splitlines()[:2])
    assert float(after["distance"]) < 0.5 * float(before["distance"])
    assert float(after["angle"]) < 0.5 * float(before["angle"])
    assert int(re.search(r"skipped (\d+) of 120 steps", out)[1]) <= 5


# ---------------------------------------------------------------- ddp_torchrun.py
@pytest.mark.parametrize("method", ["gaba", "upgrad"])
def test_two_processes_equal_one(recipe, run_recipe, tmp_path, method, capsys):
    arguments = ("--method", method, "--steps", "60", "--out")
    recipe("ddp_torchrun").main([*arguments, str(tmp_path / "1.pt")])
    one = capsys.readouterr().out
    two = run_recipe("ddp_torchrun", *arguments, str(tmp_path / "2.pt"), processes=2)
    assert "2 process(es); the same on every rank: True" in two
    printed = [[float(number) for number in re.findall(r"\d+\.\d+", out)] for out in (one, two)]
    assert len(printed[0]) == 6, "two losses and a weight for each task"
    assert printed[1] == pytest.approx(printed[0], abs=1.5e-4)
    expected, found = (torch.load(tmp_path / name, weights_only=True) for name in ("1.pt", "2.pt"))
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=0, atol=1e-6)
    weights = expected["balancer"]["applied_weights"]
    torch.testing.assert_close(found["balancer"]["applied_weights"], weights, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- missing_labels.py
def test_an_absent_task_waits(recipe):
    module = recipe("missing_labels")
    for method in (GABALoss, UncertaintyLoss, PCGradLoss):
        torch.manual_seed(0)
        model, balancer = module.Model(), method(module.TASKS)
        balancer.warmup_steps = 0
        inputs, targets = module.samples(module.TASKS)
        for _ in range(3):
            balancer(model.losses(inputs, targets), shared_params=model.trunk).backward()
        before = {name: value.clone() for name, value in balancer.state_dict().items()}
        balancer.zero_grad()
        model.zero_grad()
        targets["angle"] = torch.full_like(targets["angle"], torch.nan)
        balancer(model.losses(inputs, targets), shared_params=model.trunk).backward()
        assert balancer.get_weights()["angle"] == 0.0
        if method is not UncertaintyLoss:
            assert balancer.get_weights()["distance"] == 1.0
        assert not any(
            gradient.any() for p in model.heads["angle"].parameters() if (gradient := p.grad) is not None
        )
        for name, value in balancer.state_dict().items():
            if value.shape == (2,) and name not in ("applied_weights", "solved_present"):
                assert torch.equal(value[1].nan_to_num(), before[name][1].nan_to_num()), name
        if method is UncertaintyLoss:
            assert balancer.log_scales.grad[1] == 0.0


@pytest.mark.parametrize("batches", ["joint", "mixed", "alternating"])
def test_missing_labels(recipe, batches, monkeypatch):
    module = recipe("missing_labels")
    monkeypatch.setattr(module, "STEPS", 60)
    torch.manual_seed(0)
    model, balancer = module.Model(), GABALoss(module.TASKS, warmup_steps=10, beta=0.9)
    seen = module.train(model, balancer, batches)
    smoothed = balancer.report()["smoothed"]
    if batches == "joint":
        assert seen == {"distance": 60, "angle": 60}
        assert smoothed["distance"] < 0.3
    elif batches == "mixed":
        assert seen["distance"] == 60
        assert 30 < seen["angle"] < 60
        assert smoothed["distance"] < 0.4
    else:
        assert seen == {"distance": 30, "angle": 30}
        assert smoothed == {"distance": 0.5, "angle": 0.5}, "no call saw two tasks"
        assert balancer.get_weights() == {"distance": 0.0, "angle": 1.0}


def test_missing_labels_from_the_command_line(run_recipe):
    out = run_recipe("missing_labels", "--batches", "mixed")
    rows = re.findall(r"loss (\d\.\d+) -> (\d\.\d+)  weight (\d\.\d+)  labels in (\d+) of 200", out)
    assert len(rows) == 2
    assert all(float(after) < 0.5 * float(before) for before, after, _, _ in rows)
    assert int(rows[1][3]) < 200


# ---------------------------------------------------------------- eight_tasks.py
def test_cheap_measurements_give_much_the_same_weights(recipe, monkeypatch):
    module = recipe("eight_tasks")
    monkeypatch.setattr(module, "STEPS", 200)
    found = []
    for update_every, features_only in ((1, False), (10, False), (1, True)):
        torch.manual_seed(0)
        model, balancer = module.Model(), module.make_balancer("gaba", update_every)
        module.train(model, balancer, module.make_data(512), features_only)
        found.append(balancer.get_weights())
        assert list(found[-1]) == list(module.TASKS)
        assert sum(found[-1].values()) == pytest.approx(1.0)
        assert max(balancer.report()["raw"].values()) <= 1 / 7 + 1e-6
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert found[2] == pytest.approx(found[0], rel=0.2)
    assert found[0]["sensor_0"] < 0.8 * found[0]["sensor_7"]


def test_eight_tasks(run_recipe):
    out = run_recipe("eight_tasks", "--update-every", "10")
    rows = re.findall(r"sensor_\d .* error (\d+\.\d+) -> (\d\.\d+)  weight (\d\.\d+)", out)
    assert len(rows) == 8
    assert all(float(after) < float(before) for before, after, _ in rows)
    assert float(rows[0][1]) < 0.4
