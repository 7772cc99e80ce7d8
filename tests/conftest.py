"""One thread per test process: the models are too small to share, and on a busy machine threads wait for each other.

Property tests have no deadline for the same reason: how long a first call takes is the machine's affair.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
