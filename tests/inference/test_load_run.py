"""What ``load_run`` gives, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mtlbalance import load_run
from mtlbalance.config.problems import InvalidConfigError
from mtlbalance.errors import DataError, DeviceError, PredictionError, RunFolderError
from mtlbalance.inference import LoadedRun
from mtlbalance.inference.predicting import probabilities


def metrics_of(predicted: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, float]:
    error = predicted["level"].double() - targets["level"].double()
    return {
        "level_rmse": float(error.square().mean().sqrt()),
        "kind_accuracy": float((predicted["kind"].argmax(dim=1) == targets["kind"]).double().mean()),
    }


@pytest.mark.parametrize(("weights", "key"), [("ema", "metrics"), ("last", "final_metrics")])
@pytest.mark.parametrize("storage", ["memory", "items"])
def test_predictions_give_the_metrics_in_the_results(
    train: Any, weights: Any, key: str, storage: str
) -> None:
    run = load_run(train(f"dataset.storage={storage}", "dataset.constant_metric=true"), weights=weights)
    assert run.results["best_epoch"] != run.results["epochs_run"] - 1  # else both weights would be the same
    predicted = run.predict(run.split("test"))
    targets = load_run(train("dataset.constant_metric=true")).data.test.targets  # type: ignore[attr-defined]
    found = metrics_of(predicted, targets)
    for name, value in found.items():
        assert value == pytest.approx(run.results[key][name], rel=1e-6)


def test_live_weights_are_those_of_the_last_step(folder: Path) -> None:
    run = load_run(folder, weights="live")
    saved = safetensors.torch.load_file(folder / "checkpoints" / "epoch_00003.safetensors")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"])
    averaged = load_run(folder, weights="last").model.state_dict()
    assert not torch.equal(averaged["heads.level.weight"], run.model.state_dict()["heads.level.weight"])


def test_what_a_loaded_run_knows(loaded: LoadedRun, folder: Path) -> None:
    assert loaded.config.balancer.name == "gaba"
    assert [task.name for task in loaded.tasks] == ["level", "kind"]
    assert (loaded.inputs.shape, loaded.input_dtype) == ((4,), torch.float32)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.epoch == loaded.results["best_epoch"]


def test_data_are_not_needed_to_predict(loaded: LoadedRun, plugin: Any) -> None:
    plugin.data_source = "another"
    assert loaded.predict(torch.zeros(2, 4))["level"].shape == (2,)
    with pytest.raises(RunFolderError, match=r"other data .*\n  data_source: 'made-up' -> 'another'"):
        loaded.split("test")


def test_data_with_other_numbers_are_refused(loaded: LoadedRun, plugin: Any) -> None:
    plugin.input_shift = 1e-3
    with pytest.raises(RunFolderError, match=r"sha256\.test"):
        loaded.split("test")


def test_a_run_that_did_not_record_its_inputs_asks_its_data(own_folder: Path, loaded: LoadedRun) -> None:
    results = json.loads((own_folder / "results.json").read_text())
    del results["inputs"]
    (own_folder / "results.json").write_text(json.dumps(results))
    (own_folder / "sums.json").unlink()
    older = load_run(own_folder)
    assert (older.inputs, older.input_dtype) == (loaded.inputs, loaded.input_dtype)


def test_chunks_bound_what_the_model_sees_and_change_nothing(loaded: LoadedRun) -> None:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded.model(inputs)
    sizes: list[int] = []
    handle = loaded.model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    for batch_size in (1, 7, 50, 1000):
        sizes.clear()
        predicted = loaded.predict(inputs, batch_size=batch_size, logits=True)
        assert sizes == [min(batch_size, 50 - start) for start in range(0, 50, batch_size)]
        for task, values in predicted.items():
            assert (values - expected[task]).abs().max() <= 1e-6
    handle.remove()


def test_probabilities_by_default_and_logits_on_demand(loaded: LoadedRun) -> None:
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    logits = loaded.predict(inputs, logits=True)["kind"].double().numpy()
    likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.predict(inputs)["kind"].numpy(), likely, rtol=1e-5)
    # One logit is that of class 1 against class 0: a softmax over it would be 1 for every sample.
    np.testing.assert_allclose(probabilities(torch.tensor([[0.0], [2.0]])), [[0.5], [0.880797]], rtol=1e-6)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(">f8"),
        lambda x: x.tolist(),
        lambda x: x.to(torch.int64),
        lambda x: x.numpy()[::-1].copy()[::-1],
    ],
    ids=["tensor", "array", "big-endian", "lists", "integers", "reversed"],
)
def test_inputs_of_every_kind(loaded: LoadedRun, of: Callable[[Tensor], Any]) -> None:
    inputs = torch.arange(-6.0, 6.0).reshape(3, 4)
    assert torch.equal(loaded.predict(of(inputs))["level"], loaded.predict(inputs)["level"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 5), r"expected the shape \(N, 4\) \(4 features\), found \(2, 5\)$"),
        (torch.zeros(4), r"found \(4,\); for a single input, add a first dimension of 1"),
        (torch.zeros(2, 4, 1), r"found \(2, 4, 1\)"),
        (torch.zeros(()), r"found \(\)"),
        (torch.zeros(0, 4), "nothing to predict on"),
        (np.array([["a", "b", "c", "d"]]), "numbers are needed, but they are of type <U1"),
        ([[1, 2], [3]], "cannot be made an array"),
    ],
)
def test_inputs_that_do_not_fit(loaded: LoadedRun, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded.predict(inputs)


def test_options_that_do_not_fit(loaded: LoadedRun) -> None:
    with pytest.raises(DataError, match="batch_size must be at least 1, not 0"):
        loaded.predict(torch.zeros(1, 4), batch_size=0)
    with pytest.raises(DeviceError, match="device = 'gpu' is no device"):
        loaded.predict(torch.zeros(1, 4), device="gpu")
    with pytest.raises(
        DataError, match=r"no 'tests' set; did you mean 'test'\?; it has training, validation"
    ):
        loaded.split("tests")


def test_a_model_that_fails_names_the_samples(loaded: LoadedRun) -> None:
    def fail(_: Any, arguments: tuple[Tensor]) -> None:
        if arguments[0].max() > 5:
            raise ValueError("out of vocabulary")

    loaded.model.register_forward_pre_hook(fail)
    with pytest.raises(
        PredictionError, match=r"failed on samples 4 to 5: ValueError: out of vocabulary \(at .*\d+\)"
    ):
        loaded.predict(torch.arange(24.0).reshape(6, 4).clamp(max=5) + torch.eye(6)[:, 5:], batch_size=2)


def test_loading_leaves_the_generators_alone(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run = load_run(folder)
    run.predict(run.split("test"))
    assert torch.equal(torch.rand(3), expected)


Spoil = Callable[[Path], Any]


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def without_sums(spoil: Spoil) -> Spoil:
    return lambda folder: (spoil(folder), (folder / "sums.json").unlink())


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "there is no run folder"),
        (emptied, r"is not a run folder: it has no config\.resolved\.toml"),
        (lambda f: (emptied(f), (f / "plan.json").touch()), "is not a run folder: it is a sweep's"),
        (lambda f: f.rename(f.parent / "seed_3") and (f.mkdir(), (f.parent / "seed_3").rename(f / "seed_3")),
         "name the folder of one seed in it: seed_3"),
        (lambda f: (f / "results.json").unlink(), r"has not finished: .*'mtlbalance run .*own/config\.resolved\.toml"),
        (rewrite("model.safetensors", flip), r"not what sums\.json says they were: model\.safetensors"),
        (rewrite("results.json", lambda text: text + b" "), r"says they were: results\.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"says they were: model\.safetensors"),
        (without_sums(rewrite("model.safetensors", lambda content: content[:-9])), "cannot read the weights in"),
        (without_sums(rewrite("model.safetensors", lambda _: b"")), "cannot read the weights in"),
        (without_sums(rewrite("results.json", lambda text: text[:50])), r"cannot read .*results\.json"),
        (without_sums(rewrite("results.json", lambda text: text.replace(b'"schema": 1', b'"schema": 9'))),
         "has schema 9, made by another version of mtlbalance; this one reads 1"),
        (without_sums(rewrite("results.json", lambda text: text.replace(b'"run"', b'"ran"'))), "has no 'run'"),
        (rewrite("config.resolved.toml", lambda text: text.replace(b"width = 8", b"width = 9")),
         "does not have the config_hash in results.json"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used(own_folder: Path, spoil: Spoil, message: str) -> None:
    spoil(own_folder)
    with pytest.raises(RunFolderError, match=message) as caught:
        load_run(own_folder)
    assert caught.value.exit_code == 2


def test_a_file_is_not_a_run_folder(folder: Path) -> None:
    with pytest.raises(RunFolderError, match=r"results\.json is a file; name the run's folder"):
        load_run(folder / "results.json")


def test_weights_of_another_network(own_folder: Path) -> None:
    weights = safetensors.torch.load_file(own_folder / "model.safetensors")
    weights["heads.level.weight"] = torch.zeros(1, 9)
    safetensors.torch.save_file(weights, own_folder / "model.safetensors")
    (own_folder / "sums.json").unlink()
    with pytest.raises(RunFolderError, match=r"do not fit the backbone 'net' .*heads\.level\.weight"):
        load_run(own_folder)


def test_the_last_weights_need_their_checkpoint(own_folder: Path) -> None:
    shutil.rmtree(own_folder / "checkpoints")
    assert load_run(own_folder).weights == "ema"
    with pytest.raises(
        RunFolderError, match=r"'last' are in the checkpoint of epoch 3, which is gone or damaged"
    ):
        load_run(own_folder, weights="last")


def test_a_plugin_that_is_gone(own_folder: Path) -> None:
    config = own_folder / "config.resolved.toml"
    config.write_text(config.read_text().replace("training_plugin.py", "gone_plugin.py"))
    with pytest.raises(InvalidConfigError, match=r"gone_plugin\.py"):
        load_run(own_folder)


def test_overrides_of_what_does_not_decide_the_result(folder: Path) -> None:
    assert load_run(folder, overrides=["run.device=cuda"]).config.run.device == "cuda"
    with pytest.raises(RunFolderError, match=r"which decide its result .*\n  dataset\.samples: 60 -> 40$"):
        load_run(folder, overrides=["dataset.samples=40"])


def test_unknown_weights(folder: Path) -> None:
    with pytest.raises(RunFolderError, match="unknown weights 'best'; use 'ema', 'last' or 'live'"):
        load_run(folder, weights="best")  # type: ignore[arg-type]
