"""Heads and inputs that the usual run does not have: wide regressions, a single logit, whole numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from mtlbalance.errors import DataError
from mtlbalance.inference.predicting import PredictedChunk, predict_chunks
from mtlbalance.inference.table import write_predictions
from mtlbalance.slots import InputSpec, TaskSpec
from mtlbalance.training.model import MultiTaskModel

TASKS = (TaskSpec("place", "regression", "mse", outputs=2), TaskSpec("fault", "classification", "mse"))


def test_columns_of_wide_heads_and_of_a_single_logit(tmp_path: Path) -> None:
    outputs = {"place": torch.tensor([[1.5, 2.0], [3.0, 4.0]]), "fault": torch.tensor([[-1.0], [1.0]])}
    targets = {"place": torch.tensor([[1.0, 2.0], [3.0, 5.0]])}
    write_predictions(tmp_path / "out.csv", [PredictedChunk(outputs, targets, {})], TASKS)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    likely = [float(value) for value in torch.tensor([-1.0, 1.0]).sigmoid()]
    assert rows == [
        {"predicted_place_0": 1.5, "predicted_place_1": 2.0, "predicted_fault": 0.0,
         "probability_fault_0": likely[0], "target_place_0": 1.0, "target_place_1": 2.0},
        {"predicted_place_0": 3.0, "predicted_place_1": 4.0, "predicted_fault": 1.0,
         "probability_fault_0": likely[1], "target_place_0": 3.0, "target_place_1": 5.0},
    ]  # fmt: skip


def test_a_model_that_takes_whole_numbers() -> None:
    trunk = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    heads = nn.ModuleDict({"place": nn.Linear(6, 2), "fault": nn.Linear(6, 1)})
    model, spec = MultiTaskModel(trunk, heads, TASKS), InputSpec((2,))
    words = torch.tensor([[0.0, 4.0], [1.0, 2.0]])  # as a CSV file gives them
    [chunk] = predict_chunks(model, [(words, {}, {})], spec, torch.int64)
    assert torch.equal(chunk.outputs["place"], model(words.long())["place"])
    halves = iter([(words, {}, {}), (words + torch.tensor([[0.0], [0.5]]), {}, {})])
    with pytest.raises(DataError, match="takes whole numbers, but sample 3 has others"):
        list(predict_chunks(model, halves, spec, torch.int64))
