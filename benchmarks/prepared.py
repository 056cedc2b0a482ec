"""asv's install step: a commit's package with the packages of an existing environment.

``python prepared.py ENVIRONMENT CHECKOUT``, run by the Python of asv's virtualenv. The package is copied, since asv may
check out another commit without installing it. A .pth file names the copy and the packages of the environment.
"""

import shutil
import sys
import sysconfig
from pathlib import Path

environment, checkout = sys.argv[1:]
packages = sysconfig.get_path("purelib", "venv", {"base": environment})
if not Path(packages, "asv_runner").is_dir():
    sys.exit(f"{packages} lacks what ntkbench needs: run make once, with the Python that runs asv")
package = Path(sys.prefix, "commit", "src")
shutil.rmtree(package, ignore_errors=True)
shutil.copytree(Path(checkout, "src"), package)
Path(sysconfig.get_path("purelib"), "ntkbench.pth").write_text(f"{package}\n{packages}\n", encoding="utf-8")
