import logging

from paralleldit.nodes import example_pictures

NAME = "paralleldit_edges.png"


def test_a_saved_workflows_picture_is_put_beside_the_users_own(tmp_path):
    example_pictures.provide(tmp_path)
    assert (tmp_path / NAME).read_bytes() == (example_pictures.PICTURES / NAME).read_bytes()


def test_a_picture_of_the_same_name_stays_as_it_is(tmp_path):
    (tmp_path / NAME).write_bytes(b"the user's own")
    example_pictures.provide(tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"the user's own"


def test_a_folder_that_takes_no_file_is_said_and_no_error(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        example_pictures.provide(tmp_path / "none")
    assert NAME in caplog.text
