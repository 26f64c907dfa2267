"""What timestep and label decide, computed apart, is what diffusers' own forward computes within."""

import pytest
import torch

from tasks.core.denoiser import build
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet
from tasks.runtime.conditioning import (
    MODULATION,
    TIME,
    RowTable,
    give_rows,
    given_modules,
    idle_modules,
    label_rows,
    row_parts,
    rows_of,
    suitable_cut,
    take_rows_away,
)
from tasks.runtime.precision import apply_precision

LABELLED = {"num_class_embeds": 5}
NETWORKS = {
    "dit": ("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), 5),
    "unet": ("UNet2DModel", unet(8, 1, width=8), 0),
    "labelled unet": ("UNet2DModel", {**unet(8, 1, width=8), **LABELLED}, 5),
    "scale and shift": ("UNet2DModel", {**unet(8, 1, width=8), **LABELLED, "resnet_time_scale_shift": "scale_shift"}, 5),
    "residual sampling": ("UNet2DModel", {**unet(8, 1, width=8), "downsample_type": "resnet", "upsample_type": "resnet",
                                          "down_block_types": ["ResnetDownsampleBlock2D"] * 3,
                                          "up_block_types": ["ResnetUpsampleBlock2D"] * 3}, 0),
    "learned times": ("UNet2DModel", {**unet(8, 1, width=8), "time_embedding_type": "learned", "num_train_timesteps": 1000}, 0),
}
T = torch.tensor([992.0, 993.0, 40.0])


@pytest.fixture(params=NETWORKS)
def network(request):
    name, config, labels = NETWORKS[request.param]
    rng = torch.Generator().manual_seed(0)
    model = build(name, config, SCHEDULE).model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
    return model, labels


def evaluated(model, labels, t=T, x=None):
    x = torch.randn(len(t), 1, 8, 8, generator=torch.Generator().manual_seed(1)) if x is None else x
    return model(x, timestep=t, class_labels=labels, return_dict=False)[0]


def labels_of(count):
    return torch.tensor([0, 4, 2]) if count else None


@pytest.mark.parametrize("cut", [MODULATION, TIME])
def test_each_part_is_what_the_module_puts_out_inside_the_network(network, cut):
    model, count = network
    t = T.long() if isinstance(model.time_proj if hasattr(model, "time_proj") else None, torch.nn.Embedding) else T
    seen = {}
    hooks = [model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out))
             for name in given_modules(model, cut)]
    evaluated(model, labels_of(count), t)
    for hook in hooks:
        hook.remove()
    parts = row_parts(model, cut, T, labels_of(count))
    assert label_rows(model) == count and list(seen) != [] and len(seen) == len(parts)
    for name, part in zip(given_modules(model, cut), parts, strict=True):
        assert torch.equal(part, seen[name]), name


@pytest.mark.parametrize("cut", [MODULATION, TIME])
def test_a_network_that_is_given_its_rows_needs_no_time(network, cut):
    model, count = network
    learned = getattr(model, "time_proj", None).__class__ is torch.nn.Embedding
    labels, before = labels_of(count), {name: id(module) for name, module in model.named_modules()}
    expected = evaluated(model, labels, T.long() if learned else T)
    rows = torch.cat(row_parts(model, cut, T, labels), 1)
    given = give_rows(model, cut)
    given.set_rows(rows)
    wrong = torch.zeros_like(labels) if count and cut == MODULATION else labels
    assert torch.equal(evaluated(model, wrong, torch.zeros(3)), expected)
    take_rows_away(model)
    assert {name: id(module) for name, module in model.named_modules()} == before and "_given_rows" not in vars(model)
    assert torch.equal(evaluated(model, labels, T.long() if learned else T), expected)


def test_nothing_else_than_given_and_idle_modules_reads_the_time(network):
    """Their parameters can be dropped: with all of them NaN the network computes what it did."""
    model, count = network
    rows = torch.cat(row_parts(model, MODULATION, T, labels_of(count)), 1)
    expected = evaluated(model, labels_of(count), T.round().long())
    for name in (*given_modules(model, MODULATION), *idle_modules(model, MODULATION)):
        for parameter in model.get_submodule(name).parameters():
            parameter.data.fill_(float("nan"))
    give_rows(model, MODULATION).set_rows(rows)
    assert torch.equal(evaluated(model, labels_of(count), torch.zeros(3)), expected)


def test_rows_follow_the_live_precision(network):
    model, count = network
    plain = rows_of(model, MODULATION, [40.0])
    apply_precision(model, dict.fromkeys(given_modules(model, MODULATION), "bf16"), {})
    rounded = rows_of(model, MODULATION, [40.0])
    assert plain.shape == rounded.shape == (1, count or 1, plain.shape[2])
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(plain, rounded)


def test_a_table_computes_every_time_once_and_keeps_what_there_is_room_for():
    asked = []

    def compute(t):
        asked.append(t)
        return torch.arange(3.0)[:, None] * 10 + torch.tensor([[t, -t]])

    table = RowTable(compute, most=12)
    found = table(torch.tensor([1.5, 1.5]), torch.tensor([2, 0]))
    assert found.tolist() == [[21.5, 18.5], [1.5, -1.5]] and asked == [1.5]
    assert table(torch.tensor([1.5, 4.0]), torch.tensor([1, 1])).tolist() == [[11.5, 8.5], [14.0, 6.0]] and asked == [1.5, 4.0]
    table(torch.tensor(7.0), torch.tensor([0]))  # there is room for two
    table(torch.tensor(4.0), torch.tensor([0]))
    assert asked == [1.5, 4.0, 7.0] and set(table.kept) == {4.0, 7.0}
    assert RowTable(None, {3.0: torch.ones(1, 2)})(torch.tensor([3.0, 3.0]), torch.tensor([1, 1])).shape == (1, 2)


def test_a_table_that_outgrows_memory_leaves_the_labels_in_the_network():
    model = build("DiTTransformer2DModel", {**dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), "num_embeds_ada_norm": 4000},
                  SCHEDULE).model
    assert suitable_cut(model) == TIME
    assert suitable_cut(build(*NETWORKS["dit"][:2], SCHEDULE).model) == MODULATION
    assert rows_of(model, TIME, [3.0, 4.0]).shape == (2, 1, 64)
