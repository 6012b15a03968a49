"""What ranks tell each other outside of collectives: it is heard, and what nobody of theirs has written is not."""

import pytest
from paralleldit.parallel_backend.protocol import records
from paralleldit.parallel_backend.worker.board import MAX_NOTE, Failed, FileBoard, LostLog, StoreBoard
from paralleldit.parallel_backend.worker.heartbeat import Beats
from torch.distributed import HashStore

FAILED = Failed(rank=1, kind="user", message="Too large.", hint="Make it smaller.")


@pytest.fixture(params=["one host", "several hosts"])
def board(request, tmp_path):
    return FileBoard.create(tmp_path, 2) if request.param == "one host" else StoreBoard(HashStore())


def test_what_ranks_tell_is_heard(board):
    assert (board.beat_of(0), board.beat_of(1), board.failure(3), board.lost_log()) == (0, 0, None, None)
    board.beat(1, 1 << 40)
    board.tell_failure(3, FAILED)
    board.tell_failure(3, FAILED.model_copy(update={"rank": 0}))
    board.tell_lost_log(LostLog(rank=1, errno=28))
    assert (board.beat_of(0), board.beat_of(1)) == (0, 1 << 40)
    assert (board.failure(3), board.failure(4)) == (FAILED, None), "the first to say it is heard"
    assert str(board.lost_log()) == "Log lines are lost: rank-1.log: No space left on device."
    board.forget_failure(3)
    assert board.failure(3) is None


NOT_OURS = [
    b"",
    b"not json",
    b"\xff\xfe\x00",
    b"[]",
    b"null",
    b"[" * 50_000,
    b'{"rank": 0}',
    b'{"rank": -1, "kind": "user", "message": "pay", "hint": ""}',
    b'{"rank": 0, "kind": "ok", "message": "pay", "hint": ""}',
    b'{"rank": 0, "kind": "user", "message": ["pay"], "hint": ""}',
    b'{"rank": 0, "kind": "user", "message": "pay", "hint": "", "more": 1}',
    b'{"rank": 1e400, "kind": "user", "message": "pay", "hint": ""}',
    b'{"rank": 0, "errno": "28"}',
    b'{"rank": 0, "errno": 99999999999999999999}',
    b"-1",
    b"9" * 5000,
]
TOO_LONG = b'{"rank": 0, "kind": "user", "message": "' + b"x" * MAX_NOTE + b'", "hint": ""}'


@pytest.mark.parametrize("found", [*NOT_OURS, TOO_LONG], ids=lambda found: str(found[:30]))
def test_between_hosts_nothing_that_is_found_is_believed_or_hurts(found):
    store = HashStore()
    board = StoreBoard(store)
    for key in ("failed/3", "lost log", "beat/0"):
        store.set(key, found)
    for _ in range(2):
        assert (board.failure(3), board.lost_log(), board.beat_of(0)) == (None, None, 0)
    assert Beats(board, [0, 1]).quietest()[0] < 1


def test_on_one_host_a_failure_that_is_none_is_not_believed(tmp_path):
    board = FileBoard.create(tmp_path, 2)
    for found in NOT_OURS:
        (tmp_path / records.failed_file(3)).write_bytes(found)
        assert board.failure(3) is None


def test_the_board_of_one_host_is_private_and_outlives_its_directory(tmp_path):
    life = tmp_path / "life"
    life.mkdir()
    board = FileBoard.create(life, 2)
    other = FileBoard(life, 2)
    assert (life / records.BoardFile).stat().st_mode & 0o077 == 0
    for path in life.iterdir():
        path.unlink()
    life.rmdir()
    board.beat(0, 7)
    board.tell_failure(3, FAILED)
    assert (other.beat_of(0), other.failure(3)) == (7, None)
    board.forget_failure(3)
