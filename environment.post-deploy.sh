#!/bin/sh
# The packages of requirements-no-deps.txt, in the environment of environment.yml: what conda hands to pip cannot be
# installed without its dependencies.
set -eu
python -m pip install --no-deps neural-tangents==0.6.5 curvlinops-for-pytorch==3.0.1
