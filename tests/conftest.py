import os
import signal

import jaxtyping
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores are shared by all test processes
torch.set_num_threads(1)

# annotated shapes are verified in tests, at no cost in production; before the package's first import
jaxtyping.install_import_hook(["ssl_methods"], "beartype.beartype")

# A shell that puts us in the background, or nohup, has these ignored; commands that tests start would inherit that.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)
