import time

from dpm_cli.data import Waiting


def slow(batches, seconds):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def test_only_the_time_until_a_batch_is_there_counts():
    waiting, seen = Waiting(), []
    for batch in waiting.timed(slow([1, 2, 3], 0.02)):
        time.sleep(0.05)  # a training step
        seen.append(batch)
    assert seen == [1, 2, 3]
    assert 0.06 <= waiting.seconds < 0.2


def test_each_epoch_has_its_own_seconds():
    waiting = Waiting()
    list(waiting.timed(slow([1], 0.01)))
    assert waiting.take() >= 0.01
    assert waiting.seconds == 0
