"""One thread per test process: the models are too small to share, and on a busy machine threads wait for each other."""

import torch

torch.set_num_threads(1)
