"""K-FAC: curvature that is kept, and the layers that are edited."""

from __future__ import annotations

import copy

import torch

from lm_ortho.baselines.kfac import compute_factors, keep_curvature_mass, select_late_feed_forward
from lm_ortho.data.encoding import encode
from tests.support.moments import draw_moment

torch.set_num_threads(1)


def test_curvature_that_is_kept_whole_changes_nothing_and_less_of_it_changes_more():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(9))
    outputs, inputs = draw_moment(6, 1), draw_moment(10, 2)
    torch.testing.assert_close(keep_curvature_mass(weight, outputs, inputs, 1.0), weight, rtol=1e-5, atol=1e-6)
    lost = [float((keep_curvature_mass(weight, outputs, inputs, share) - weight).norm()) for share in (0.9, 0.5, 0.1)]
    assert 0 < lost[0] < lost[1] < lost[2] < float(weight.norm())


def test_layers_of_the_later_blocks_are_edited_and_mlps_where_there_are_some():
    names = [f"model.layers.{i}.{part}" for i in range(4) for part in ("mlp.up_proj", "self_attn.q_proj")]
    assert select_late_feed_forward(names, 0.5) == ["model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    assert select_late_feed_forward(["h.0.c_attn", "h.1.c_attn"], 0.5) == ["h.1.c_attn"]
    assert select_late_feed_forward(["first", "second"], 0.5) == ["first", "second"]


def test_factors_are_those_of_the_given_layers(memorised_models):
    model = copy.deepcopy(memorised_models.merged)
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    inputs, outputs = compute_factors(model, {name: layer}, encode(memorised_models.tokenizer, memorised_models.retain))
    assert inputs[name].shape == (layer.in_features, layer.in_features)
    assert outputs[name].shape == (layer.out_features, layer.out_features)
    assert torch.linalg.eigvalsh(outputs[name].double()).min() > -1e-6
    assert not any(parameter.requires_grad for parameter in model.parameters())
