"""asv's install step: a commit's package, and the packages of an environment that is there, without copying either.

``python prepared.py ENVIRONMENT CHECKOUT``, by the Python of asv's virtualenv, which a .pth file shows both.
"""

import sys
import sysconfig
from pathlib import Path

environment, checkout = sys.argv[1:]
packages = sysconfig.get_path("purelib", "venv", {"base": environment})
if not Path(packages, "asv_runner").is_dir():
    sys.exit(f"{packages} has not what ntkbench needs: run make once, with the Python that runs asv")
lines = f"{Path(checkout, 'src')}\n{packages}\n"
Path(sysconfig.get_path("purelib"), "ntkbench.pth").write_text(lines, encoding="utf-8")
