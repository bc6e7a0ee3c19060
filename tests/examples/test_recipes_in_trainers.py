"""The recipes for Lightning, Hugging Face's Trainer and Accelerate, against plain loops and uninterrupted runs.

Each is skipped, visibly, where its trainer is not installed; what `make test` installs has them all.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

SCALAR_AND_SURGERY = ["gaba", "uncertainty", "upgrad"]


def numbers_in(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


# ---------------------------------------------------------------- lightning_trainer.py
@pytest.fixture
def lightning(recipe):
    pytest.importorskip("pytorch_lightning")
    return recipe("lightning_trainer")


def as_lightning_warns(function):
    """Let through what Lightning says of data in memory, of a folder it has used, and of itself (2.6 on torch 2.13)."""
    for message in (
        "does not have many workers",
        "LeafSpec",
        "Checkpoint directory .* exists and is not empty",
    ):
        function = pytest.mark.filterwarnings(f"ignore:.*{message}")(function)
    return function


@as_lightning_warns
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", SCALAR_AND_SURGERY)
def test_lightning_trains_as_a_plain_loop_does(lightning, method, accumulate, capsys):
    found = lightning.fit(
        method, 1, None, limit_train_batches=12, accumulate_grad_batches=accumulate, gradient_clip_val=1.0
    )
    torch.manual_seed(0)
    model = lightning.Model(method)
    network = [*model.trunk.parameters(), *model.heads.parameters()]
    learned = {"params": [*model.balancer.parameters()], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": network}, learned], lr=5e-3)
    for number, (inputs, targets) in zip(range(1, 13), lightning.make_loader(), strict=False):
        losses = model.losses(inputs, targets)
        loss = model.balancer(losses, shared_params=model.trunk.parameters())
        (loss / accumulate).backward()
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(found.state_dict(), model.state_dict())
    assert found.trainer.optimizers[0].param_groups[1]["weight_decay"] == 0.0
    assert "weight/angle" in capsys.readouterr().out


@as_lightning_warns
@pytest.mark.parametrize("method", ["dwa", "gaba", "uncertainty", "pcgrad"])
def test_lightning_resumes_exactly(lightning, method, tmp_path):
    few = {"limit_train_batches": 8}
    whole = lightning.fit(method, 3, tmp_path / "whole", **few)
    lightning.fit(method, 2, tmp_path / "parts", **few)
    resumed = lightning.fit(method, 3, tmp_path / "parts", tmp_path / "parts" / "last.ckpt", **few)
    assert resumed.balancer.calls == 24
    if method == "dwa":
        assert not resumed.balancer.means_2.isnan().any()
        assert resumed.balancer.get_weights() != {"distance": 1.0, "angle": 1.0}
    assert_same_state(resumed.state_dict(), whole.state_dict())


@as_lightning_warns
def test_lightning_from_the_command_line(lightning, tmp_path, capsys):
    lightning.main(["--method", "uncertainty", "--epochs", "2", "--out", str(tmp_path)])
    shown = dict(part.split() for part in capsys.readouterr().out.split("  "))
    assert float(shown["loss/distance"]) < 0.9
    assert float(shown["weight/angle"]) > 0.5
    assert (tmp_path / "last.ckpt").exists()


# ---------------------------------------------------------------- hf_trainer.py
@pytest.fixture
def hugging_face(recipe, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    return recipe("hf_trainer")


@pytest.mark.parametrize("greedy", [False, True], ids=["plain", "model takes loss kwargs"])
@pytest.mark.parametrize("method", SCALAR_AND_SURGERY)
def test_hugging_face_accumulates_as_a_plain_loop_does(hugging_face, method, greedy, tmp_path, monkeypatch):
    """Also where the model would make the Trainer believe that the loss is divided already."""
    if greedy:

        class Greedy(hugging_face.Model):
            def forward(self, input_ids, **kwargs):
                return super().forward(input_ids)

        data = [{**sample, "labels": sample["topic"]} for sample in hugging_face.make_data(256)]
        monkeypatch.setattr(hugging_face, "Model", Greedy)
        monkeypatch.setattr(hugging_face, "make_data", lambda: data)
    # Neither Adam nor clipping, which would hide a loss that is not divided.
    options = {"gradient_accumulation_steps": 2, "max_steps": 5, "save_strategy": "no"}
    options |= {"optim": "sgd", "max_grad_norm": 0.0, "remove_unused_columns": not greedy}
    trainer = hugging_face.make_trainer(method, str(tmp_path), **options)
    batches = []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        batches.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", recording)
    trainer.train()
    assert len(batches) == 10

    twin = hugging_face.make_trainer(method, str(tmp_path), **options)
    twin.create_optimizer_and_scheduler(5)
    model = twin.model
    for number, batch in enumerate(batches, start=1):
        outputs = model(batch["input_ids"])
        losses = {
            "topic": nn.functional.cross_entropy(outputs["topic"], batch["topic"]),
            "tone": (outputs["tone"].squeeze(1) - batch["tone"]).square().mean(),
        }
        (model.balancer(losses, shared_params=model.trunk.parameters()) / 2).backward()
        if number % 2 == 0:
            twin.optimizer.step()
            twin.lr_scheduler.step()
            twin.optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            trainer.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("method", ["dwa", "gaba", "uncertainty", "pcgrad"])
def test_hugging_face_resumes_exactly(hugging_face, method, tmp_path, monkeypatch):
    data = hugging_face.make_data(256)
    monkeypatch.setattr(hugging_face, "make_data", lambda: data)
    whole = hugging_face.make_trainer(method, str(tmp_path))
    whole.train()
    resumed = hugging_face.make_trainer(method, str(tmp_path))
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()  # all of it comes from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert resumed.model.balancer.calls == whole.model.balancer.calls == 24
    if method == "dwa":
        assert whole.model.balancer.get_weights() != {"topic": 1.0, "tone": 1.0}
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())


def test_hugging_face_decays_no_learned_weight_and_evaluates_without_a_trace(hugging_face, tmp_path):
    trainer = hugging_face.make_trainer("uncertainty", str(tmp_path))
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert "heads.topic.weight" in decayed
    assert "balancer.log_scales" not in decayed
    assert "balancer.log_scales" in super(type(trainer), trainer).get_decay_parameter_names(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.evaluate(hugging_face.make_data(64))["eval_loss"] > 0
    assert_same_state(trainer.model.state_dict(), before)


def test_hugging_face_from_the_command_line(hugging_face, capsys):
    hugging_face.main(["--method", "gaba", "--accumulate", "1"])
    out = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", out)]
    assert len(losses) == 3
    assert losses[-1] < 0.5 * losses[0]
    assert float(re.findall(r"'weight_tone': '?([\d.]+)", out)[-1]) > 0.5


# ---------------------------------------------------------------- accelerate_loop.py
@pytest.fixture
def accelerate_loop(recipe):
    pytest.importorskip("accelerate")
    return recipe("accelerate_loop")


@pytest.mark.parametrize("method", ["uncertainty", "upgrad"])
def test_accelerate(accelerate_loop, run_recipe, tmp_path, method, capsys):
    """One process is the plain loop; a resumed run is the whole one; two processes are one."""
    state = {name: str(tmp_path / name) for name in ("folder", "one", "resumed", "two")}
    accelerate_loop.main(["--method", method, "--out", state["folder"], "--save", state["one"]])
    printed = capsys.readouterr().out
    accelerate_loop.main(["--method", method, "--resume", state["folder"], "--save", state["resumed"]])
    by_two = run_recipe("accelerate_loop", "--method", method, "--save", state["two"], processes=2)
    assert "2 process(es)" in by_two, "and not each alone"
    assert numbers_in(by_two) == pytest.approx(numbers_in(printed), abs=5e-6)
    one, resumed, two = (torch.load(state[name], weights_only=True) for name in ("one", "resumed", "two"))
    for part in ("model", "balancer"):
        assert_same_state(resumed[part], one[part])
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-6)
    weights = one["balancer"]["applied_weights"]
    torch.testing.assert_close(two["balancer"]["applied_weights"], weights, rtol=1e-5, atol=1e-6)

    torch.manual_seed(0)
    model, balancer = accelerate_loop.Model(), accelerate_loop.METHODS[method](accelerate_loop.TASKS)
    learned = {"params": [*balancer.parameters()], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": [*model.parameters()]}, learned], lr=5e-3)
    for epoch in range(2):
        for number, (inputs, targets) in enumerate(accelerate_loop.make_loader(epoch), start=1):
            predictions = model(inputs)
            losses = {
                task: (predictions[task] - targets[:, k]).square().mean()
                for k, task in enumerate(accelerate_loop.TASKS)
            }
            (balancer(losses, shared_params=model.trunk) / 2).backward()
            if number % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one["model"][name], value, rtol=0, atol=1e-6)
