"""On a CUDA device: the same numbers as on the CPU in float64, mixed precision, cuDNN, and no waiting for the device.

pytest -m cuda --compatibility=docs/compatibility.md    # keeps the results for the page, beside it
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from compatibility import NEEDS_CUDA
from reference_loop import OPTIONS, TASKS, Loop, amp_loop
from torch import Tensor, nn

from mtlbalance.errors import InvalidArgumentError, NonFiniteWarning

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NEEDS_CUDA),
]
situation = pytest.mark.situation


@pytest.fixture(autouse=True)
def exact_matrix_products() -> Iterator[None]:
    """Without TensorFloat-32, whose ten bits would hide what is compared."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture
def there(method) -> dict[str, object]:
    """Where the balancer under test is; its twin stays on the CPU, unless draws differ between devices."""
    return {"device": "cuda", "on_device": method == "graddrop"}


@pytest.fixture
def pair(make, method):
    """The balancer under test and its twin."""
    return lambda tasks=TASKS: tuple(make(method, tasks, **OPTIONS) for _ in range(2))


@situation("equals the CPU")
def test_a_loop_equals_the_cpu_in_float64(pair, there, problem):
    Loop(*pair(), problem(TASKS, dtype=torch.float64), **there).run()


@situation("equals the CPU")
def test_features_equal_the_cpu_in_float64(pair, there, problem):
    balancer, twin = pair()
    if not balancer.needs_parameters:
        Loop(balancer, twin, problem(TASKS, dtype=torch.float64), **there).run(features=True)


@situation("equals the CPU")
def test_fused_adamw_in_float32(pair, there, problem):
    Loop(*pair(), problem(TASKS), **there, fused=True, rtol=1e-3, atol=1e-4).run()


class RecurrentTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 6, num_layers=2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lstm(inputs[:, :, None])[0][:, -1]


@situation("cuDNN LSTM")
def test_a_cudnn_lstm(pair, there, problem):
    """Its backward pass exists in cuDNN alone, once differentiable, and in training mode only."""
    assert torch.backends.cudnn.is_available()
    Loop(*pair(), problem(TASKS, RecurrentTrunk()), **there, rtol=1e-2, atol=1e-3).run()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        pytest.param(torch.bfloat16, 1.0, marks=situation("bf16, CUDA"), id="bf16"),
        *(
            pytest.param(torch.float16, scale, marks=situation("fp16, CUDA"), id=f"fp16-{scale:g}")
            for scale in (1e-6, 1.0, 1e6)
        ),
    ],
)
def test_mixed_precision(pair, there, problem, dtype, scale):
    tasks = TASKS[:2]
    distance, _ = amp_loop(*pair(tasks), problem(tasks), dtype, scale, **there)
    assert distance < (0.02 if dtype == torch.bfloat16 else 0.005)


@situation("overflow, CUDA")
def test_an_overflow_is_skipped_by_the_scaler_and_leaves_no_trace(make, method, problem):
    p = problem(TASKS[:2])
    balancer = make(method, TASKS[:2], warmup_steps=0)
    for module in (p.trunk, p.heads, balancer):
        module.cuda()
    p.inputs, p.targets = p.inputs.cuda(), {task: target.cuda() for task, target in p.targets.items()}
    optimizer = torch.optim.SGD(p.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        losses = p.losses()
        before = [parameter.detach().clone() for parameter in p.parameters()]
        state = {key: value.clone() for key, value in balancer.state_dict().items()}
        if step == 2:
            losses["a"] = losses["a"] * torch.inf
        scaler.scale(p.call(balancer, losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert scaler.get_scale() == 2.0**9
            assert all(torch.equal(*both) for both in zip(before, p.parameters(), strict=True))
            for key, value in balancer.state_dict().items():
                if value.is_floating_point() and key != "applied_weights":
                    assert torch.equal(value.nan_to_num(), state[key].nan_to_num()), key
    with warnings.catch_warnings(
        record=True
    ) as caught:  # said at the next read-out, which waits for the device
        warnings.simplefilter("always")
        assert balancer.num_nonfinite == 1
    assert [item.category for item in caught] == [NonFiniteWarning]
    assert all(parameter.isfinite().all() for parameter in p.parameters())


@situation("no host sync")
@pytest.mark.parametrize("features", [False, True])
def test_a_step_waits_for_nothing(make, method, problem, features):
    balancer = make(method, TASKS, warmup_steps=1, max_weight=1.0)
    if balancer.copies_to_host:
        assert "to the host" in "".join(str(base.__doc__) for base in type(balancer).__mro__)
        pytest.skip("copies K×K numbers to the host once a measured step")
    if features and balancer.needs_parameters:
        pytest.skip("reads parameters only")
    p = problem(TASKS)
    for module in (p.trunk, p.heads, balancer):
        module.cuda()
    p.inputs, p.targets = p.inputs.cuda(), {task: target.cuda() for task, target in p.targets.items()}
    optimizer = torch.optim.AdamW(p.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        found = p.trunk(p.inputs)
        reads = found if features else p.trunk.parameters()
        balancer(p.per_sample(found), shared_params=reads, targets=p.targets).backward()
        optimizer.step()

    for _ in range(3):
        step()  # libraries and state are set up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert balancer.num_nonfinite == 0


@pytest.mark.parametrize("batched", ["gaba", "pcgrad", "upgrad", "excess-mtl"])
def test_the_batched_pass_equals_the_cpu_in_float64(make, problem, batched):
    balancer, twin = make(batched, TASKS, **OPTIONS, delivery="batched"), make(batched, TASKS, **OPTIONS)
    Loop(balancer, twin, problem(TASKS, dtype=torch.float64), device="cuda").run()


def test_a_cudnn_lstm_cannot_be_passed_for_all_tasks_at_once(make, problem):
    p = problem(TASKS, RecurrentTrunk())
    for module in (p.trunk, p.heads):
        module.cuda()
    p.inputs, p.targets = p.inputs.cuda(), {task: target.cuda() for task, target in p.targets.items()}
    with pytest.raises(InvalidArgumentError, match="delivery='batched' is not possible"):
        p.call(make("gaba", TASKS, delivery="batched"))
