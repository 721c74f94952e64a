"""The recipe of short runs on the bundled digits."""


def recipe(**changes):
    """changes: sections or settings that replace or extend the ones below."""
    values = {
        "model": {"arch": "digits", "classes": 10, "input": [1, 8, 8]},
        "data": {"name": "digits", "batch": 32, "limit": 128, "augment": {"crop": 1, "flip": False}},
        "prune": {"target": {"macs": 0.5}, "rounds": 1, "round_to": 4},
        "decay": {"steps": 2, "rectify": False},
        "train": {"epochs": 2},
        "finetune": {"epochs": 0},
        "export": [],
        "precision": "fp32",
    }
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
    return values
