"""`cli plan` says which layouts fit, without any rank."""

import pytest
from paralleldit.cli.commands.main import main


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["--ranks=2"],
            0,
            ["ulysses2: exact", "tensor2: exact", "pipefusion2: approximate after 1 exact steps, 4 pat"],
        ),
        (["--ranks=2", "--cfg=3"], 0, ["cfg2: exact"]),
        (["--ranks=2", "--steps=1"], 0, ["pipefusion2: exact, as warmup_steps=1 covers all 1 steps"]),
        (["--ranks=2", "--layout=cfg_degree=2"], 1, ["cfg_degree=2", "Nearest that fits: ulysses2"]),
        (["--ranks=60", "--layout=pipefusion_degree=60"], 1, ["57 blocks"]),
        (["--ranks=2", "--height=64", "--layout=pipefusion_degree=2,num_patches=5"], 1, ["num_patches=5", "4 rows"]),
        (["--ranks=2", "--layout=stage_degree=2"], 1, ["stage_degree"]),
    ],
    ids=str,
)
def test_plan_names_what_fits_or_why_not(capsys, arguments, code, words):
    assert main(["plan", "--family=flux", *arguments]) == code
    told = capsys.readouterr()
    assert all(word in (told.err if code else told.out) for word in words), told


def test_layouts_that_need_what_is_not_there_are_not_listed(capsys):
    main(["plan", "--family=flux", "--ranks=4"])
    listed = capsys.readouterr().out
    assert "cfg" not in listed
    assert "data" not in listed
