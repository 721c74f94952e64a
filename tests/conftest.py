"""Settings for every test."""

import torch

torch.set_num_threads(1)  # tiny nets run many times slower on two threads than on one
