"""A run's directory, opened by many processes at a time."""

from concurrent.futures import ThreadPoolExecutor

from vit_jax.workdir import Workdir


def test_many_open_one_workdir_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: Workdir.open(str(tmp_path / "run")), range(400)))
    assert {workdir.path for workdir in opened} == {tmp_path / "run"}
    assert list((tmp_path / "run").iterdir()) == []
