"""What each form of GABA does beyond a plain step: products and bytes, and the seconds they take at the ceilings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ceilings import Ceilings, Seconds, reduced_product, triangle_name, weight_product
from counting import Layer, StepCounts
from variants import PLAIN, UPDATE_EVERY
from workloads import Workload

NUMBER_BYTES = 4  # float32
EXACT, FACTORS, OUTPUTS = "", "factors", "outputs alone"
EVERY, FEATURES = f"every {UPDATE_EVERY}th step", "features"
_WORTH = 0.01  # of a plain step: what factors must spare to be a form of their own


class Beyond(NamedTuple):
    """What a form's products take beyond the plain step's, and what moving its bytes does."""

    products: Seconds
    moving: Seconds


def forms(
    counts: StepCounts, workload: Workload, ceilings: Ceilings, factored: Sequence[Layer]
) -> dict[str, Beyond]:
    """Return every form of GABA; those with factors where some layers are kept as such."""
    tasks, numbers = len(workload.tasks), workload.trunk_numbers
    extra = counts.passes.minus(counts.backward)
    products = ceilings.multiplying(extra)
    found = {
        EXACT: Beyond(products, ceilings.moving(_with_gradients(extra.moved, numbers, tasks))),
    }
    if factored:
        spared = np.sum([spared_by_factors(layer, tasks, ceilings) for layer in factored], axis=0)
        moved = _with_factors(extra.moved, numbers, tasks, factored)
        found[FACTORS] = Beyond(products - spared, ceilings.moving(moved))
        weights = np.sum([ceilings.of(weight_product(layer)) for layer in counts.linear], axis=0)
        found[OUTPUTS] = Beyond(products - (tasks - 1) * weights, ceilings.moving(extra.moved))
    measured = found.get(FACTORS, found[EXACT])
    found[EVERY] = Beyond(measured.products / UPDATE_EVERY, measured.moving / UPDATE_EVERY)
    found[FEATURES] = Beyond(
        np.zeros_like(products), ceilings.moving(_of_features(counts.feature_bytes, tasks))
    )
    return found


def factored_layers(counts: StepCounts, tasks: int, ceilings: Ceilings) -> list[Layer]:
    """Return the layers whose factors are cheaper here than K gradients, if that spares anything to speak of."""
    spared = {layer: spared_by_factors(layer, tasks, ceilings) for layer in counts.linear}
    found = [layer for layer in counts.linear if np.median(spared[layer]) > 0]
    total = np.sum([spared[layer] for layer in found], axis=0)
    return found if np.median(total / ceilings.of(PLAIN)) > _WORTH else []


def spared_by_factors(layer: Layer, tasks: int, ceilings: Ceilings) -> Seconds:
    """Return what a layer's factors spare, below zero where they cost more."""
    made = (tasks - 1) * ceilings.of(weight_product(layer))
    return made - ceilings.of(triangle_name(layer)) - tasks * ceilings.of(reduced_product(layer))


def _with_gradients(moved: Mapping[int, int], numbers: int, tasks: int) -> Counter[int]:
    """Add K norms and the weighted sum of K gradients of so many numbers."""
    size, found = numbers * NUMBER_BYTES, Counter(moved)
    found[size] += tasks * size  # a norm is read right after its pass
    found[tasks * size] += (tasks + 1) * size
    return found


def _with_factors(
    moved: Mapping[int, int], numbers: int, tasks: int, factored: Sequence[Layer]
) -> Counter[int]:
    """Add the same where some layers' gradients are R·D for a norm, and D for the sum."""
    found = _with_gradients(moved, numbers - sum(layer.inputs * layer.outputs for layer in factored), tasks)
    for layer in factored:
        reduced = min(layer.rows, layer.inputs) * layer.outputs * NUMBER_BYTES
        size = layer.rows * layer.outputs * NUMBER_BYTES
        found[reduced] += tasks * reduced
        found[tasks * size] += (tasks + 1) * size
    return found


def _of_features(size: int, tasks: int) -> Counter[int]:
    """Return K norms and one weighted sum of the features' gradients, without the sums of two that it replaces."""
    found = _with_gradients({}, size // NUMBER_BYTES, tasks)
    found[3 * size] -= 3 * (tasks - 1) * size
    return found
