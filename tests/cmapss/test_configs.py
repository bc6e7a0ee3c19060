"""Every config of the example loads, and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mtlbalance_cmapss.config import CmapssConfig, CnnBiLstmAttentionConfig

from mtlbalance.config import load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmapss"
SWEEPS = {"paper_table", "fixed_weight_sweep"}  # see test_sweeps.py
CONFIGS = sorted(path for path in EXAMPLE.glob("*.toml") if path.stem not in {"pyproject", *SWEEPS})


def test_the_configs_are_all_there() -> None:
    assert {path.stem for path in CONFIGS} == {
        *(f"fd00{number}_gaba" for number in (1, 2, 3, 4)),
        "fd002_gaba_honest",
        "fd002_fixed",
        "fd002_grace",
        "fd002_amnl",
        "quickstart",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.dataset.registration.name == "cmapss"
    assert config.backbone.registration.name == "cnn-bilstm-attention"
    assert [task.name for task in config.tasks] == ["rul", "health"]
    honest = "honest" in path.stem or path.stem == "quickstart"
    options = config.dataset.options
    assert isinstance(options, CmapssConfig)
    assert options.protocol == ("honest" if honest else "paper")
    assert options.pad == ("short" if honest else "all")
    assert options.cap_test_labels
    if path.stem != "quickstart":
        subset, method, *_ = path.stem.split("_")
        assert options.subset == subset.upper()
        assert config.balancer.registration.name == method
        training = config.training
        assert (training.epochs, training.batch_size, training.patience) == (500, 256, 80)
        assert (training.lr, training.weight_decay, training.weight_decay_late) == (1e-3, 1e-4, 5e-5)
        assert (training.grad_clip, training.warmup_epochs, training.ema_decay) == (1.0, 10, 0.999)
        assert (training.scheduler_factor, training.scheduler_patience) == (0.5, 30)
        backbone = config.backbone.options
        study = CnnBiLstmAttentionConfig(funnel_dropout=0.0 if honest else None)
        assert backbone == study


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.subset=FD005", "FD005"),
        ("dataset.windw=20", "window"),
        ("backbone.num_attention_heads=7", "num_attention_heads = 7 does not divide 2 x hidden_size = 512"),
        ("dataset.health_thresholds=[130, 30]", "health class 0 would be empty"),
    ],
)
def test_a_bad_option_is_named(override: str, message: str) -> None:
    with pytest.raises(Exception, match="error") as caught:
        load_config(EXAMPLE / "fd002_gaba.toml", [override])
    assert message in str(caught.value)


def test_registering_imports_neither_torch_nor_pandas() -> None:
    command = (
        "import sys, mtlbalance_cmapss; "
        "print([name for name in ('torch', 'pandas', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=EXAMPLE, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
