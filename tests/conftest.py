"""Settings for every test."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny nets run many times slower on two threads than on one
settings.register_profile("busy", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("busy")
