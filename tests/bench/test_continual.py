"""The study of forgetting: what its table and its verdict say."""

from bench.studies import continual


def record(arm, seed, last, forgetting):
    return {"arm": arm, "seed": seed, "last": last, "forgetting": forgetting, "seconds": 10.0}


def test_table_has_a_row_for_every_arm_that_ran():
    found = [
        record("in sequence", 0, 0.25, 0.5),
        record("in sequence", 1, 0.35, 0.7),
        record("NSP2", 0, 0.5, 0.1),
    ]
    lines = continual.table(found).splitlines()
    assert len(lines) == 4
    assert "| in sequence | 0.300 | 0.250, 0.350 | 0.600 | 0.500, 0.700 | 10 |" in lines
    assert "| NSP2 | 0.500 | 0.500 | 0.100 | 0.100 | 10 |" in lines


def test_verdict_is_over_the_seeds_that_both_have():
    sizes = {"epochs": 6, "train_size": 64, "test_size": 80}
    found = [
        sizes | record("in sequence", 0, 0.25, 0.5),
        sizes | record("in sequence", 1, 0.35, 0.7),
        sizes | record("NSP2", 0, 0.5, 0.1),
    ]
    shown = continual.blocks(found)
    assert shown["continual verdict"] == (
        "Beside in sequence, over the seeds that both have: NSP2 +0.250 accuracy and -0.400 "
        "forgetting (1 seed)."
    )
    assert "64 training and 80 test images a task, 6 epochs" in shown["continual setting"]
