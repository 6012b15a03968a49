import numpy as np
import pytest
import torch
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.fitting import check_layout
from paralleldit.parallel_backend.layout.layout import Layout, parse_layout
from paralleldit.parallel_backend.layout.rules import RunFacts
from paralleldit.tools.demo_model.checkpoint import TARGET
from paralleldit.tools.demo_model.scenes import draw, make_scene
from paralleldit.tools.quality.methods import PRESETS, Method, name_of, parse_cache
from paralleldit.tools.quality.metrics import PSNR_CEILING, psnr, ssim
from paralleldit.tools.quality.report import Row, sheet, table
from paralleldit.tools.quality.rivals import Rival, parse_rival

SCENES = [make_scene(99, index, held_out=True) for index in range(3)]


def pictures(noise=0.0):
    drawn = torch.from_numpy(np.stack([draw(scene, 64) for scene in SCENES])) / 255
    wobble = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(1))
    return (drawn + noise * wobble).clamp(0, 1)


def test_psnr_is_that_of_the_mean_squared_error_of_each_picture():
    black = torch.zeros(3, 16, 16, 3)
    other = black.clone()
    other[1] = 0.1
    other[2, :8] = 0.1
    assert psnr(other, black).tolist() == pytest.approx([PSNR_CEILING, 20.0, 20 + 10 * np.log10(2)], abs=1e-4)


def test_ssim_of_flat_pictures_is_their_luminance_term():
    dark, light = torch.full((1, 16, 16, 3), 0.2), torch.full((1, 16, 16, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(ssim(light, dark)) == pytest.approx(expected, abs=1e-5)


def test_ssim_of_scaled_contrast_is_its_structure_term():
    wave = torch.randn(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)).double() * 0.05
    window_variance = 0.05**2
    # Means agree nearly, variances are v and v / 4, the covariance is v / 2: 2 (v / 2) / (5 v / 4), with K2 at 0.03.
    expected = (window_variance + 9e-4) / (1.25 * window_variance + 9e-4)
    assert float(ssim(0.5 + wave / 2, 0.5 + wave)) == pytest.approx(expected, abs=0.01)


def test_both_are_highest_for_equal_pictures_and_fall_with_noise():
    clean, little, much = pictures(), pictures(0.02), pictures(0.1)
    assert ssim(clean, clean).tolist() == pytest.approx([1.0] * 3)
    for measure in (psnr, ssim):
        assert (measure(little, clean) > measure(much, clean)).all()


def test_table_has_a_row_per_method_and_no_nearness_for_the_reference():
    lines = table(Row("serial", pictures()), [Row("same", pictures()), Row("noisy", pictures(0.1))], SCENES).split("\n")
    split = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    cells = {first: [first, *others] for first, *others in split}
    assert list(cells)[2:] == ["serial", "same", "noisy"]
    assert cells["serial"][1:4] == ["", "", ""]
    assert cells["same"][1:4] == ["100.0", "100.0", "1.0000"]
    assert 15 < float(cells["noisy"][1]) < 25
    assert cells["same"][4:] == cells["serial"][4:]
    assert len({len(each) for each in cells.values()}) == 1


def test_the_table_tells_what_a_step_cache_skipped_and_gained():
    cached = Row("cached", pictures(0.1), whole=(12, 28), gain=1.9)
    *_, whole, gain = table(Row("serial", pictures()), [cached], SCENES).split("\n")[-1][1:-1].split("|")
    assert (whole.strip(), gain.strip()) == ("12 of 28", "1.90")


def test_sheet_shows_every_picture_beside_its_caption():
    rows = [Row("serial", pictures()), Row("same", pictures())]
    made = np.asarray(sheet(rows[0], rows[1:], [scene.caption() for scene in SCENES[:2]]))
    expected = (pictures()[1] * 255 + 0.5).byte().numpy()
    height, width, _ = made.shape
    places = [(y, x) for y in range(height - 63) for x in range(width - 63) if (made[y, x] == expected[0, 0]).all()]
    assert sum((made[y : y + 64, x : x + 64] == expected).all() for y, x in places) == 2


@pytest.mark.parametrize(
    ("text", "layout", "name"),
    [
        ("ulysses_degree=2,cfg_degree=2", Layout(ulysses_degree=2, cfg_degree=2), "ulysses2 x cfg2"),
        (
            "pipefusion_degree=2, num_patches=4, warmup_steps=3",
            Layout(pipefusion_degree=2, num_patches=4, warmup_steps=3),
            "pipefusion2, M=4, W=3",
        ),
        (
            "stage_blocks=29, 28, pipefusion_degree=2",
            Layout(pipefusion_degree=2, stage_blocks=(29, 28)),
            "pipefusion2, stage_blocks 29,28, M=auto, W=1",
        ),
        ("ring_degree=2,attention=sdpa", Layout(ring_degree=2, attention="sdpa"), "ring2, sdpa"),
    ],
)
def test_layouts_are_read_and_named(text, layout, name):
    assert parse_layout(text) == layout
    assert name_of(layout) == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ulysses=2", "ulysses: .*made of .*ulysses_degree"),
        ("ulysses_degree=0", "ulysses_degree"),
        ("ulysses_degree=2,3", "ulysses_degree"),
        ("ring", "NAME=VALUE"),
    ],
)
def test_a_layout_that_is_none_is_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_layout(text)


def test_presets_fit_the_demo_model_at_128_px():
    for layouts in PRESETS.values():
        assert len({name_of(layout) for layout in layouts}) == len(layouts)
        for layout in layouts:
            check_layout(layout, RunFacts(blocks=9, token_rows=8))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("0.1", "cache 0.1"),
        ("threshold=0.2,order=1", "cache 0.2, order 1"),
        ("schedule,0.25,order=1", "schedule 0.25, order 1"),
        ("teacache,0.3", "teacache 0.3"),
    ],
)
def test_caches_are_named_as_they_are_written(text, name):
    cache = parse_cache(text, TARGET)
    assert str(Method(Layout(), cache)).endswith(name)
    assert len(cache.rates) == (20 if cache.rule == "schedule" else len(cache.rates))


def test_caches_of_others_are_named_as_their_makers_do():
    assert parse_rival("magcache=0.06") == Rival("magcache", 0.06)
    assert str(parse_rival("first-block=0.2")) == "diffusers' FirstBlockCache 0.2"
    for text in ("easycache=0.1", "magcache", "magcache=much"):
        with pytest.raises(UserError, match="names no cache of others"):
            parse_rival(text)
