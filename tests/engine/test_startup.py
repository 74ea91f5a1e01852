import subprocess
import sys
import time

PROGRAM = """
from orchestrate.engine.startup import Startup
startup = Startup()
startup.mark("imports")
startup.mark("nothing")
print(startup.seconds["imports"], startup.seconds["nothing"], startup, sep="|")
"""


def test_first_phase_begins_with_the_process() -> None:
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    outside = time.monotonic() - began
    imports, nothing, words = result.stdout.strip().split("|")
    # The kernel counts a process's age in ticks of 10 ms.
    assert 0 < float(imports) <= outside + 0.02
    assert float(nothing) < float(imports)
    assert words.startswith("first step after ")
