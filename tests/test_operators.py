"""The operators one by one: grouped slices, kernels, statistics of both kinds, packing."""

from __future__ import annotations

from types import SimpleNamespace

import fixtures_supernet  # noqa: F401  (one thread)
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators import (
    LayerSelect,
    Sizes,
    StatisticsRecorder,
    SubnetNorm,
    WeightSlice,
    active,
    pack,
    packed_size,
    unpack,
)
from subnets import SupernetError

SUBNET = SimpleNamespace(name="half")
IMAGES = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("groups", "outputs", "inputs"), [(8, 4, 4), (4, 8, 4), (2, 8, 4)])
def test_grouped_convolutions_use_their_leading_groups(groups: int, outputs: int, inputs: int) -> None:
    layer = nn.Conv2d(8, 16 if groups < 8 else 8, 3, padding=1, groups=groups)
    sliced = WeightSlice(layer, 0, Sizes(outputs=lambda _: outputs))
    sliced.check(SUBNET, "layer")
    with torch.no_grad(), active([sliced.settings(SUBNET)]):
        found = sliced(IMAGES[:, :inputs])
    torch.testing.assert_close(found, layer(IMAGES)[:, :outputs])
    torch.testing.assert_close(sliced.standalone(SUBNET)(IMAGES[:, :inputs]), layer(IMAGES)[:, :outputs])


@pytest.mark.parametrize(
    ("layer", "sizes", "message"),
    [
        (nn.Conv2d(8, 8, 3), Sizes(outputs=lambda _: 9), "layer: half needs 9x8 channels of 8x8"),
        (nn.Linear(8, 8), Sizes(inputs=lambda _: 0), "layer: half needs 8x0 channels of 8x8"),
        (nn.Conv2d(8, 8, 3, groups=2), Sizes(outputs=lambda _: 5), "layer: half needs 5x4 channels of 8x4"),
        (nn.Conv2d(8, 8, 5), Sizes(kernel=lambda _: 7), "layer: half needs a kernel of 7 from 5"),
        (nn.Conv2d(8, 8, 5), Sizes(kernel=lambda _: 2), "layer: half needs a kernel of 2 from 5"),
    ],
)
def test_sizes_that_the_weight_does_not_hold_are_named(layer: nn.Conv2d, sizes: Sizes, message: str) -> None:
    with pytest.raises(SupernetError) as caught:
        WeightSlice(layer, 0, sizes).check(SUBNET, "layer")
    assert str(caught.value) == message


def test_without_matrices_a_smaller_kernel_is_the_centre() -> None:
    layer = nn.Conv2d(8, 8, 5, padding=2, groups=8)
    sliced = WeightSlice(layer, 0, Sizes(kernel=lambda _: 3))
    with torch.no_grad():
        weight, _ = sliced.slices(SUBNET)
        assert torch.equal(weight, layer.weight[:, :, 1:4, 1:4])
        with active([sliced.settings(SUBNET)]):
            assert sliced(IMAGES).shape == IMAGES.shape


def test_selected_layers_pass_on_what_else_they_are_given() -> None:
    class Add(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor, scale: int = 1) -> Tensor:
            return x + scale * self.number

    select = LayerSelect(nn.ModuleList(map(Add, (1, 10, 100))), 0, lambda _: (0, 2))
    with active([select.blocks_of(SUBNET)]):
        assert float(select(torch.zeros(1), 2)) == 202
    plain = select.standalone(SUBNET, {})
    assert isinstance(plain, nn.ModuleList)
    assert [(name, block.number) for name, block in plain.named_children()] == [("0", 1), ("1", 100)]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 4, 4, generator=generator).double() + size for size in (5, 2, 1)]


def recorded(pooled: bool) -> tuple[Tensor, Tensor]:
    recorder = StatisticsRecorder(pooled)
    for batch in batches():
        recorder.observe(batch)
    return recorder.statistics()


def test_pooled_statistics_are_those_of_everything_together() -> None:
    mean, var = recorded(pooled=True)
    everything = torch.cat(batches()).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, everything.mean(1))
    torch.testing.assert_close(var, everything.var(1, correction=0))


def test_official_statistics_average_those_of_batches_by_size() -> None:
    mean, var = recorded(pooled=False)
    each = [batch.transpose(0, 1).flatten(1) for batch in batches()]
    sizes = [5 / 8, 2 / 8, 1 / 8]
    torch.testing.assert_close(mean, sum(size * part.mean(1) for size, part in zip(sizes, each, strict=True)))
    variances = (size * part.var(1, correction=0) for size, part in zip(sizes, each, strict=True))
    torch.testing.assert_close(var, sum(variances))
    assert (var < recorded(pooled=True)[1]).all(), "the variance of the batches' means is left out"


def test_a_batch_is_normalised_with_its_own_statistics_while_it_calibrates() -> None:
    norm = SubnetNorm(nn.BatchNorm2d(8), 0, lambda _: 4)
    settings = norm.settings(SUBNET)._replace(recorder=StatisticsRecorder())
    with active([settings]):
        found = norm(IMAGES[:, :4])
    torch.testing.assert_close(found, F.batch_norm(IMAGES[:, :4], None, None, training=True))


def test_packed_statistics_are_off_by_half_a_step_at_most() -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = [40, 1, 7]
    mean, log = 3 * torch.randn(48, generator=generator), torch.randn(48, generator=generator)
    flat = torch.cat([mean, log.exp()])
    packed = pack(flat, sizes)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (packed_size(sizes),))
    found_mean, found_var = unpack(packed, sizes).split(48)
    for part, scaled in zip(torch.split(torch.arange(48), sizes), (mean / (log / 2).exp()).split(sizes), strict=True):
        span = float(log[part].max() - log[part].min())
        assert float((found_var[part].log() - log[part]).abs().max()) <= span / 510 + 1e-4
        found, exact = (found_mean[part] / found_var[part].sqrt()).asinh(), scaled.asinh()
        assert float((found - exact).abs().max()) <= float(exact.max() - exact.min()) / 510 + 1e-3


def test_channels_without_variance_survive_packing() -> None:
    flat = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0, 4.0])
    mean, var = unpack(pack(flat, [3]), [3]).split(3)
    torch.testing.assert_close(var, flat[3:], rtol=0.05, atol=1e-4)
    torch.testing.assert_close(mean[:2], flat[:2], rtol=0.05, atol=0.01)
