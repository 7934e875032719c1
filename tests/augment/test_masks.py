"""Masks of patches equal those of the reference code, given its random numbers."""

import random

import numpy as np
import pytest
import self_supervised_golden as golden

from vit_jax.augment import masks
from vit_jax.errors import UserError


class Replayed:
    """Random numbers that the reference drew, in the form of `random.Random`."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def uniform(self, low, high):
        return self._next(0, low, high)

    def randint(self, low, high):
        return int(self._next(1, low, high))

    def _next(self, *asked):
        *logged, value = next(self.draws)
        np.testing.assert_allclose(logged, asked, rtol=1e-12)
        return value


def block_rule(about):
    fields = {"rows": "rows", "columns": "cols", "min_patches": "min_num_patches"}
    fields = {name: about[key] for name, key in fields.items()}
    cap = about["max_num_patches"] or about["num_masking_patches"]
    return masks.BlockRule(**fields, max_patches=cap, min_aspect=about["min_aspect"])


@pytest.mark.parametrize("grid", range(4))
def test_block_masks_of_dinov2(grid):
    about = golden.settings("dinov2_block_masks")["grids"][grid]
    rule = block_rule(about)
    for seed in range(4):
        found = golden.below(golden.arrays("dinov2_block_masks"), f"grid{grid}_seed{seed}/")
        draws = golden.arrays("dinov2_block_masks")[f"f64/grid{grid}_seed{seed}/draws"]
        replayed, seeded = Replayed(draws), random.Random(seed)
        for count, expected in zip(found["requested"], found["masks"], strict=True):
            for numbers in (replayed, seeded):
                np.testing.assert_array_equal(rule.draw(int(count), numbers), expected)


@pytest.mark.parametrize("case", [0, 1])
def test_batches_of_block_masks_of_dinov2(case):
    about = golden.settings("dinov2_collate")["cases"][case]
    found = golden.below(golden.arrays("dinov2_collate"), f"{case}/")
    rule = masks.BlockRule(about["grid"], about["grid"], about["max_num_patches"])
    crops = 2 * about["images"]
    share = {"probability": about["mask_probability"], "ratio": about["mask_ratio"]}
    drawn = masks.batch_block_masks(rule, crops, random.Random(about["seed"]), **share)
    np.testing.assert_array_equal(drawn, found["collated_masks"])
    size = masks.most_masked(rule, crops, **share)
    assert size == about["upperbound"]
    places, weights = masks.masked_places(drawn, size)
    count = found["n_masked_patches"][0]
    np.testing.assert_array_equal(places[:count], found["mask_indices_list"])
    golden.assert_near(weights[:count], found["masks_weight"])
    assert not weights[count:].any()
    with pytest.raises(ValueError, match="buffer holds"):
        masks.masked_places(drawn, count - 1)


@pytest.mark.parametrize("about", golden.settings("ijepa_masks"), ids=lambda about: about["name"])
def test_multi_block_masks_of_ijepa(about):
    rule = masks.MultiBlockRule(
        *(size // about["patch_size"] for size in about["input_size"]),
        num_targets=about["npred"],
        num_contexts=about["nenc"],
        target_scale=tuple(about["pred_mask_scale"]),
        context_scale=tuple(about["enc_mask_scale"]),
        target_aspect=tuple(about["aspect_ratio"]),
        min_keep=about["min_keep"],
        overlap=about["allow_overlap"],
    )
    everything = golden.arrays("ijepa_masks")
    for call in range(about["calls"]):
        found = golden.below(everything, f"{about['name']}/call{call}/")
        uniforms = everything[f"f64/{about['name']}/call{call}/uniforms_pred_enc"]
        assert rule.target_size(uniforms[0]) == tuple(found["block_pred_hw"])
        assert rule.context_size(uniforms[1]) == tuple(found["block_enc_hw"])
        log = iter(found["randint_exclusive_high_and_value"])

        def below(high, log=log):
            logged, value = next(log)
            assert logged == high
            return value

        drawn = rule.draw(about["batch"], uniforms, below)
        np.testing.assert_array_equal(drawn.context, found["masks_enc"])
        np.testing.assert_array_equal(drawn.targets, found["masks_pred"])
        assert next(log, None) is None


def test_sizes_of_blocks_of_ijepa():
    rule = masks.MultiBlockRule(16, 16)
    for u, *sizes in golden.arrays("ijepa_masks")["f64/in1k_sizes_u_predh_predw_ench_encw"]:
        assert [*rule.target_size(u), *rule.context_size(u)] == sizes


def test_blocks_too_small_for_ijepa_are_refused():
    rule = masks.MultiBlockRule(4, 4, min_keep=4)
    with pytest.raises(UserError, match="min_keep=4"):
        rule.draw(1, (0.5, 0.5), lambda high: 0)


def test_masks_of_cells_of_simmim():
    found = golden.arrays("simmim_masks")
    for i, about in enumerate(golden.settings("simmim_masks")):
        cells = (about["input_size"] // about["mask_patch_size"]) ** 2
        assert masks.num_masked_cells(cells, about["mask_ratio"]) == about["mask_count"]
        side, cell = (about[key] // about["model_patch_size"] for key in
                      ("input_size", "mask_patch_size"))  # fmt: skip
        numbers = np.random.RandomState(about["numpy_legacy_seed"])
        orders = found[f"masks/{i}/permutation"]
        for order, expected in zip(orders, found[f"masks/{i}/mask"], strict=True):
            np.testing.assert_array_equal(numbers.permutation(cells), order)
            drawn = masks.cell_mask(order, side, side, cell, about["mask_ratio"])
            np.testing.assert_array_equal(drawn, expected)


def test_a_seed_and_a_position_always_draw_the_same_masks():
    rule = masks.BlockRule(14, 14, 98)
    drawn = [
        masks.batch_block_masks(rule, 8, masks.numbers_at(seed, position))
        for seed, position in ((3, 7), (3, 7), (3, 8), (4, 7))
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    assert (drawn[0] != drawn[3]).any()
