"""A sound backbone by a third party, and one for every way to break a promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mtlbalance.plugins import BackboneRegistration, PluginConfig

WIDTH = 6


class Options(PluginConfig):
    pass


class Net(nn.Module):
    def __init__(self, inputs, tasks) -> None:
        super().__init__()
        self.trunk: nn.Module = nn.Sequential(nn.Linear(inputs.shape[-1], WIDTH), nn.Tanh(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({task.name: nn.Linear(WIDTH, task.outputs) for task in tasks})


def register(build: Callable[..., Any]) -> BackboneRegistration:
    return BackboneRegistration("acme", "a backbone of a test", Options, build)


SOUND = register(lambda options, inputs, tasks: Net(inputs, tasks))
BROKEN: dict[str, tuple[BackboneRegistration, set[str]]] = {}


def breaks(*checks: str):
    """Note a change to the sound network, and which checks must fail, and no other."""

    def note(change: Callable[[Net], Any]) -> Any:
        def build(options, inputs, tasks):
            net = Net(inputs, tasks)
            change(net)
            return net

        BROKEN[change.__name__] = (register(build), set(checks))
        return change

    return note


class Around(nn.Module):
    """A trunk with something done to its features."""

    def __init__(self, inner: nn.Module, change: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, inputs):
        return self.change(self, self.inner(inputs))


@breaks("can_be_built")
def no_trunk(net):
    del net.trunk


@breaks("can_be_built")
def stray_parameters(net):
    net.scale = nn.Parameter(torch.ones(3))


@breaks("can_be_built")
def too_few_heads(net):
    del net.heads["kind"]


@breaks("features_are_rows")
def features_of_steps(net):
    net.trunk = nn.Sequential(net.trunk, nn.Unflatten(1, (1, WIDTH)))
    net.heads = nn.ModuleDict({name: nn.Sequential(nn.Flatten(), head) for name, head in net.heads.items()})


@breaks("heads_fit_their_tasks")
def a_narrow_head(net):
    net.heads["kind"] = nn.Linear(WIDTH, 2)


@breaks("samples_are_apart_in_eval")
def statistics_of_the_batch(net):
    net.trunk = Around(net.trunk, lambda _, features: features - features.mean(dim=0))


@breaks("every_task_trains_the_whole_trunk")
def a_tower_in_the_trunk(net):
    net.trunk.register_parameter("idle", nn.Parameter(torch.ones(2)))


@breaks("every_task_trains_the_whole_trunk")
def a_detached_head(net):
    net.heads["place"] = nn.Sequential(Around(nn.Identity(), lambda _, f: f.detach()), net.heads["place"])


@breaks("heads_belong_to_one_task")
def heads_that_share(net):
    net.heads["kind"] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    net.heads["amount"] = nn.Sequential(net.heads["kind"][0], nn.Linear(WIDTH, 1))


@breaks("seeds_reproduce")
def a_generator_without_a_seed(net):
    generator = torch.Generator()
    generator.seed()
    nn.init.normal_(net.trunk[0].weight, generator=generator)


@breaks("seeds_reproduce")
def always_the_same_weights(net):
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)


@breaks("eval_is_steady", "samples_are_apart_in_eval", "state_is_complete")
def dropout_that_never_sleeps(net):
    net.trunk = Around(net.trunk, lambda _, features: nn.functional.dropout(features, 0.5, training=True))


def count(module, features):
    module.seen += 1.0
    return features


@breaks("eval_is_steady")
def a_counter_in_eval(net):
    net.trunk = Around(net.trunk, count)
    net.trunk.register_buffer("seen", torch.zeros(()))


@breaks("outputs_are_finite")
def an_overflow(net):
    net.heads["amount"] = nn.Sequential(
        net.heads["amount"], Around(nn.Identity(), lambda _, f: (200.0 + f).exp())
    )


def shift(module, features):
    module.mean = 0.9 * module.mean + 0.1 * features.detach().mean() if module.training else module.mean
    return features - module.mean


@breaks("state_is_complete")
def a_mean_out_of_the_state(net):
    net.trunk = Around(net.trunk, shift)
    net.trunk.mean = 0.0


@breaks("follows_the_device")
def a_constant_on_the_cpu(net):
    net.trunk = Around(net.trunk, lambda _, features: features + torch.ones(WIDTH))
