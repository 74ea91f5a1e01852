import os

import jaxtyping
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores are shared by all test processes
torch.set_num_threads(1)

# annotated shapes are verified in tests, at no cost in production; before the package's first import
jaxtyping.install_import_hook(["ssl_methods"], "beartype.beartype")
